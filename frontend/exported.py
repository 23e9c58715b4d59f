"""The door from `torch.export`: an ExportedProgram becomes a Program with named weights, symbols and provenance."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ir.errors import InvariantError, UnsupportedError
from ir.params import Entry, MemorySource, ParamStore, Source
from ir.program import PATH, TYPE, Program
from ir.types import Dim, ScalarType, TensorType, ValueType, tensor_type

_ASSERTS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
# Higher-order ops that only set a mode for the graph they wrap: position of that graph among the arguments.
_MODE_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def import_exported(
    exported: ExportedProgram, name: str, prefix: str, symbols: Mapping[str, str], aliases: Mapping[str, str]
) -> Program:
    """Return the exported graph as a Program whose weights are `get_attr` nodes.

    prefix: stripped from parameter names and module paths; symbols: exporter's symbol -> declared dim name;
    aliases: tied parameter -> canonical name. Parameters are typed but not loaded (their tensors are placeholders
    of the tracing run); buffers and constants carry their values. Raises UnsupportedError for control flow.
    """
    importer = _Importer(exported, prefix, symbols, aliases)
    importer.run()
    declared = tuple(dict.fromkeys(symbols.values()))
    return Program(importer.graph, importer.params, name, symbols=declared)


class Untraced:
    """A parameter known by its type alone: tracing needs no weights, and `frontend.weights` binds them later."""

    def __init__(self, name: str, kind: TensorType) -> None:
        self._name, self._type = name, kind

    def names(self) -> tuple[str, ...]:
        return (self._name,)

    def type_of(self, name: str) -> TensorType:
        return self._type

    def stored_bytes(self, name: str) -> int:
        return self._type.nbytes

    def load(self, name: str) -> torch.Tensor:
        raise InvariantError(f"the weight {name} was read before it was bound", fix="bind the checkpoint first")


class _Importer:
    """The state of one walk over an exported graph: the new graph, and what each old node became."""

    def __init__(
        self, exported: ExportedProgram, prefix: str, symbols: Mapping[str, str], aliases: Mapping[str, str]
    ) -> None:
        self.exported, self.prefix, self.symbols, self.aliases = exported, prefix, symbols, aliases
        self.graph, self.params = fx.Graph(), ParamStore()

    def run(self) -> None:
        """Walk the exported graph, then enter the tied names."""
        module = self.exported.graph_module
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        env: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = self._placeholder(node, specs[node.name])
        self._body(module, env)
        output = module.graph.output_node()
        self.graph.output(tuple(_look(env, a) for a in output.args[0]))
        for alias, target in self.aliases.items():
            if target in self.params:
                self.params.tie(alias, target)

    def _placeholder(self, node: fx.Node, spec: Any) -> fx.Node:
        if spec.kind is InputKind.USER_INPUT:
            new = self.graph.placeholder(node.name)
            new.meta = {TYPE: self._type(node.meta["val"])}
            return new
        target = spec.target.removeprefix(self.prefix)
        target = self.aliases.get(target, target)
        tensor = self._tensor(spec)
        if target not in self.params:
            source: Source = MemorySource({target: tensor.detach().clone()})
            if spec.kind is InputKind.PARAMETER:
                source = Untraced(target, tensor_type(tensor))
            self.params.enter(target, Entry(source, target, tensor_type(tensor)))
        for existing in self.graph.nodes:
            if existing.op == "get_attr" and existing.target == target:
                return cast(fx.Node, existing)
        new = self.graph.create_node("get_attr", target)
        new.meta = {TYPE: tensor_type(tensor)}
        return new

    def _tensor(self, spec: Any) -> torch.Tensor:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in self.exported.state_dict:
            return cast(torch.Tensor, self.exported.state_dict[spec.target])
        return cast(torch.Tensor, self.exported.constants[spec.target])

    def _body(self, module: fx.GraphModule, env: dict[fx.Node, Any]) -> None:
        for node in module.graph.nodes:
            if node.op == "call_function":
                self._call(module, node, env)

    def _call(self, module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        packet = getattr(node.target, "overloadpacket", None)
        label = getattr(packet, "__name__", getattr(node.target, "__name__", str(node.target)))
        if label in _ASSERTS:
            return
        if label in _MODE_WRAPPERS:
            env[node] = self._inline(module, node, _MODE_WRAPPERS[label], env)
            return
        if node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):  # type: ignore[arg-type]
            env[node] = env[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise _untraceable(label, self._path(node), node.meta.get("stack_trace", ""))
        args = fx.map_arg(node.args, lambda n: _look(env, n))
        kwargs = fx.map_arg(node.kwargs, lambda n: _look(env, n))
        new = self.graph.create_node("call_function", node.target, args, kwargs, node.name)
        new.meta = {TYPE: self._type(node.meta.get("val")), PATH: self._path(node)}
        env[node] = new

    def _inline(self, module: fx.GraphModule, node: fx.Node, at: int, env: dict[fx.Node, Any]) -> Any:
        if at == 4 and node.args[2] is True:
            raise _untraceable("wrap_with_autocast(enabled)", self._path(node), node.meta.get("stack_trace", ""))
        inner_module = getattr(module, node.args[at].target)  # type: ignore[union-attr, arg-type]
        inner = dict(
            zip(
                [n for n in inner_module.graph.nodes if n.op == "placeholder"],
                [_look(env, a) for a in node.args[at + 1 :]],
                strict=True,
            )
        )
        self._body(inner_module, inner)
        result = inner_module.graph.output_node().args[0]
        if isinstance(result, fx.Node):
            return inner[result]
        return tuple(_look(inner, r) for r in result)

    def _path(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        # The exporter invents a frame for values it reads off the inputs; it is no module of the model.
        return "" if path.startswith("_empty_nn_module") else (path + ".").removeprefix(self.prefix).rstrip(".")

    def _type(self, value: Any) -> ValueType:
        if value is None:
            return None
        if isinstance(value, torch.Tensor):
            return TensorType(value.dtype, tuple(self._dim(d) for d in value.shape))
        if isinstance(value, (tuple, list)):
            return tuple(self._type(v) for v in value)
        kind = {torch.SymInt: "int", torch.SymFloat: "float", torch.SymBool: "bool"}.get(type(value))
        return ScalarType(kind or type(value).__name__, str(self._dim(value)))

    def _dim(self, value: Any) -> Dim:
        if isinstance(value, int):
            return value
        expr = getattr(getattr(value, "node", None), "expr", value)
        if hasattr(expr, "free_symbols"):
            import sympy

            expr = expr.xreplace({s: sympy.Symbol(self.symbols.get(str(s), str(s))) for s in expr.free_symbols})
            if expr.is_Integer:
                return int(expr)
        return str(expr).replace(" ", "")


def _look(env: dict[fx.Node, Any], value: Any) -> Any:
    return env[value] if isinstance(value, fx.Node) else value


def _untraceable(what: str, path: str, stack: str) -> UnsupportedError:
    lines = [line.strip() for line in stack.splitlines() if line.strip()]
    return UnsupportedError(
        f"the model uses {what}, which has no place in a straight-line graph",
        where=f"{path or 'the model'}" + (f" ({lines[-2]})" if len(lines) >= 2 else ""),
        why="its Python code branches on values, or switches autocast on inside",
        fix="load the model with a plain (eager) implementation of that module",
    )
