"""Linears as ONNX Runtime runs them: one operator a node, several layers that share one input, results bound."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.native.build import built_library
from backends.native.layout import Layout, Packed, pack
from backends.native.library import MODES
from ir.errors import UnsupportedError
from ir.ops.codes import group_count
from ir.ops.shiftcode import ShiftCodes, encode
from passes.memory import give_back_memory

OPSET, IR_VERSION = 21, 10
CONTRIB, OWN = "com.microsoft", "nomul"
# Threads of a session that has nothing to do spin for tens of milliseconds by default, which would be the next one's.
SPIN_MICROSECONDS, SPIN_OVER = 200, 0.003
_STRIP = 256


@dataclass(frozen=True, eq=False)
class LinearOp:
    """A linear [rows, inputs] as an operator: constants by input, in order after x, and attributes."""

    op: str
    domain: str
    rows: int
    inputs: int
    constants: tuple[np.ndarray[Any, Any], ...]
    attributes: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight."""
        return sum(c.nbytes for c in self.constants)


def block_of(inputs: int, most: int = 128) -> int:
    """Return the greatest power of two up to `most` that divides a width, at least 16 for operators that need it."""
    return max(16, min(most, inputs & -inputs))


def float_op(rows: int, inputs: int) -> LinearOp:
    """Return `MatMul` on a float32 weight."""
    weight = np.random.default_rng(0).standard_normal((inputs, rows), dtype=np.float32)
    return LinearOp("MatMul", "", rows, inputs, (weight,), {})


def nbits_op(rows: int, inputs: int, bits: int, level: int) -> LinearOp:
    """Return `MatMulNBits` at an accuracy level (0: float activations, 4: 8-bit ones), without zero points."""
    block = block_of(inputs)
    blocks, generator = group_count(inputs, block), np.random.default_rng(0)
    codes = generator.integers(0, 256, (rows, blocks, block * bits // 8), dtype=np.uint8)
    scales = generator.uniform(0.01, 0.02, rows * blocks).astype(np.float32)
    attributes = {"K": inputs, "N": rows, "bits": bits, "block_size": block, "accuracy_level": level}
    return LinearOp("MatMulNBits", CONTRIB, rows, inputs, (codes, scales), attributes)


def tiled_op(weight: Packed, mode: str) -> LinearOp:
    """Return our operator on a packed weight; mode: one of `backends.native.library.MODES`."""
    layout = weight.layout
    attributes = {**layout.attributes(), "mode": MODES[mode]}
    return LinearOp("TiledLinear", OWN, layout.rows, layout.inputs, (weight.data.numpy(),), attributes)


def random_codes(rows: int, inputs: int, planes: int) -> ShiftCodes:
    """Return seeded sign planes with scales of two powers of two and an offset, as the compiler makes them."""
    generator, group = torch.Generator().manual_seed(planes), block_of(inputs)
    groups = group_count(inputs, group)
    signs = torch.rand(planes, rows, inputs, generator=generator) < 0.5
    alpha = (0.5 + torch.rand(rows, groups, planes, generator=generator)) * 0.02 * 0.5 ** torch.arange(planes)
    offset = torch.randn(rows, groups, generator=generator) * 0.002
    return encode(signs, alpha, offset, group, 2)


def random_weight(rows: int, inputs: int, planes: int) -> Packed:
    """Return a packed weight; past its first rows it repeats them, which takes a fraction of the time to make."""
    strip = pack(random_codes(min(rows, _STRIP), inputs, planes))
    fields = {**strip.layout.attributes(), "rows": rows}
    layout = Layout(**fields)
    tiles = strip.data.view(strip.layout.tiles, -1)
    return Packed(tiles[torch.arange(layout.tiles) % strip.layout.tiles].flatten(), layout)


class Layers:
    """A session with copies of one linear, each with memory of its own, that read one input and write one output.

    Raises UnsupportedError when the runtime refuses the operator.
    """

    def __init__(self, op: LinearOp, layers: int, threads: int) -> None:
        self.op, self.layers = op, layers
        self._session = _session(_model(op, layers), threads)
        give_back_memory()

    def bound(self, x: Tensor, out: Tensor) -> Callable[[int], None]:
        """Return what runs all layers n times on x [tokens, inputs] into out [tokens, rows]."""
        binding = self._session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
        for layer in range(self.layers):
            binding.bind_output(f"y{layer}", "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())
        return partial(_times, self._session.run_with_iobinding, binding, (x, out))


def chain(op: str, length: int, width: int, linear: LinearOp | None = None) -> Callable[[int], None]:
    """Return what runs a chain of nodes on [1, width] n times: an elementwise operator, or a square linear."""
    import onnx_ir as ir

    dims = 1, width
    last = x = _value("x", dims)
    weights = _initializers(linear, "w") if linear else []
    name, domain, attributes = (linear.op, linear.domain, linear.attributes) if linear else (op, "", {})
    nodes = []
    for index in range(length):
        nodes.append(_named(ir.node(name, [last, *weights], attributes=attributes, domain=domain), f"y{index}", dims))
        last = nodes[-1].outputs[0]
    session = _session(_serialized([x], nodes, [last], weights), 1)
    held, out = torch.ones(dims), torch.empty(dims)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, dims, held.data_ptr())
    binding.bind_output(last.name, "cpu", 0, np.float32, dims, out.data_ptr())
    return partial(_times, session.run_with_iobinding, binding, (held, out))


def _times(run: Callable[[Any], None], binding: Any, held: tuple[Tensor, Tensor], count: int) -> None:
    """Run a binding n times; held: the memory it points to, which must outlive it."""
    for _ in range(count):
        run(binding)


def _model(op: LinearOp, layers: int) -> bytes:
    import onnx_ir as ir

    x = _value("x", ("tokens", op.inputs))
    nodes, weights = [], []
    for layer in range(layers):
        own = _initializers(op, f"w{layer}", layer)
        node = ir.node(op.op, [x, *own], attributes=op.attributes, domain=op.domain)
        nodes.append(_named(node, f"y{layer}", ("tokens", op.rows)))
        weights += own
    return _serialized([x], nodes, [n.outputs[0] for n in nodes], weights)


def _initializers(op: LinearOp, name: str, index: int = 0) -> list[Any]:
    import onnx_ir as ir

    # The runtime keeps what it makes of equal constants once, so that equal copies would not be cold.
    arrays = (_marked(op.constants[0], index), *op.constants[1:])
    tensors = [ir.tensor(c, name=f"{name}_{i}") for i, c in enumerate(arrays)]
    return [ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=t.shape, const_value=t) for t in tensors]


def _marked(array: np.ndarray[Any, Any], index: int) -> np.ndarray[Any, Any]:
    """Return an array that ends in a number of its own; number 0 is the array as it is."""
    if not index:
        return array
    made = array.copy()
    made.reshape(-1).view(np.uint8)[-4:] = np.array([index], np.float32).view(np.uint8)
    return made


def _value(name: str, dims: tuple[int | str, ...]) -> Any:
    import onnx_ir as ir

    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))


def _named(node: Any, name: str, dims: tuple[int | str, ...]) -> Any:
    import onnx_ir as ir

    out = node.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
    return node


def _serialized(inputs: list[Any], nodes: list[Any], outputs: list[Any], weights: list[Any]) -> bytes:
    import onnx_ir as ir

    opsets = {"": OPSET, CONTRIB: 1, OWN: 1}
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports=opsets, name="bench")
    made: bytes = ir.serde.serialize_model(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return made


def _session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Nothing is to be gained by rewriting single nodes, and chains of them are to stay as they are.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    # Weights outside the arena: what packing leaves behind goes back to the system.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.register_custom_ops_library(str(built_library()))
    try:
        # Given bytes, a session would keep them beside what it reads from them.
        with tempfile.TemporaryDirectory(prefix="nomul-bench-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(model)
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # The runtime's exceptions have no common base of their own.
    except Exception as error:
        lines = str(error).splitlines()
        raise UnsupportedError("ONNX Runtime refuses a linear", why=lines[0] if lines else repr(error)) from error
