"""Running an ONNX graph in torch: node by node through the table of rules, numbers that are known kept as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as onnx
import torch

from frontend.onnx import operators as _operators  # noqa: F401  (fills the tables)
from frontend.onnx.agreement import check_types
from frontend.onnx.call import Call, Refused
from frontend.onnx.registry import NUMBER_RULES, TENSOR_RULES
from frontend.onnx.values import Ints, as_tensor, entries, known_ints
from ir.errors import NomulError

# Results of so many entries at most are computed when a model is imported, where all inputs are known by then.
_FOLDED = 4096
_DOMAINS = ("", "ai.onnx")
# Functions that call functions, deeper than any exporter writes them.
_DEEPEST = 32

# Whole numbers narrower than a byte are held in one, so that rules cannot tell where they saturate.
_NARROW = (onnx.DataType.INT4, onnx.DataType.UINT4, onnx.DataType.INT2, onnx.DataType.UINT2)
_READ_NARROW = ("DequantizeLinear", "com.microsoft.DequantizeLinear", "Identity", "Reshape", "Transpose")

Env = dict[onnx.Value, Any]


class Interpreter:
    """Runs the nodes of a model's graph, of its functions and of subgraphs that run a known number of times."""

    def __init__(self, model: onnx.Model) -> None:
        self.functions = dict(model.functions)
        self.versions = dict(model.opset_imports)
        self.depth = 0

    def run(self, nodes: Sequence[onnx.Node], env: Env, attributes: Mapping[str, Any] | None = None) -> None:
        """Run nodes in order; env: known values, to which results are added; attributes: of a function around them."""
        for node in nodes:
            self.step(node, env, attributes or {})

    def given(self, node: onnx.Node, known: Env) -> Env:
        """Return what a node gives for known values, which stay as they are."""
        env = dict(known)
        self.step(node, env, {})
        return {value: env[value] for value in node.outputs}

    def step(self, node: onnx.Node, env: Env, attributes: Mapping[str, Any]) -> None:
        """Run one node."""
        inputs = [None if value is None else _look(env, value, node) for value in node.inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        call = self.call(node, attributes)
        narrow = next((v for v in node.inputs if v is not None and v.dtype in _NARROW), None)
        if narrow is not None and call.op not in _READ_NARROW:
            raise call.refuse(
                f"{narrow.name} has whole numbers of type {narrow.dtype.name}, which are only dequantised"
            )
        found = self.results(node, call, inputs, env)
        if not isinstance(found, tuple):
            found = (found,)
        if len(found) < len(node.outputs):
            raise call.refuse(f"it has {len(node.outputs)} results here, and {len(found)} are known")
        env.update(zip(node.outputs, map(_numbers, found), strict=False))

    def call(self, node: onnx.Node, attributes: Mapping[str, Any]) -> Call:
        """Return a node as its rule sees it."""
        name = node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"
        own = {}
        for key, attribute in node.attributes.items():
            if attribute.is_ref():
                if attribute.ref_attr_name in attributes:
                    own[key] = attributes[attribute.ref_attr_name]
            else:
                own[key] = attribute
        version = node.version or self.versions.get(node.domain) or self.versions.get("") or 1
        wanted = tuple(value.name not in (None, "") for value in node.outputs)
        return Call(name, int(version), node.name or "", own, wanted)

    def results(self, node: onnx.Node, call: Call, inputs: list[Any], env: Env) -> Any:
        """Return what a node gives, by the rule for numbers, that for tensors, or the body of its function."""
        check_types(call, inputs)
        if call.op in NUMBER_RULES and inputs and all(isinstance(v, Ints) or v is None for v in inputs):
            found = NUMBER_RULES[call.op](call, *inputs)
            if found is not NotImplemented:
                return found
        entry = TENSOR_RULES.get(call.op)
        if entry is not None:
            given = inputs if entry.raw else [as_tensor(v) for v in inputs]
            return _explained(call, lambda: entry.run(call, *given))
        if call.op in CONTROL:
            return CONTROL[call.op](self, call, inputs, env)
        function = self.functions.get(node.op_identifier())
        if function is None:
            raise Refused(
                f"operator {call.op} is not known", where=call.where, why="no rule computes it, and no function"
            )
        return self.inlined(function, call, inputs)

    def inlined(self, function: onnx.Function, call: Call, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return what a function of the model gives."""
        if self.depth >= _DEEPEST:
            raise call.refuse(f"functions call each other {_DEEPEST} deep")
        given = {key: attribute for key, attribute in function.attributes.items() if attribute.value is not None}
        env: Env = dict(zip(function.inputs, [*inputs, *[None] * len(function.inputs)], strict=False))
        outer, self.versions = self.versions, {**self.versions, **function.opset_imports}
        self.depth += 1
        try:
            self.run(list(function), env, {**given, **call.attributes})
        finally:
            self.versions, self.depth = outer, self.depth - 1
        return tuple(env[value] for value in function.outputs)

    def subgraph(self, graph: onnx.Graph, env: Env, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Return what a subgraph gives; it sees the values around it."""
        inner = dict(env)
        inner.update(constants_of(graph))
        inner.update(zip(graph.inputs, inputs, strict=True))
        self.run(list(graph), inner)
        return tuple(inner[value] for value in graph.outputs)


def _if(run: Interpreter, call: Call, inputs: list[Any], env: Env) -> tuple[Any, ...]:
    """Run the branch that a known condition takes."""
    chosen = _known(inputs[0])
    if chosen is None:
        raise call.unknown("its condition")
    return run.subgraph(call.get("then_branch" if chosen else "else_branch"), env, [])


def _loop(run: Interpreter, call: Call, inputs: list[Any], env: Env) -> tuple[Any, ...]:
    """Run a body as often as a known count and known conditions say."""
    count, going, *state = [*inputs, None, None][: max(2, len(inputs))]
    body = call.get("body")
    most, more = _known(count), True if going is None else _known(going)
    if count is not None and most is None:
        raise call.unknown("its number of rounds")
    kept, scanned, done = len(state), list[list[Any]](), 0
    while True:
        if more is None:
            raise call.unknown("its condition")
        if not more or (most is not None and done >= most):
            break
        if done >= _FOLDED:
            raise call.refuse(f"it runs more than {_FOLDED} times")
        flag, *found = run.subgraph(body, env, [Ints((done,), 0), Ints((True,), 0, torch.bool), *state])
        state, more, done = found[:kept], _known(flag), done + 1
        scanned.append(found[kept:])
    if not scanned and len(body.outputs) > kept + 1:
        raise call.refuse("it runs no round, so that the shape of what it would collect is not known")
    columns = zip(*scanned, strict=True) if scanned else ()
    return (*state, *(torch.stack([as_tensor(v) for v in column]) for column in columns))


def _scan(run: Interpreter, call: Call, inputs: list[Any], env: Env) -> tuple[Any, ...]:
    """Run a body for each slice of its last inputs, of which there is a known number."""
    if call.version < 9:
        raise call.refuse("before version 9 it has another meaning")
    count = call.integer("num_scan_inputs", 0)
    kept = len(inputs) - count
    state, scanned = inputs[:kept], [as_tensor(v) for v in inputs[kept:]]
    axes = call.integers("scan_input_axes") or [0] * count
    back = call.integers("scan_input_directions") or [0] * count
    rows = [list(x.unbind(axis)) for x, axis in zip(scanned, axes, strict=True)]
    rows = [r[::-1] if turned else r for r, turned in zip(rows, back, strict=True)]
    found_rows = list[list[Any]]()
    for row in zip(*rows, strict=True):
        found = run.subgraph(call.get("body"), env, [*state, *row])
        state = list(found[:kept])
        found_rows.append([as_tensor(v) for v in found[kept:]])
    columns = list(zip(*found_rows, strict=True))
    out_axes = call.integers("scan_output_axes") or [0] * len(columns)
    out_back = call.integers("scan_output_directions") or [0] * len(columns)
    turned = [column[::-1] if turn else column for column, turn in zip(columns, out_back, strict=True)]
    return (*state, *(torch.stack(list(c), axis) for c, axis in zip(turned, out_axes, strict=True)))


CONTROL = {"If": _if, "Loop": _loop, "Scan": _scan}


def constants_of(graph: onnx.Graph) -> Env:
    """Return the initializers of a graph as tensors, few whole numbers as numbers."""
    from frontend.onnx.tensors import tensor_of

    return {value: _numbers(tensor_of(value.const_value)) for value in graph.initializers.values() if value.const_value}


def fold(run: Interpreter, graph: onnx.Graph, known: Env) -> set[onnx.Node]:
    """Run the nodes whose inputs are all known, adding what they give to `known` where it is small; return them."""
    done = set[onnx.Node]()
    for node in graph:
        if any(value is not None and value not in known for value in node.inputs) or node.op_type in CONTROL:
            continue
        found = _folded(run, node, known)
        if found is not None:
            known.update(found)
            done.add(node)
    return done


def _folded(run: Interpreter, node: onnx.Node, known: Env) -> Env | None:
    """Return what a node gives, None where that is large, or nothing: such a node is refused where it is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        # First without memory: a damaged file may ask for any amount.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            sizes = run.given(node, known)
        if any(_entries(v) > _FOLDED for v in sizes.values()):
            return None
        with torch.no_grad():
            return run.given(node, known)
    except NomulError:
        return None


def _entries(value: Any) -> int:
    if isinstance(value, list):
        return sum(_entries(v) for v in value)
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0


def _known(value: Any) -> Any:
    """Return a known number or truth value, None where data decides it."""
    if isinstance(value, Ints) and len(value.values) == 1 and isinstance(value.values[0], int):
        return value.values[0]
    return entries(value)[0] if type(value) is torch.Tensor else None


def _numbers(value: Any) -> Any:
    """Return a plain tensor of few whole numbers as these numbers."""
    if type(value) is not torch.Tensor:
        return value
    found = known_ints(value)
    return value if found is None else found


def _look(env: Env, value: onnx.Value, node: onnx.Node) -> Any:
    if value not in env:
        raise Refused(
            f"the value {value.name} is read and never computed",
            where=f"node {node.name or node.op_type}",
            why="no input, initializer or earlier node gives it",
        )
    return env[value]


def _explained(call: Call, run: Any) -> Any:
    """Run a rule; what torch says against its arguments becomes a refusal by the node's name."""
    try:
        return run()
    except NomulError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError) as error:
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
        raise call.refuse(f"{type(error).__name__}: {line[:300]}") from error
