"""Views, joins and constructions: what changes shape or makes tensors of a shape, but computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from backends.onnxruntime.elementwise import dtype_of, operand
from backends.onnxruntime.emitter import Emitter, Entry, Refused, Result
from backends.onnxruntime.names import same_dim
from ir.program import tensor_type_of

aten = torch.ops.aten
_END = 2**63 - 1


def rank_of(node: fx.Node) -> int:
    """Return how many dims a tensor node has."""
    return len(tensor_type_of(node).dims)


def target_shape(e: Emitter, node: fx.Node, source: fx.Node, sizes: Sequence[Any]) -> Any:
    """Return the second input of a Reshape: constant where 0 (as it was) and one -1 can say it, else computed."""
    wanted, given = tensor_type_of(node).dims, tensor_type_of(source).dims
    said: list[int] = []
    for index, dim in enumerate(wanted):
        kept = index < len(given) and not isinstance(dim, int) and same_dim(given[index], dim)
        said.append(dim if isinstance(dim, int) else 0 if kept else -1)
    # Reshape reads 0 as "as it was", so that an empty dim needs to be there in the input, too.
    zeros_fine = all(d != 0 or (i < len(given) and given[i] == 0) for i, d in enumerate(wanted))
    if said.count(-1) <= 1 and zeros_fine and not (-1 in said and 0 in wanted):
        return e.vector(said)
    return e.shape(list(sizes))


def _reshape(e: Emitter, node: fx.Node) -> Result:
    x, sizes = e.args(node)[:2]
    return e.add("Reshape", e.value(x), target_shape(e, node, x, sizes))


def _merge(e: Emitter, node: fx.Node) -> Result:
    """Emit flatten and unflatten by the shape they have."""
    x = e.args(node)[0]
    if sum(not isinstance(d, int) for d in tensor_type_of(node).dims) > 1:
        raise Refused("more than one dim of the result is dynamic")
    return e.add("Reshape", e.value(x), target_shape(e, node, x, ()))


def permuted(e: Emitter, x: Any, order: Sequence[int]) -> Any:
    """Return x with its dims in another order."""
    return x if list(order) == list(range(len(order))) else e.add("Transpose", x, perm=list(order))


def _transpose(e: Emitter, node: fx.Node) -> Result:
    x, a, b = e.args(node)
    rank = rank_of(x)
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return permuted(e, e.value(x), order)


def _t(e: Emitter, node: fx.Node) -> Result:
    (x,) = e.args(node)
    return permuted(e, e.value(x), list(reversed(range(rank_of(x)))))


def _permute(e: Emitter, node: fx.Node) -> Result:
    x, order = e.args(node)
    return permuted(e, e.value(x), [d % rank_of(x) for d in order])


def _unsqueeze(e: Emitter, node: fx.Node) -> Result:
    x, dim = e.args(node)
    return e.add("Unsqueeze", e.value(x), [dim % rank_of(node)])


def _squeeze(e: Emitter, node: fx.Node) -> Result:
    x, *rest = e.args(node)
    dims = tensor_type_of(x).dims
    asked = rest[0] if rest else range(len(dims))
    asked = [asked] if isinstance(asked, int) else asked
    if any(not isinstance(dims[d], int) for d in asked):
        raise Refused("a dim of dynamic size cannot be squeezed")
    gone = [d % len(dims) for d in asked if dims[d] == 1]
    return e.add("Squeeze", e.value(x), gone) if gone else e.value(x)


def _expand(e: Emitter, node: fx.Node) -> Result:
    x, sizes = e.args(node)[:2]
    given = (None,) * (len(sizes) - rank_of(x)) + tuple(tensor_type_of(x).dims)
    # A dim of size 1 in the request leaves the input's dim alone, which saves computing the ones that stay.
    wanted = tensor_type_of(node).dims
    asked = [
        1 if g is not None and same_dim(g, w) else s if isinstance(s, fx.Node) or s != -1 else 1
        for s, w, g in zip(sizes, wanted, given, strict=True)
    ]
    return e.add("Expand", e.value(x), e.shape(asked))


def _slice(e: Emitter, node: fx.Node) -> Result:
    x, dim, start, end, step = e.args(node)
    bounds = [e.shape([0 if start is None else start]), e.shape([_END if end is None else end])]
    return e.add("Slice", e.value(x), *bounds, [dim % rank_of(x)], None if step == 1 else [step])


def _select(e: Emitter, node: fx.Node) -> Result:
    x, dim, index = e.args(node)
    found = e.scalar(index, torch.long) if isinstance(index, int) else e.value(index)
    return e.add("Gather", e.value(x), found, axis=dim % rank_of(x))


def _narrow(e: Emitter, node: fx.Node) -> Result:
    x, dim, start, length = e.args(node)
    if not isinstance(start, int) or not isinstance(length, int):
        raise Refused("the span is not known before the program runs")
    return e.add("Slice", e.value(x), [start], [start + length], [dim % rank_of(x)])


def _pieces(e: Emitter, node: fx.Node) -> Result:
    """Emit split, chunk and their like by the sizes recorded for the results."""
    x, kinds = e.args(node)[0], node.meta["type"]
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    dim = e.args(node)[2 if packet is not aten.unbind else 1] % rank_of(x)
    if len(kinds) == 1:
        return (e.value(x),)
    if packet is aten.unbind:
        parts = e.add("Split", e.value(x), [1] * len(kinds), axis=dim, outputs=len(kinds))
        return tuple(e.add("Squeeze", part, [dim]) for part in parts)
    sizes = [kind.dims[dim] for kind in kinds]
    if not all(isinstance(s, int) for s in sizes):
        raise Refused("the sizes of the pieces are not known before the program runs")
    return e.add("Split", e.value(x), sizes, axis=dim, outputs=len(sizes))


def _cat(e: Emitter, node: fx.Node) -> Result:
    parts, dim = e.args(node)
    dim %= rank_of(node)
    dtype = tensor_type_of(node).dtype
    # Pieces without anything in them are how sliced-off tails that are empty show.
    full = [p for p in parts if tensor_type_of(p).dims != (0,) and tensor_type_of(p).dims[dim] != 0]
    if len(full) == 1:
        return operand(e, full[0], dtype)
    return e.add("Concat", *[operand(e, p, dtype) for p in full], axis=dim)


def _stack(e: Emitter, node: fx.Node) -> Result:
    parts, dim = e.args(node)
    dim %= rank_of(node)
    dtype = tensor_type_of(node).dtype
    return e.add("Concat", *[e.add("Unsqueeze", operand(e, p, dtype), [dim]) for p in parts], axis=dim)


def _repeat(e: Emitter, node: fx.Node) -> Result:
    x, counts = e.args(node)
    found, missing = e.value(x), len(counts) - rank_of(x)
    if missing:
        found = e.add("Unsqueeze", found, list(range(missing)))
    return found if all(c == 1 for c in counts) else e.add("Tile", found, e.shape(list(counts)))


def _repeat_interleave(e: Emitter, node: fx.Node) -> Result:
    x, count, dim, *_ = e.args(node)
    rank = rank_of(x)
    if dim is None or not isinstance(count, int):
        raise Refused("the repeats are not known before the program runs, or run over all elements")
    dim %= rank
    wide = e.add("Unsqueeze", e.value(x), [dim + 1])
    sizes = [1] * (rank + 1)
    sizes[dim + 1] = count
    wide = e.add("Expand", wide, e.vector(sizes))
    given = tensor_type_of(x).dims[dim]
    # 0 keeps the dims before, -1 takes the two that merge; those after are named one by one.
    after = tensor_type_of(x).dims[dim + 1 :]
    if not all(isinstance(d, int) for d in after):
        raise Refused("a dim after the repeated one is dynamic")
    merged = given * count if isinstance(given, int) else -1
    return e.add("Reshape", wide, [*[0] * dim, merged, *after])


def _arange(e: Emitter, node: fx.Node) -> Result:
    args = e.args(node)
    name = node.target._overloadname  # type: ignore[union-attr]
    start, end, step = {"default": (0, args[0], 1), "start": (args[0], args[1], 1)}.get(name, args[:3])
    dtype = tensor_type_of(node).dtype
    return e.add("Range", *[operand(e, x, dtype) for x in (start, end, step)])


def _filled(number: float | None) -> Entry:
    """Return an entry for tensors of one number, which `full` takes as an argument (None)."""

    def emit(e: Emitter, node: fx.Node) -> Result:
        args, kind = e.args(node), tensor_type_of(node)
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        of_new = packet in (aten.new_ones, aten.new_zeros, aten.new_full)
        sizes = args[1] if of_new else args[0]
        value = args[2 if of_new else 1] if number is None else number
        if isinstance(value, fx.Node):
            return e.add("Expand", operand(e, value, kind.dtype), e.shape(list(sizes)))
        if kind.static and kind.nbytes <= 256:
            return torch.full([int(d) for d in kind.dims], value, dtype=kind.dtype)
        return e.add("Expand", e.scalar(value, kind.dtype), e.shape(list(sizes)))

    return emit


def _filled_like(number: float | None) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        x, value = e.args(node)[0], e.args(node)[1] if number is None else number
        filling = operand(e, value, tensor_type_of(node).dtype)
        return e.add("Expand", filling, e.add("Shape", e.value(x)))

    return emit


def _triangle(upper: int) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        x, diagonal = e.args(node)
        whole = dtype_of(x) == torch.bool  # the CPU has no kernel for bool
        found = e.cast(e.value(x), torch.long) if whole else e.value(x)
        found = e.add("Trilu", found, e.scalar(diagonal, torch.long), upper=upper)
        return e.cast(found, torch.bool) if whole else found

    return emit


def _constant_pad(e: Emitter, node: fx.Node) -> Result:
    x, pads, number = e.args(node)
    rank, pairs = rank_of(x), [pads[i : i + 2] for i in range(0, len(pads), 2)]
    if not all(isinstance(p, int) for p in pads):
        raise Refused("the padding is not known before the program runs")
    both = [[0, 0]] * (rank - len(pairs)) + pairs[::-1]
    ends = [p[0] for p in both] + [p[1] for p in both]
    return e.add("Pad", e.value(x), ends, e.scalar(number, tensor_type_of(node).dtype), mode="constant")


def _same(e: Emitter, node: fx.Node) -> Result:
    return e.value(e.args(node)[0])


TABLE: dict[Any, Entry] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _reshape),
    **dict.fromkeys((aten.flatten.using_ints, aten.unflatten.int), _merge),
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default), _same),
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.narrow.default: _narrow,
    **dict.fromkeys((aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default), _pieces),
    **dict.fromkeys((aten.chunk.default, aten.unbind.int), _pieces),
    **dict.fromkeys((aten.cat.default, aten.concat.default), _cat),
    aten.stack.default: _stack,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys((aten.zeros.default, aten.new_zeros.default), _filled(0)),
    **dict.fromkeys((aten.ones.default, aten.new_ones.default), _filled(1)),
    **dict.fromkeys((aten.full.default, aten.new_full.default), _filled(None)),
    **dict.fromkeys((aten.zeros_like.default, aten.empty_like.default), _filled_like(0)),
    aten.ones_like.default: _filled_like(1),
    aten.full_like.default: _filled_like(None),
    aten.tril.default: _triangle(0),
    aten.triu.default: _triangle(1),
    aten.constant_pad_nd.default: _constant_pad,
}
