"""Reading and writing at indices: gathers, scatters, one-hot rows and the parts that a condition picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frontend.onnx.arguments import axis_of, constant_of
from frontend.onnx.call import Call
from frontend.onnx.operators.products import as_type
from frontend.onnx.registry import operator
from frontend.onnx.values import Ints, as_tensor

# Types that torch moves only as the signed ones of their width.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _moved(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """Return what a function that only moves entries makes of tensors of one type."""
    signed = _SIGNED.get(given[0].dtype)
    return function(*given) if signed is None else function(*(x.view(signed) for x in given)).view(given[0].dtype)


def _computed(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """Return what a function that adds, multiplies or compares entries makes of tensors of one type."""
    if given[0].dtype not in _SIGNED:
        return function(*given)
    return function(*(x.to(torch.int64) for x in given)).to(given[0].dtype)


def _from_front(index: Any, size: Any) -> Tensor:
    """Return indices counted from the front, as int64; those known by now to be such stay as they are."""
    if isinstance(index, Ints) and all(isinstance(i, int) for i in index.values):
        return Ints(tuple(i + size if i < 0 else i for i in index.values), index.rank).tensor()
    tensor: Tensor = as_tensor(index)
    constant = constant_of(tensor)
    wide = as_type(tensor, torch.int64)
    if constant is not None and not _any_negative(constant.tolist()):
        return wide
    return torch.where(wide < 0, wide + size, wide)


def _any_negative(numbers: Any) -> bool:
    """Tell whether one of the numbers is below 0; they are read as lists, since the exporter takes tensors for data."""
    return any(_any_negative(n) for n in numbers) if isinstance(numbers, list) else numbers < 0


@operator("Gather", raw=True)
def _gather(call: Call, data: Any, index: Any) -> Tensor:
    """One slice, slices in a row, or a block of slices; rows of a matrix of floats for a block are an embedding."""
    x: Tensor = as_tensor(data)
    axis = axis_of(call.integer("axis", 0), x.ndim)
    if isinstance(index, Ints) and index.rank == 0:
        return x.select(axis, index.values[0])
    found = _from_front(index, x.shape[axis])
    if found.ndim == 0:
        return x.index_select(axis, found.reshape(1)).squeeze(axis)
    if found.ndim == 1:
        return x.index_select(axis, found)
    if axis == 0 and x.ndim == 2 and x.is_floating_point():
        return torch.nn.functional.embedding(found, x)
    return x[(slice(None),) * axis + (found,)]


@operator("GatherElements", raw=True)
def _gather_elements(call: Call, data: Any, index: Any) -> Tensor:
    x = as_tensor(data)
    axis = axis_of(call.integer("axis", 0), x.ndim)
    found = _from_front(index, x.shape[axis])
    return _moved(lambda t: torch.gather(t, axis, found), x)


def _tuples(call: Call, index: Tensor) -> tuple[Tensor, ...]:
    """Return the parts of tuples, which stand along the last axis, as one tensor of indices an axis."""
    if not isinstance(index.shape[-1], int) or index.shape[-1] == 0:
        raise call.refuse(f"its indices are tuples of {index.shape[-1]}")
    return as_type(index, torch.int64).unbind(-1)


@operator("GatherND")
def _gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Tuples index the axes after the first `batch_dims`, along which both inputs go together."""
    shared, rank = call.integer("batch_dims", 0), index.ndim - 1
    batch = [_along(torch.arange(x.shape[d]), d, rank) for d in range(shared)]
    return x[(*batch, *_tuples(call, index))]


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """Return a vector as a tensor of a rank whose other axes are 1."""
    return vector.reshape([-1 if d == axis else 1 for d in range(rank)])


@operator("Scatter", "ScatterElements", raw=True)
def _scatter_elements(call: Call, data: Any, index: Any, updates: Any) -> Tensor:
    x, new = as_tensor(data), as_tensor(updates)
    axis = axis_of(call.integer("axis", 0), x.ndim)
    places = _from_front(index, x.shape[axis])
    reduce = _reduction(call)
    if reduce is None:
        return _moved(lambda t, u: torch.scatter(t, axis, places, u), x, new)
    return _computed(lambda t, u: torch.scatter_reduce(t, axis, places, u, reduce), *_comparable(call, x, new))


def _reduction(call: Call) -> str | None:
    """Return torch's name of what happens to entries that are written to, None where they are replaced."""
    name = call.text("reduction", "none")
    if name != "none" and name not in _REDUCE:
        raise call.refuse(f"its reduction is {name}")
    return _REDUCE.get(name)


def _comparable(call: Call, *given: Tensor) -> tuple[Tensor, ...]:
    if given[0].dtype == torch.uint64 and _reduction(call) in ("amax", "amin"):
        raise call.refuse("numbers of type uint64 are not compared here")
    return given


@operator("ScatterND")
def _scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Tuples index the first axes, and each writes an entry or a slice."""
    reduce, places = _reduction(call), _tuples(call, index)
    if reduce is None:
        return _moved(lambda t, u: torch.index_put(t, places, u), x, updates)
    if reduce == "sum":
        return _computed(lambda t, u: torch.index_put(t, places, u, accumulate=True), x, updates)
    return _computed(lambda t, u: _reduced_rows(t, places, u, reduce), *_comparable(call, x, updates))


def _reduced_rows(x: Tensor, places: tuple[Tensor, ...], updates: Tensor, reduce: str) -> Tensor:
    """Return a tensor with slices of its first axes combined with updates, as rows of a matrix."""
    rank = len(places)
    row: Any = 0
    for d, place in enumerate(places):
        row = row * x.shape[d] + torch.where(place < 0, place + x.shape[d], place)
    rows = x.flatten(0, rank - 1)
    new = updates.reshape(-1, *rows.shape[1:])
    index = _along(row.reshape(-1), 0, rows.ndim).expand(new.shape)
    return torch.scatter_reduce(rows, 0, index, new, reduce).reshape(x.shape)


@operator("TensorScatter")
def _tensor_scatter(call: Call, past: Tensor, update: Tensor, start: Tensor | None = None) -> Tensor:
    """A cache with a few steps written, from a place of its own for each sample; circular: past its end, at its front.

    The first axis is the samples, `axis` is time.
    """
    axis, mode = axis_of(call.integer("axis", -2), past.ndim), call.text("mode", "linear")
    if axis == 0 or mode not in ("linear", "circular"):
        raise call.refuse(f"it writes along axis {axis}, in the way named {mode}")
    if start is None:
        return _moved(lambda t, u: torch.slice_scatter(t, u, axis, 0, u.shape[axis]), past, update)
    time = as_type(start, torch.int64).unsqueeze(1) + torch.arange(update.shape[axis])
    if mode == "circular":
        time = torch.remainder(time, past.shape[axis])
    places = (torch.arange(past.shape[0]).unsqueeze(1), time)

    def written(cache: Tensor, new: Tensor) -> Tensor:
        return torch.index_put(cache.movedim(axis, 1), places, new.movedim(axis, 1)).movedim(1, axis)

    return _moved(written, past, update)


def _known(call: Call, value: Any, what: str) -> list[int]:
    """Return whole numbers that must be known by now, from a vector or scalar of any type."""
    constant = None if isinstance(value, Ints) else constant_of(value)
    read = value.values if isinstance(value, Ints) else None if constant is None else constant.tolist()
    found = [read] if isinstance(read, (int, float)) else read
    if found is None or any(isinstance(v, torch.SymInt) for v in found):
        raise call.unknown(what)
    return [int(v) for v in found]


@operator("OneHot", raw=True)
def _one_hot(call: Call, index: Any, depth: Any, values: Any) -> Tensor:
    """Indices out of range, which before version 11 the negative ones are, name no place."""
    places, (count,) = as_type(as_tensor(index), torch.int64), _known(call, depth, "its depth")
    if call.version >= 11:
        places = torch.where(places < 0, places + count, places)
    rank = places.ndim + 1
    axis = axis_of(call.integer("axis", -1), rank)
    off, on = as_tensor(values).unbind(0)
    return torch.where(places.unsqueeze(axis) == _along(torch.arange(count), axis, rank), on, off)


@operator("Compress", raw=True)
def _compress(call: Call, data: Any, condition: Any) -> Tensor:
    """The slices that a condition names; without an axis, of all entries in a row."""
    known, x = _known(call, condition, "its condition"), as_tensor(data)
    axis = 0 if not call.has("axis") else axis_of(call.integer("axis", 0), x.ndim)
    chosen = torch.tensor([i for i, flag in enumerate(known) if flag], dtype=torch.int64)
    return torch.index_select(x if call.has("axis") else x.reshape(-1), axis, chosen)


@operator("ai.onnx.ml.ArrayFeatureExtractor")
def _array_feature_extractor(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Entries along the last axis; of a vector, as a matrix of one row."""
    found = torch.index_select(x, -1, as_type(index.reshape(-1), torch.int64))
    return found.unsqueeze(0) if x.ndim == 1 else found
