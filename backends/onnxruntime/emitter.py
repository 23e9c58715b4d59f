"""The emitter: a program's nodes become ONNX nodes, one table entry an operator.

An entry is a function of the emitter and an fx node that returns what the node's value is in ONNX:

    def relu(e: Emitter, node: fx.Node) -> Result:
        return e.add("Relu", e.value(node.args[0]))

    TABLE = {torch.ops.aten.relu.default: relu}

A Result is an `onnx_ir.Value`; a tuple of them for an operator with several results; an int for a size that is known;
or a `torch.Tensor` for a result that turned out to be constant. What the emitter offers to entries:

    e.args(node)              the arguments in the order of the schema, defaults filled in
    e.value(arg)              the Value of an argument: a tensor node (a parameter becomes an initializer, read when
                              the file is written), or a size as a 0-d int64 tensor
    e.tensor(arg)             the torch tensor behind a parameter or a constant, nothing emitted; None if computed
    e.size(arg), e.shape(l)   a size as an int or a Value int64 [1]; a list of sizes as one Value int64 [n]
    e.dim(expr)               a symbolic dim that an input has, int64 [1];  e.results(node)  the values of several
    e.scalar(x, dtype)        a 0-d constant;  e.vector([...])  an int64 vector;  e.constant(t)  any small tensor
    e.initializer(name, ...)  a large constant with a name of its own, computed when the file is written
    e.add(op, *inputs, domain="", overload="", outputs=1, **attributes)
                              a node; inputs are Values, None for one left out, or lists of ints; returns a Value, or
                              a tuple of `outputs` Values. Equal nodes are made once. Attributes that are None are
                              left out.
    e.domain(name, version)   declares a domain that `add` uses (`""` and `com.microsoft` are there)
    e.function(f)             adds a model-local function (`onnx_ir.Function`); its domain must be declared
    e.has_function(domain, name, overload)
                              whether it is there already
    e.detour(runs_by, reason) says that this call is not run by the kernel that was asked for
    e.opset, e.fuse, e.mode   the version of the standard operators; whether fused ones may be used; how the kernels
                              of compressed linears take activations (`backends.native.library.MODES`)
    e.uniform, e.accuracy     who runs uniform codes, `own` or `contrib`; the accuracy level of `MatMulNBits`

`raise Refused(reason)` says that this call cannot be emitted. Entries only build objects in memory: nothing is written
before every node of the program has been emitted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from backends.detours import Detour
from backends.native.library import DEFAULT_MODE
from backends.onnxruntime.dtypes import onnx_dtype
from backends.onnxruntime.names import dim_name, input_name, output_name, same_dim
from backends.onnxruntime.packages import package
from ir.overloads import bound_args
from ir.program import PATH, TYPE, Program
from ir.types import ScalarType, TensorType

Result = Any
Entry = Callable[["Emitter", fx.Node], Result]
Table = Mapping[Any, Entry]
Uniform = Literal["own", "contrib"]

CONTRIB = "com.microsoft"
# Where a model's metadata keeps what `Emitter.detour` recorded, and a node's what `Emitter.computes` did, as JSON.
DETOURS, SITES = "nomul.detours", "nomul.sites"
IR_VERSION = 10
# Below this a constant is computed while emitting: gains, tables of positions.
FOLD_BYTES = 1 << 20
_INT_MAX = 2**63 - 1


class Refused(Exception):
    """An entry cannot emit a call; the message says why."""


class Emitter:
    """Builds the ONNX graph of one program; see the module's text for what entries may use."""

    def __init__(
        self,
        program: Program,
        table: Table,
        opset: int = 23,
        fuse: bool = True,
        mode: str = DEFAULT_MODE,
        uniform: Uniform = "own",
        accuracy: int = 4,
        narrow: bool = True,
    ) -> None:
        self.program, self.opset, self.fuse, self.mode = program, opset, fuse, mode
        self.uniform, self.accuracy, self.narrow = uniform, accuracy, narrow
        # What `narrow` found each weight to consist of.
        self.narrow_dtypes: dict[str, torch.dtype | None] = {}
        self._table, self._ir = table, package("onnx_ir")
        self._values: dict[fx.Node, Result] = {}
        self._made: dict[Any, tuple[Any, ...]] = {}
        self._initializers: dict[str, Any] = {}
        self._constants: dict[Any, Any] = {}
        self._nodes: list[Any] = []
        self._functions: dict[tuple[str, str, str], Any] = {}
        self._detours: list[Detour] = []
        self._domains: dict[str, int] = {"": opset}
        self._names = {output_name(program, index) for index in range(len(program.outputs))}
        self._named: dict[fx.Node, Any] = {}
        self._current: fx.Node | None = None
        for index, node in enumerate(program.inputs):
            self._values[node] = self._typed(input_name(program, index), node)

    # What entries read -------------------------------------------------------------------------------------------

    def args(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the arguments of a call in the order of its schema, defaults filled in."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return node.args
        found = bound_args(node.target, node.args, node.kwargs)
        if found is None:
            raise Refused("its arguments do not fit the operator's schema")
        return found

    def value(self, arg: Any) -> Any:
        """Return the ONNX value of an argument: tensor node, size (0-d int64) or Python number (0-d float or int)."""
        if isinstance(arg, (bool, int, float)):
            return self.constant(torch.tensor(arg))
        result = self._result(arg)
        if isinstance(result, Tensor):
            return self._folded(arg, result)
        if isinstance(arg.meta[TYPE], ScalarType):
            if isinstance(result, int):
                return self.constant(torch.tensor(result))
            return self.add("Squeeze", result, [0])
        return result

    def tensor(self, arg: Any) -> Tensor | None:
        """Return the torch tensor behind a parameter or constant node without emitting it, None for computed ones."""
        if not isinstance(arg, fx.Node):
            return None
        if arg.op == "get_attr":
            return self.program.value(arg)
        found = self._values.get(arg)
        return found if isinstance(found, Tensor) else None

    def size(self, arg: Any) -> Any:
        """Return a size: an int where it is known, else a Value int64 [1]."""
        return int(arg) if isinstance(arg, int) else self._result(arg)

    def shape(self, sizes: Sequence[Any]) -> Any:
        """Return sizes (ints, size nodes or results of `size`) as one Value int64 [n]."""
        found = [self.size(s) if isinstance(s, (int, fx.Node)) else s for s in sizes]
        if all(isinstance(s, int) for s in found):
            return self.vector(found)
        parts: list[Any] = []
        for size in found:  # neighbouring known sizes share a constant
            if isinstance(size, int) and parts and isinstance(parts[-1], list):
                parts[-1].append(size)
            else:
                parts.append([size] if isinstance(size, int) else size)
        return parts[0] if len(parts) == 1 else self.add("Concat", *parts, axis=0)

    def dim(self, expr: str) -> Any | None:
        """Return a symbolic dim as a Value int64 [1] where an input of the program has it, else None."""
        for node in self.program.inputs:
            for place, dim in enumerate(node.meta[TYPE].dims):
                if same_dim(dim, expr):
                    return self.add("Shape", self._values[node], start=place, end=place + 1)
        return None

    def results(self, arg: fx.Node) -> tuple[Any, ...]:
        """Return the values of a node with several results."""
        return tuple(self._result(arg))

    # What entries make -------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> Any:
        """Return a small constant; equal ones are stored once."""
        key = (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if key not in self._constants:
            name = self._unique(f"constant_{len(self._constants)}")
            self._constants[key] = self.initializer(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)
        return self._constants[key]

    def scalar(self, number: float | int | bool, dtype: torch.dtype) -> Any:
        """Return a 0-d constant of a dtype."""
        return self.constant(torch.tensor(number, dtype=dtype))

    def vector(self, numbers: Sequence[int]) -> Any:
        """Return a constant int64 vector."""
        return self.constant(torch.tensor(list(numbers), dtype=torch.long))

    def initializer(self, name: str, shape: Sequence[int], dtype: torch.dtype, load: Callable[[], Tensor]) -> Any:
        """Return an initializer; `load` gives its tensor when the file is written, once, and again if it must.

        The same name gives the same value: what is stored under it must not differ.
        """
        if name not in self._initializers:
            kind, dims = onnx_dtype(dtype), self._ir.Shape(shape)
            tensor = self._ir.LazyTensor(lambda: self._checked(name, kind, shape, load()), kind, dims, name=name)
            value = self._ir.Value(name=name, type=self._ir.TensorType(kind), shape=dims, const_value=tensor)
            self._initializers[name] = value
            self._names.add(name)
        return self._initializers[name]

    def add(
        self, op: str, *inputs: Any, domain: str = "", overload: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """Add a node and return its output, or the tuple of its outputs; an equal node that is there is used again."""
        given = [self.vector(i) if isinstance(i, (list, tuple)) else i for i in inputs]
        while given and given[-1] is None:
            given.pop()
        kept = {name: value for name, value in attributes.items() if value is not None}
        settings = tuple(sorted((k, _hashable(v)) for k, v in kept.items()))
        key = (domain, op, overload, outputs, tuple(map(id, given)), settings)
        if key not in self._made:
            if domain not in self._domains:
                if domain != CONTRIB:
                    raise Refused(f"{op} is of the domain {domain}, which was not declared")
                self.domain(CONTRIB, 1)
            node = self._ir.node(op, given, attributes=kept, domain=domain, overload=overload, num_outputs=outputs)
            self._provenance(node)
            self._nodes.append(node)
            self._made[key] = tuple(node.outputs)
        found = self._made[key]
        return found[0] if outputs == 1 else found

    def domain(self, name: str, version: int) -> None:
        """Declare the version of an operator domain; raises Refused if it is there with another one."""
        if self._domains.setdefault(name, version) != version:
            raise Refused(f"domain {name} is in use with version {self._domains[name]}, not {version}")

    def function(self, function: Any) -> None:
        """Add a model-local function, once for its domain, name and overload."""
        self._functions.setdefault(function.identifier(), function)

    def has_function(self, domain: str, name: str, overload: str = "") -> bool:
        """Return whether a model-local function has been added."""
        return (domain, name, overload) in self._functions

    def detour(self, runs_by: str, reason: str) -> None:
        """Record that the current call is run by something else than the kernel that was asked for, and why."""
        assert self._current is not None
        self._detours.append(Detour(_site(self._current), runs_by, reason))

    def computes(self, result: Any, calls: Sequence[fx.Node]) -> None:
        """Record that the node of a result stands for several calls."""
        result.producer().metadata_props[SITES] = json.dumps([_site(call) for call in calls])

    def cast(self, value: Any, dtype: torch.dtype, was: torch.dtype | None = None) -> Any:
        """Return a value cast to a dtype, or itself when it `was` of that one."""
        return value if was == dtype else self.add("Cast", value, to=int(onnx_dtype(dtype)))

    # Emission ----------------------------------------------------------------------------------------------------

    def bind(self, node: fx.Node, result: Result) -> None:
        """Say what a node's value is; a Value gets the node's name, type and dims unless it has a name already."""
        self._values[node] = result
        kind = node.meta.get(TYPE)
        if isinstance(kind, TensorType) and not isinstance(result, (Tensor, int)) and result.name is None:
            result.name = self._unique(node.name)
            self._named[node] = result
            result.type = self._ir.TensorType(onnx_dtype(kind.dtype))
            result.shape = self._dims(kind)

    def bound(self, node: fx.Node) -> bool:
        """Return whether a node has its value already."""
        return node in self._values

    def emit(self, node: fx.Node) -> None:
        """Emit one call by its table entry, or keep its result if that is constant; raises Refused."""
        folded = self._fold(node)
        if folded is not None:
            self._values[node] = folded
            return
        entry = self._table.get(node.target)
        if entry is None:
            raise Refused("the emitter has no entry for it")
        self.on_behalf(node, lambda e: e.bind(node, entry(e, node)))

    def on_behalf(self, node: fx.Node, emit: Callable[[Emitter], None]) -> None:
        """Let a function add nodes and bind values; the nodes carry the name and module path of this one."""
        self._current, first = node, len(self._nodes)
        emit(self)
        self._name_nodes(node, first)
        self._current = None

    def model(self) -> Any:
        """Return the `onnx_ir.Model` of what was emitted, its outputs under their published names."""
        outputs = [self._output(index, node) for index, node in enumerate(self.program.outputs)]
        graph = self._ir.Graph(
            [self._values[n] for n in self.program.inputs],
            outputs,
            nodes=self._nodes,
            initializers=[v for v in self._initializers.values() if v.uses()],
            opset_imports=self._domains,
            name=self.program.name,
        )
        return self._ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="nomul",
            functions=list(self._functions.values()),
            metadata_props=self._facts(),
        )

    def _facts(self) -> dict[str, str]:
        """Return what the file says about itself: how linears are run, and the sites that are run otherwise."""
        facts = {"nomul.mode": self.mode, "nomul.uniform": self.uniform}
        if self.uniform == "contrib":
            facts["nomul.accuracy_level"] = str(self.accuracy)
        return facts | {DETOURS: json.dumps([one.as_json() for one in self._detours])}

    def _result(self, arg: fx.Node) -> Result:
        if arg.op == "get_attr":
            name = self.program.params.resolve(str(arg.target))
            kind = self.program.params.type_of(name)
            dims = [int(d) for d in kind.dims]
            return self.initializer(name, dims, kind.dtype, lambda: self.program.params.get(name))
        return self._values[arg]

    def _folded(self, node: fx.Node, tensor: Tensor) -> Any:
        if tensor.nbytes <= 256:
            return self.constant(tensor)
        return self.initializer(self._same(node.name), tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def _fold(self, node: fx.Node) -> Result | None:
        """Return the value of a call on constants alone, if it is small; None for all others."""
        kind = node.meta.get(TYPE)
        if not isinstance(kind, TensorType) or not kind.static or kind.nbytes > FOLD_BYTES:
            return None
        sources = {n: self._known(n) for n in node.all_input_nodes}
        if any(value is None for value in sources.values()):
            return None
        with torch.no_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), sources.__getitem__)
            found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return found.contiguous()

    def _known(self, node: fx.Node) -> Tensor | int | None:
        if node.op == "get_attr":
            small = self.program.params.nbytes(str(node.target)) <= FOLD_BYTES
            return self.program.value(node) if small else None
        found = self._values.get(node)
        return found if isinstance(found, (Tensor, int)) else None

    def _output(self, index: int, node: fx.Node) -> Any:
        """Return the value of an output under its published name; one that has another name already gets a copy."""
        value, wanted = self.value(node), output_name(self.program, index)
        if self._named.pop(node, None) is value:
            value.name = wanted
            return value
        copy = self._ir.node("Identity", [value], name=self._unique(wanted, kind="node:")).outputs[0]
        self._nodes.append(copy.producer())
        copy.name, copy.type, copy.shape = wanted, value.type, value.shape
        return copy

    def _typed(self, name: str, node: fx.Node) -> Any:
        kind = node.meta[TYPE]
        dtype = self._ir.TensorType(onnx_dtype(kind.dtype))
        return self._ir.Value(name=self._unique(name), type=dtype, shape=self._dims(kind))

    def _dims(self, kind: TensorType) -> Any:
        return self._ir.Shape([d if isinstance(d, int) else dim_name(d) for d in kind.dims])

    def _checked(self, name: str, kind: Any, shape: Sequence[int], tensor: Tensor) -> Any:
        if tuple(tensor.shape) != tuple(shape) or onnx_dtype(tensor.dtype) != kind:
            raise AssertionError(f"initializer {name} is {tensor.dtype}{list(tensor.shape)}, not {kind}{list(shape)}")
        return self._ir.tensor_adapters.TorchTensor(tensor.detach().contiguous(), name=name)

    def _provenance(self, node: Any) -> None:
        if self._current is not None:
            node.metadata_props["nomul.node"] = self._current.name
            path = self._current.meta.get(PATH)
            if path:
                node.metadata_props["nomul.path"] = str(path)

    def _name_nodes(self, node: fx.Node, first: int) -> None:
        """Name the ONNX nodes made since `first`: the last one as the fx node, the others with their operator."""
        made = self._nodes[first:]
        for new in made[:-1]:
            new.name = self._unique(f"{node.name}.{new.op_type}", kind="node:")
        if made:
            made[-1].name = self._unique(node.name, kind="node:")

    def _unique(self, name: str, kind: str = "") -> str:
        candidate, serial = name, 1
        while kind + candidate in self._names:
            serial += 1
            candidate = f"{name}_{serial}"
        self._names.add(kind + candidate)
        return candidate

    def _same(self, name: str) -> str:
        """Return a name for a constant of this node, the same one in every call."""
        return name if name in self._initializers else self._unique(name)


def _site(node: fx.Node) -> str:
    return str(node.meta.get(PATH) or node.name)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
