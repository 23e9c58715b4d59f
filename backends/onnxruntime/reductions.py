"""Sums along dims, softmax and norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from backends.onnxruntime.elementwise import operand
from backends.onnxruntime.emitter import Emitter, Entry, Result
from backends.onnxruntime.shapes import rank_of
from ir.program import tensor_type_of

aten = torch.ops.aten


def _reduce(op: str) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        args = e.args(node)
        whole = node.target._overloadname == "default" and op in ("ReduceSum", "ReduceMean")  # type: ignore[union-attr]
        dims = None if whole else args[1]
        keep = False if whole else args[2]
        x = args[0]
        axes = list(range(rank_of(x))) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
        found = operand(e, x, tensor_type_of(node).dtype)
        return e.add(op, found, [d % rank_of(x) for d in axes], keepdims=int(keep))

    return emit


def _truth(op: str) -> Entry:
    """Return an entry for `any` (ReduceMax) or `all` (ReduceMin)."""

    def emit(e: Emitter, node: fx.Node) -> Result:
        x, *rest = e.args(node)
        dims = [rest[0] % rank_of(x)] if rest else list(range(rank_of(x)))
        keep = int(rest[1]) if rest else 0
        numbers = e.cast(operand(e, x, torch.bool), torch.int32, torch.bool)
        return e.cast(e.add(op, numbers, dims, keepdims=keep), torch.bool)

    return emit


def _softmax(op: str) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        x, dim, *_ = e.args(node)
        return e.add(op, operand(e, x, tensor_type_of(node).dtype), axis=dim % rank_of(x))

    return emit


def _logsumexp(e: Emitter, node: fx.Node) -> Result:
    x, dims, keep = e.args(node)
    return e.add("ReduceLogSumExp", e.value(x), [d % rank_of(x) for d in dims], keepdims=int(keep))


def ones(e: Emitter, shape: Any, dtype: torch.dtype) -> Any:
    """Return a gain of ones, which ONNX's norms want where ours have none."""
    return e.constant(torch.ones([int(s) for s in shape], dtype=dtype))


def epsilon_of(eps: float | None, dtype: torch.dtype) -> float:
    """Return the number a norm adds, torch's default being the dtype's smallest step."""
    return float(torch.finfo(dtype).eps if eps is None else eps)


def _rms_norm(e: Emitter, node: fx.Node) -> Result:
    x, shape, gain, eps = e.args(node)
    dtype = tensor_type_of(node).dtype
    eps, first = epsilon_of(eps, dtype), rank_of(x) - len(shape)
    if e.fuse and e.opset >= 23:
        weight = ones(e, shape, dtype) if gain is None else e.value(gain)
        return e.add("RMSNormalization", e.value(x), weight, axis=first, epsilon=eps)
    value = e.value(x)
    mean = e.add("ReduceMean", e.add("Mul", value, value), list(range(first, rank_of(x))), keepdims=1)
    found = e.add("Div", value, e.add("Sqrt", e.add("Add", mean, e.scalar(eps, dtype))))
    return found if gain is None else e.add("Mul", found, e.value(gain))


def _layer_norm(e: Emitter, node: fx.Node) -> Result:
    x, shape, gain, shift, eps, *_ = e.args(node)
    dtype = tensor_type_of(node).dtype
    weight = ones(e, shape, dtype) if gain is None else e.value(gain)
    bias = None if shift is None else e.value(shift)
    return e.add("LayerNormalization", e.value(x), weight, bias, axis=rank_of(x) - len(shape), epsilon=float(eps))


TABLE: dict[Any, Entry] = {
    **dict.fromkeys((aten.sum.dim_IntList, aten.sum.default), _reduce("ReduceSum")),
    **dict.fromkeys((aten.mean.dim, aten.mean.default), _reduce("ReduceMean")),
    aten.amax.default: _reduce("ReduceMax"),
    aten.amin.default: _reduce("ReduceMin"),
    aten.prod.dim_int: _reduce("ReduceProd"),
    **dict.fromkeys((aten.any.default, aten.any.dim), _truth("ReduceMax")),
    **dict.fromkeys((aten.all.default, aten.all.dim), _truth("ReduceMin")),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default), _softmax("Softmax")),
    **dict.fromkeys((aten.log_softmax.int, aten._log_softmax.default), _softmax("LogSoftmax")),
    aten.logsumexp.default: _logsumexp,
    aten.rms_norm.default: _rms_norm,
    aten.layer_norm.default: _layer_norm,
}
