"""Over axes: sums, extremes and norms, where the extremes stand, the largest few, and which entries are not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frontend.onnx.arguments import axis_of, size_of, sizes_of
from frontend.onnx.call import Call
from frontend.onnx.operators.products import as_type
from frontend.onnx.registry import operator
from frontend.onnx.values import as_tensor

# From entries, axes and whether these stay as 1, to what is left; and what the same does to entries one by one.
_Over = Callable[[Tensor, list[int], bool], Tensor]
_Alone = Callable[[Tensor], Tensor]

_WIDE = (torch.uint16, torch.uint32, torch.uint64)
_HALF = (torch.float16, torch.bfloat16)
_TOP_BIT = torch.iinfo(torch.int64).min


def _same(x: Tensor) -> Tensor:
    return x


def _ordered(x: Tensor) -> tuple[Tensor, _Alone]:
    """Return entries of types that torch does not compare as whole numbers of the same order, and the way back."""
    if x.dtype == torch.uint64:
        return x.view(torch.int64) ^ _TOP_BIT, lambda y: (y ^ _TOP_BIT).view(torch.uint64)
    if x.dtype in _WIDE:
        return x.to(torch.int64), lambda y: y.to(x.dtype)
    return x, _same


def _as_real(function: _Alone) -> _Alone:
    """Let a function of real numbers take whole ones, and cut what it gives."""
    return lambda x: function(x) if x.is_floating_point() else function(x.to(torch.float64)).to(x.dtype)


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, dims, keepdim=keep)
    count = 1
    for d in dims:
        count *= x.shape[d]
    return torch.div(torch.sum(x, dims, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for d in sorted(dims, reverse=True):
        x = torch.prod(x, d, keepdim=keep, dtype=x.dtype)
    return x


def _l2(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        norm: Tensor = torch.linalg.vector_norm(x, 2, dims, keep)
        return norm
    return _as_real(torch.sqrt)(_sum(x * x, dims, keep))


def _log_sum_exp(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if not x.is_floating_point():
        raise TypeError("it has no meaning for whole numbers")
    wide = x.float() if x.dtype in _HALF else x
    return as_type(torch.logsumexp(wide, dims, keepdim=keep), x.dtype)


_REDUCTIONS: dict[str, tuple[_Over, _Alone]] = {
    "ReduceSum": (_sum, _same),
    "ReduceMean": (_mean, _same),
    "ReduceProd": (_prod, _same),
    "ReduceL1": (lambda x, dims, keep: _sum(torch.abs(x), dims, keep), torch.abs),
    "ReduceL2": (_l2, torch.abs),
    "ReduceLogSum": (lambda x, dims, keep: _as_real(torch.log)(_sum(x, dims, keep)), _as_real(torch.log)),
    "ReduceLogSumExp": (_log_sum_exp, _same),
    "ReduceSumSquare": (lambda x, dims, keep: _sum(x * x, dims, keep), torch.square),
}
# Of these, the last 64 bits of a sum do not tell the result.
_NOT_MODULAR = ("ReduceMean", "ReduceL2", "ReduceLogSum")


def _dims(call: Call, x: Tensor, axes: Any) -> list[int]:
    """Return the axes to reduce, from an input or, in older versions, an attribute; none given means all, or none."""
    found = (call.integers("axes") or []) if axes is None else sizes_of(call, axes, "its axes")
    if not found and not call.flag("noop_with_empty_axes"):
        return list(range(x.ndim))
    return [axis_of(a, x.ndim) for a in found]


def _enter_all() -> None:
    def reduction(over: _Over, alone: _Alone) -> Any:
        def rule(call: Call, data: Any, axes: Any = None) -> Tensor:
            given = as_tensor(data)
            if given.dtype == torch.uint64 and call.op in _NOT_MODULAR:
                raise call.refuse("it has no such arithmetic for uint64")
            x = given.to(torch.int64) if given.dtype in _WIDE else given
            dims = _dims(call, x, axes)
            found = over(x, dims, call.flag("keepdims", True)) if dims else alone(x)
            return as_type(found, given.dtype)

        return rule

    for name, (over, alone) in _REDUCTIONS.items():
        operator(name, raw=True)(reduction(over, alone))


_enter_all()


@operator("ReduceMax", "ReduceMin", raw=True)
def _extreme(call: Call, data: Any, axes: Any = None) -> Tensor:
    """The largest or smallest entries; of no entries, the end of the type's range that any other would replace."""
    given: Tensor = as_tensor(data)
    largest = call.op == "ReduceMax"
    dims, keep = _dims(call, given, axes), call.flag("keepdims", True)
    if not dims:
        return given
    # An unknown size is taken as one above 0, as the exporter does.
    if any(isinstance(given.shape[d], int) and given.shape[d] == 0 for d in dims):
        return given.new_full(_left(given, dims, keep), _end(given.dtype, lowest=largest))
    x, back = _ordered(given)
    return back((torch.amax if largest else torch.amin)(x, dims, keepdim=keep))


def _left(x: Tensor, dims: list[int], keep: bool) -> list[Any]:
    """Return the shape after a reduction."""
    shape = [1 if d in dims else size for d, size in enumerate(x.shape)]
    return shape if keep else [size for d, size in enumerate(shape) if d not in dims]


def _end(dtype: torch.dtype, lowest: bool) -> Any:
    """Return the lowest or highest value of a type."""
    if dtype == torch.bool:
        return not lowest
    if dtype.is_floating_point:
        return float("-inf") if lowest else float("inf")
    range_ = torch.iinfo(dtype)
    return range_.min if lowest else range_.max


@operator("ArgMax", "ArgMin")
def _arg_extreme(call: Call, data: Tensor) -> Tensor:
    """The first of equal entries, as torch has it too, or the last."""
    x, _ = _ordered(data)
    axis, keep = call.integer("axis", 0), call.flag("keepdims", True)
    find = torch.argmax if call.op == "ArgMax" else torch.argmin
    if not call.flag("select_last_index"):
        return find(x, axis, keep)
    return x.shape[axis] - 1 - find(torch.flip(x, [axis]), axis, keep)


@operator("TopK", raw=True)
def _top_k(call: Call, data: Any, k: Any = None) -> tuple[Tensor, Tensor]:
    """A stable sort, cut: of equal entries the earlier comes first, which torch.topk does not promise."""
    x, back = _ordered(as_tensor(data))
    count = call.integer("k", -1) if k is None else size_of(call, k, "the number of entries it keeps")
    axis = call.integer("axis", -1)
    values, places = torch.sort(x, dim=axis, descending=call.flag("largest", True), stable=True)
    return back(values.narrow(axis, 0, count)), places.narrow(axis, 0, count)


@operator("NonZero")
def _non_zero(call: Call, x: Tensor) -> Tensor:
    """Places as columns; data decides how many there are."""
    return torch.nonzero(x != 0).t()


@operator("Unique")
def _unique(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    """Different entries or slices, where each comes first, which of them stands where, and how often."""
    axis = call.get("axis")
    if axis is None:
        x = x.reshape(-1)
    dim = 0 if axis is None else axis_of(int(axis), x.ndim)
    found, inverse, counts = torch.unique(x, dim=dim, return_inverse=True, return_counts=True)
    places = torch.arange(x.shape[dim])
    first = torch.full_like(counts, torch.iinfo(torch.int64).max).scatter_reduce(0, inverse, places, "amin")
    if call.flag("sorted", True):
        return found, first, inverse, counts
    order = torch.argsort(first)
    moved = torch.argsort(order)[inverse]
    return found.index_select(dim, order), first[order], moved, counts[order]
