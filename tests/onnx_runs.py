"""Small functions as programs with dynamic dims, and programs through ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from backends.onnxruntime.lowering import DEFAULT_OPSET, MODEL_FILE, emit_program, write_model
from backends.onnxruntime.names import input_name
from ir.params import MemorySource, ParamStore
from ir.program import TYPE, Program
from ir.types import ScalarType, TensorType, ValueType

# Sizes that say which dim they are of: types are read off one run with them.
_PROBE = {"batch": 7, "seq": 11, "past": 13, "past+seq": 24, "batch*seq": 77, "2*batch": 14, "2*batch*seq": 154}
_NAMES = {size: name for name, size in _PROBE.items()}
SIZES = [(1, 1, 0), (1, 3, 0), (3, 2, 5)]


def function_program(
    function: Callable[..., Any] | fx.Graph, inputs: dict[str, TensorType], params: dict[str, Tensor] | None = None
) -> Program:
    """Return a function of ATen calls, one operator or a graph as a program; arguments in `params` are no inputs."""
    graph = _graph(function, list(inputs))
    params = params or {}
    values: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            name = str(node.target)
            values[node] = params[name] if name in params else sample(inputs[name], 0, probe=True)
            node.meta[TYPE] = _type(values[node]) if name in params else inputs[name]
            if name in params:
                node.op = "get_attr"
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            node.target = getattr(node.target, "default", node.target)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            node.meta[TYPE] = _type(values[node])
    store = ParamStore()
    store.add_source(MemorySource(params))
    result = graph.output_node().args[0]
    graph.output_node().args = (tuple(result) if isinstance(result, (list, tuple)) else (result,),)
    return Program(graph, store, name="function", symbols=("batch", "seq", "past"))


def _graph(function: Callable[..., Any] | fx.Graph, names: list[str]) -> fx.Graph:
    if isinstance(function, fx.Graph):
        return function
    if not isinstance(function, torch._ops.OpOverload):
        return fx.Tracer().trace(function)
    graph = fx.Graph()
    graph.output(graph.call_function(function, tuple(graph.placeholder(n) for n in names)))
    return graph


def _type(value: Any) -> ValueType:
    if isinstance(value, Tensor):
        return TensorType(value.dtype, tuple(_NAMES.get(d, d) for d in value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(map(_type, value))
    return ScalarType("int", str(_NAMES.get(value, value)))


def sample(kind: TensorType, seed: int, sizes: tuple[int, int, int] = (1, 1, 0), probe: bool = False) -> Tensor:
    """Return seeded values of a type: small numbers, for sizes (batch, seq, past)."""
    batch, seq, past = sizes
    known = _PROBE if probe else {"batch": batch, "seq": seq, "past": past, "past+seq": past + seq}
    dims = [d if isinstance(d, int) else known[d] for d in kind.dims]
    generator = torch.Generator().manual_seed(seed)
    if kind.dtype == torch.bool:
        return torch.rand(dims, generator=generator) < 0.6
    if kind.dtype.is_floating_point:
        return torch.randn(dims, generator=generator, dtype=torch.float32).to(kind.dtype)
    return torch.randint(0, 4, dims, generator=generator, dtype=kind.dtype)


def onnx_outputs(
    program: Program, inputs: Sequence[Tensor], folder: Path, opset: int = DEFAULT_OPSET, fuse: bool = True
) -> list[Tensor]:
    """Return what ONNX Runtime computes for a program, written into an existing folder."""
    model = emit_program(program, opset, fuse)
    write_model(model, folder)
    return session_outputs(program, inputs, folder)


def session_outputs(
    program: Program, inputs: Sequence[Tensor], folder: Path, library: Path | None = None
) -> list[Tensor]:
    """Return what the model in a folder gives for inputs, with a library of operators or without."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    names = [input_name(program, i) for i in range(len(program.inputs))]
    read = {i.name for i in session.get_inputs()}
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True) if name in read}
    return [torch.from_numpy(found) for found in session.run(None, feeds)]
