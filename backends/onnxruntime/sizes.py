"""Sizes and arithmetic on them: int64 [1] values in the graph, ints where they are known."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from backends.onnxruntime.emitter import Emitter, Entry, Refused, Result
from ir.program import TYPE, tensor_type_of
from ir.types import ScalarType

aten = torch.ops.aten


def _size(e: Emitter, node: fx.Node) -> Result:
    x, dim = e.args(node)
    known = _known(node)
    if known is not None:
        return known
    dims = x.meta[TYPE].dims
    dim = dim % len(dims)
    of_input = e.dim(dims[dim]) if isinstance(dims[dim], str) else None
    if of_input is not None:
        return of_input
    return e.add("Shape", e.value(x), start=dim, end=dim + 1)


def _known(node: fx.Node) -> int | None:
    kind = node.meta[TYPE]
    return int(kind.expr) if isinstance(kind, ScalarType) and kind.expr.lstrip("-").isdecimal() else None


def _arithmetic(op: str, function: Callable[[Any, Any], Any]) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        kind = node.meta[TYPE]
        if not isinstance(kind, ScalarType) or kind.kind != "int":
            raise Refused("sizes are whole numbers in ONNX graphs")
        known = _known(node)
        a, b = (e.size(arg) for arg in node.args)
        if known is not None:
            return known
        if isinstance(a, int) and isinstance(b, int):
            return int(function(a, b))
        of_input = e.dim(kind.expr)
        if of_input is not None:  # past + seq is the length of the mask
            return of_input
        return e.add(op, e.shape([a]), e.shape([b]))

    return emit


def _floor_divide(e: Emitter, node: fx.Node) -> Result:
    # Sizes are not negative, so that truncation is the floor.
    return _arithmetic("Div", operator.floordiv)(e, node)


def _negative(e: Emitter, node: fx.Node) -> Result:
    found = e.size(node.args[0])
    return -found if isinstance(found, int) else e.add("Neg", found)


def _item(e: Emitter, node: fx.Node) -> Result:
    """Take one result of an operator with several."""
    source, index = node.args
    return e.results(source)[index]  # type: ignore[arg-type, index]


def _as_tensor(e: Emitter, node: fx.Node) -> Result:
    """Emit a size as a tensor without dims."""
    if not isinstance(node.args[0], fx.Node):
        raise Refused("it is a constant, which has a place among the parameters")
    found = e.add("Squeeze", e.shape([e.size(node.args[0])]), [0])
    return e.cast(found, tensor_type_of(node).dtype, torch.int64)


TABLE: dict[Any, Entry] = {
    aten.scalar_tensor.default: _as_tensor,
    aten.sym_size.int: _size,
    operator.add: _arithmetic("Add", operator.add),
    operator.sub: _arithmetic("Sub", operator.sub),
    operator.mul: _arithmetic("Mul", operator.mul),
    operator.floordiv: _floor_divide,
    operator.mod: _arithmetic("Mod", operator.mod),
    operator.neg: _negative,
    torch.sym_max: _arithmetic("Max", max),
    torch.sym_min: _arithmetic("Min", min),
    operator.getitem: _item,
}
