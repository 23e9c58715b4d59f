"""An ONNX model as a Program: its graph run once by `torch.export`, with its weights where they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import onnx_ir as onnx
import torch
from torch import nn

import ir.ops  # noqa: F401  (registers nomul.quant_linear)
from frontend.exported import import_exported
from frontend.onnx.caches import positions_of, settle_caches
from frontend.onnx.decoded import decode_weights
from frontend.onnx.dtypes import torch_dtype
from frontend.onnx.interface import (
    IDS,
    MASK,
    POSITIONS,
    is_language_model,
    lead_with_tokens,
    look_up_as_given,
    name_language_model,
)
from frontend.onnx.interpreter import Env, Interpreter, fold
from frontend.onnx.module import GraphModule
from frontend.onnx.tensors import OnnxSource, tensor_of
from frontend.onnx.values import known_ints
from ir.errors import NomulError, UnsupportedError
from ir.params import Entry
from ir.program import PATH, Program, rename

# Initializers of more entries are weights: they are named, and read from their file when a pass asks for them. Scales
# and zero points of codes are not, since the codes that are made of them depend on their values.
_WEIGHT = 8
# Sizes that stand for symbolic dims while tracing: distinct, and large enough for windows that slide over them.
_SAMPLES = (7, 11, 13, 17, 19, 23, 29, 31)
# Entries that no input has; a declared shape beyond is damage.
_MOST_ENTRIES = 1 << 31
# Tokens and what a cache holds of earlier ones, whose sum is how long a mask is.
_SEQ, _PAST = 5, 3


def trace(model: onnx.Model, name: str, known: Mapping[str, Any] | None = None) -> Program:
    """Return a model's graph as a raw Program; weights are bound to the model's own tensors.

    known: inputs whose values are fixed, by name, which the program then does not have: tensors, lists of these for
    sequences, or None for an absent option. Caches and codes of the model are settled in place. Raises Refused by the
    name of the node that cannot be taken, Unknown for one that needs a value from data.
    """
    graph = model.graph
    settle_caches(graph)
    decode_weights(graph)
    module, stored = _module(model, known or {})
    example, dims, names = _examples(module.inputs)
    # The exporter takes no module without inputs that has constants.
    exported = _exported(module, example or (torch.zeros(1),), dims or ({},), name)
    program = import_exported(exported, name, "", _symbols(exported, module.inputs, names), {})
    _bind(program, {module.paths[n]: t for n, t in stored.items()})
    for node in program.inputs[len(module.inputs) :]:
        program.graph.erase_node(node)
    for node, value in zip(program.inputs, module.inputs, strict=True):
        rename(node, identifier(str(value.name)))
        node.target = node.name
    _tell_scopes(program, module.scopes)
    outputs = [str(v.name) for v in graph.outputs]
    if is_language_model(program, outputs):
        name_language_model(program, outputs)
    else:
        lead_with_tokens(program)
        lengths = _lengths(exported, outputs)
        program.attributes = {"outputs": outputs, **({"sequences": lengths} if lengths else {})}
    program.attributes = {**program.attributes, **_origin(model)}
    look_up_as_given(program)
    if next(program.calls(torch.ops.nomul.quant_linear.default), None) is not None:
        program.level = "compressed"
    return program


def _origin(model: onnx.Model) -> dict[str, Any]:
    """Return who wrote a model, and what its writer noted on it."""
    producer = " ".join(text for text in (model.producer_name, model.producer_version) if text)
    noted = {str(key): str(value) for key, value in sorted(model.metadata_props.items())}
    return {**({"producer": producer} if producer else {}), **({"metadata": noted} if noted else {})}


def _module(model: onnx.Model, known: Mapping[str, Any]) -> tuple[GraphModule, dict[str, Any]]:
    """Return a graph as a module, and the stored tensors of its weights by name of their initializers."""
    graph, run = model.graph, Interpreter(model)
    tensors = {v.name: v.const_value for v in graph.initializers.values() if v.const_value is not None}
    read = {v.name for node in graph if node.op_type == "MatMulNBits" for v in node.inputs[2:4] if v is not None}
    weights = {str(n): t for n, t in tensors.items() if is_weight(t) and n not in read}
    env: Env = _small(graph, weights)
    env |= {v: _constant(known[str(v.name)]) for v in graph.inputs if v.name in known}
    folded = fold(run, graph, env)
    positions = None if POSITIONS in known else positions_of(graph)
    given = {*known, *graph.initializers, *([] if positions is None else [POSITIONS])}
    inputs = [v for v in graph.inputs if v.name not in given]
    return GraphModule(run, graph, env, folded, inputs, weights, positions), weights


def _bind(program: Program, stored: dict[str, Any]) -> None:
    """Enter the tensors of a model, by path, for the weights that a program has."""
    source = OnnxSource(stored)
    for path in [p for p in source.names() if p in program.params]:
        program.params.enter(path, Entry(source, path, source.type_of(path)))


def _tell_scopes(program: Program, scopes: Mapping[str, str]) -> None:
    """Give calls the path of the module that their node came from, where the model tells."""
    for node in program.graph.nodes:
        path = str(node.meta.get(PATH, ""))
        if path in scopes:
            node.meta[PATH] = scopes[path]


def _small(graph: onnx.Graph, weights: Mapping[str, Any]) -> Env:
    """Return the initializers that are no weights."""
    chosen = [v for v in graph.initializers.values() if v.const_value is not None and v.name not in weights]
    return {v: known_ints(t) or t for v in chosen for t in [tensor_of(v.const_value)]}


def _constant(value: Any) -> Any:
    """Return a tensor of few whole numbers as these, and other tensors, sequences of them and None as they are."""
    if isinstance(value, list):
        return [_constant(v) for v in value]
    return value if value is None else known_ints(value) or value


def is_weight(stored: Any) -> bool:
    """Return whether an initializer is read from its file when a pass asks for it, not while tracing."""
    dtype = torch_dtype(int(stored.dtype))
    return dtype is not None and dtype.is_floating_point and int(stored.size) > _WEIGHT


def identifier(text: str) -> str:
    found = re.sub(r"\W", "_", text)
    return found if found and not found[0].isdigit() else f"_{found}"


def _examples(inputs: list[onnx.Value]) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, list[str | None]]]:
    """Return sample tensors, their dynamic dims, and the declared names of these."""
    from torch.export import Dim

    sizes: dict[str, int] = {}
    example, dims, names = [], [], {}
    for value in inputs:
        dtype = None if value.dtype is None else torch_dtype(int(value.dtype))
        if dtype is None or value.shape is None:
            raise UnsupportedError(
                f"the input {value.name} cannot be taken",
                where=str(value.name),
                why=f"its type is {value.type} and its shape {value.shape}",
                fix="declare a tensor type with a rank",
            )
        own, shape, dynamic = list[str | None](), list[int](), dict[int, Any]()
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                own.append(None)
                shape.append(dim)
                continue
            label = str(dim.value) if dim.value is not None else f"{value.name}_{axis}"
            own.append(label)
            shape.append(_sample(label, str(value.name), sizes))
            dynamic[axis] = Dim.AUTO
        if prod(shape) > _MOST_ENTRIES:
            why = f"it is {list(value.shape)}"
            raise UnsupportedError("an input has a shape that no tensor has", where=str(value.name), why=why)
        names[str(value.name)] = own
        example.append(torch.zeros(shape, dtype=dtype) if dtype != torch.bool else torch.ones(shape, dtype=dtype))
        dims.append(dynamic)
    return tuple(example), tuple(dims), names


def _sample(label: str, name: str, sizes: dict[str, int]) -> int:
    """Return the size of a symbolic dim in the sample; a sum of others is their sum, as is a mask's of past and new."""
    terms = [part.strip() for part in label.split("+")]
    if label not in sizes and len(terms) > 1:
        sizes[label] = sum(_sample(term, "", sizes) for term in terms)
    if label not in sizes and (name == MASK or label.startswith("total")):
        sizes[label] = _SEQ + _PAST
    if label not in sizes:
        fixed = {"past": _PAST, "seq": _SEQ} if name in (IDS, MASK) or "past" in label or "seq" in label else {}
        known = next((size for word, size in fixed.items() if word in label), None)
        free = [n for n in _SAMPLES if n not in sizes.values() and n not in (_SEQ, _PAST)]
        sizes[label] = known or (free[0] if free else _SAMPLES[-1])
    return sizes[label]


def _lengths(exported: Any, outputs: list[str]) -> dict[str, int]:
    """Return how many tensors the outputs have that are sequences."""
    specs = exported.call_spec.out_spec.children()
    return {name: spec.num_leaves for name, spec in zip(outputs, specs, strict=True) if spec.type is list}


def _exported(module: nn.Module, example: tuple[Any, ...], dims: tuple[Any, ...], name: str) -> Any:
    from torch.export import export

    try:
        with torch.no_grad():
            return export(module.eval(), example, dynamic_shapes=(dims,), strict=False)
    except NomulError:
        raise
    # The exporter lets through whatever running the graph raises, which may be anything.
    except Exception as error:
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), "no message")
        raise UnsupportedError(
            "the model cannot be traced", where=name, why=f"{type(error).__name__}: {line[:300]}"
        ) from error


def _symbols(exported: Any, inputs: list[onnx.Value], names: Mapping[str, list[str | None]]) -> dict[str, str]:
    """Return exporter symbol -> the name that the model declares; raises UnsupportedError for a size that was fixed."""
    found: dict[str, str] = {}
    values = [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"][-len(inputs) :] if inputs else []
    for value, given in zip(inputs, values, strict=True):
        for label, size in zip(names[str(value.name)], given.shape, strict=True):
            expr = getattr(getattr(size, "node", None), "expr", None)
            if label is not None and isinstance(size, int):
                raise UnsupportedError(
                    f"the size {label} of input {value.name} cannot stay open",
                    where=str(value.name),
                    why="an operator on the way needs to know it",
                    fix="export the model with a fixed size there",
                )
            if label is not None and expr is not None and expr.is_Symbol:
                found.setdefault(str(expr), identifier(label))
    return found
