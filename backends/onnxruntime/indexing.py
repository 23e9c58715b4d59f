"""Looking up, sorting and counting: embedding, gather, advanced indexing, topk, sort, cumsum, histc."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from backends.onnxruntime.elementwise import dtype_of, operand
from backends.onnxruntime.emitter import Emitter, Entry, Refused, Result
from backends.onnxruntime.names import same_dim
from backends.onnxruntime.narrow import narrow_rows
from backends.onnxruntime.shapes import rank_of
from ir.program import is_call, tensor_type_of

aten = torch.ops.aten


def _embedding(e: Emitter, node: fx.Node) -> Result:
    table, ids, *_ = e.args(node)
    if (found := narrow_rows(e, table, e.value(ids))) is not None:
        return found
    return e.add("Gather", e.value(table), e.value(ids), axis=0)


def _gather(e: Emitter, node: fx.Node) -> Result:
    x, dim, index, *_ = e.args(node)
    rank, axis = rank_of(x), dim % rank_of(x)
    # torch lets the index be smaller than x in other dims; ONNX wants them equal.
    given, asked = tensor_type_of(x).dims, tensor_type_of(index).dims
    if any(d != axis and not same_dim(given[d], asked[d]) for d in range(rank)):
        raise Refused("the index is smaller than the tensor beside the gathered dim")
    return e.add("GatherElements", e.value(x), e.value(index), axis=axis)


def _index_select(e: Emitter, node: fx.Node) -> Result:
    x, dim, index = e.args(node)
    return e.add("Gather", e.value(x), e.value(index), axis=dim % rank_of(x))


def _index(e: Emitter, node: fx.Node) -> Result:
    """Emit x[i, j, ...]: one index as Gather, several leading ones as GatherND, whole dims in order as a view."""
    x, indices = e.args(node)
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if any(dtype_of(i) == torch.bool for _, i in used):
        raise Refused("the result of a mask as index has no size before the program runs")
    if len(used) == 1:
        dim, index = used[0]
        return e.add("Gather", e.value(x), e.value(index), axis=dim)
    if [d for d, _ in used] != list(range(len(used))):
        raise Refused("indices that do not stand for the first dims")
    axes = _whole(x, [i for _, i in used])
    if axes is not None:
        return e.add("Unsqueeze", e.value(x), axes) if axes else e.value(x)
    return e.add("GatherND", e.value(x), coordinates(e, [i for _, i in used]))


def coordinates(e: Emitter, indices: list[fx.Node]) -> Any:
    """Return index tensors, broadcast over each other, as one int64 tensor with the coordinates in its last dim."""
    values = [operand(e, i, torch.long) for i in indices]
    if len(values) == 1:
        return e.add("Unsqueeze", values[0], [-1])
    zeros = [e.add("Mul", v, e.scalar(0, torch.long)) for v in values]
    zero = zeros[0]
    for other in zeros[1:]:
        zero = e.add("Add", zero, other)
    return e.add("Concat", *[e.add("Unsqueeze", e.add("Add", v, zero), [-1]) for v in values], axis=-1)


def _whole(x: fx.Node, indices: list[fx.Node]) -> list[int] | None:
    """Return where dims of size 1 go when index i is arange over dim i, standing alone in a dim, in order; or None.

    This is how a padding mask is read for every pair of a batch row and a key: it only gets dims in between.
    """
    given = tensor_type_of(x).dims
    if len(given) != len(indices):
        return None
    places = [_counting(index, given[d]) for d, index in enumerate(indices)]
    rank = max(rank_of(i) for i in indices)
    if any(p is None for p in places):
        return None
    at = [rank - p for p in places if p is not None]
    if at != sorted(set(at)):
        return None
    return [d for d in range(rank) if d not in at]


def _counting(index: fx.Node, size: Any) -> int | None:
    """Return which dim from the end counts 0, 1, ... size - 1 while all others have size 1; None if none does."""
    dims = tensor_type_of(index).dims
    source = index
    while is_call(source, aten.unsqueeze, aten.reshape, aten.view):
        source = source.args[0]  # type: ignore[assignment]
    if not is_call(source, aten.arange.default) or rank_of(source) != 1:
        return None
    long = [d for d, n in enumerate(dims) if n != 1]
    if len(long) != 1 or not same_dim(dims[long[0]], size):
        return None
    return len(dims) - long[0]


def _index_put(e: Emitter, node: fx.Node) -> Result:
    x, indices, values, accumulate = e.args(node)
    if any(i is None or dtype_of(i) == torch.bool for i in indices):
        raise Refused("indices must be numbers for the first dims")
    where = coordinates(e, list(indices))
    reduction = "add" if accumulate else "none"
    return e.add("ScatterND", e.value(x), where, operand(e, values, tensor_type_of(x).dtype), reduction=reduction)


def _scatter(reduction: str) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        x, dim, index, source = e.args(node)[:4]
        if not isinstance(source, fx.Node):
            filling = e.scalar(source, tensor_type_of(x).dtype)
            source = e.add("Expand", filling, e.add("Shape", e.value(index)))
        else:
            source = e.value(source)
        axis = dim % rank_of(x)
        return e.add("ScatterElements", e.value(x), e.value(index), source, axis=axis, reduction=reduction)

    return emit


def _topk(e: Emitter, node: fx.Node) -> Result:
    x, count, dim, largest, ordered = e.args(node)
    if not isinstance(count, int):
        raise Refused("how many to take is not known before the program runs")
    axis = dim % rank_of(x)
    return e.add("TopK", e.value(x), [count], axis=axis, largest=int(largest), sorted=int(ordered), outputs=2)


def _sort(e: Emitter, node: fx.Node) -> Result:
    """Emit a whole sort as TopK of all, which takes equal elements in order of their index."""
    args = e.args(node)
    x, dim, descending = args[0], args[-2], args[-1]
    axis = dim % rank_of(x)
    count = e.add("Shape", e.value(x), start=axis, end=axis + 1)
    return e.add("TopK", e.value(x), count, axis=axis, largest=int(descending), sorted=1, outputs=2)


def _cumsum(e: Emitter, node: fx.Node) -> Result:
    x, dim, *_ = e.args(node)
    found = operand(e, x, tensor_type_of(node).dtype)
    return e.add("CumSum", found, e.scalar(dim % rank_of(x), torch.long))


def _histc(e: Emitter, node: fx.Node) -> Result:
    """Emit counts of whole numbers low, low + 1, ... high, one bin for each, as comparison and sum."""
    x, bins, low, high = e.args(node)
    if high - low != bins - 1 or low != int(low):
        raise Refused("only bins that hold one whole number each have an ONNX form")
    dtype = tensor_type_of(x).dtype
    found = e.add("Floor", e.value(x)) if dtype.is_floating_point else e.value(x)
    numbers = e.constant(torch.arange(int(low), int(high) + 1, dtype=dtype))
    same = e.add("Equal", e.add("Unsqueeze", e.add("Reshape", found, [-1]), [1]), numbers)
    return e.add("ReduceSum", e.cast(same, tensor_type_of(node).dtype), [0], keepdims=0)


def _argument(op: str) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        x, dim, keep = e.args(node)
        if dim is None:
            raise Refused("only along one dim")
        return e.add(op, e.value(x), axis=dim % rank_of(x), keepdims=int(keep))

    return emit


TABLE: dict[Any, Entry] = {
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value), _scatter("none")),
    aten.scatter_add.default: _scatter("add"),
    aten.topk.default: _topk,
    **dict.fromkeys((aten.sort.default, aten.sort.stable), _sort),
    aten.cumsum.default: _cumsum,
    aten.histc.default: _histc,
    aten.argmax.default: _argument("ArgMax"),
    aten.argmin.default: _argument("ArgMin"),
}
