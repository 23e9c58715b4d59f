"""Operators that ask for sizes, or move, repeat, cut and pad entries without computing with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from frontend.onnx.arguments import axis_of, constant_of, number_of, size_of, sizes_of
from frontend.onnx.call import Call
from frontend.onnx.registry import operator
from frontend.onnx.values import Ints, sizes

# Types of the same width, for what torch has no kernel for with wide unsigned numbers.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _given(call: Call, value: Any, name: str) -> list[Any] | None:
    """Return numbers that are an input in newer versions and an attribute in older ones, None where there are none."""
    return call.integers(name) if value is None else sizes_of(call, value, f"its input {name}")


def _axes(call: Call, axes: Sequence[Any], rank: int) -> list[int]:
    """Return axes counted from the front; raises Refused for one that is out of range or named twice."""
    found = [axis_of(axis, rank) for axis in axes if isinstance(axis, int) and -rank <= axis < rank]
    if len(found) != len(axes) or len(set(found)) != len(found):
        raise call.refuse(f"its axes {list(axes)} are not different axes of a tensor of rank {rank}")
    return found


def _tensor(value: Tensor | Ints) -> Tensor:
    """Return numbers that are known as a tensor, so that they move as one."""
    return value.tensor() if isinstance(value, Ints) else value


def _is(value: Any, number: int) -> bool:
    """Return whether a size is known to be a number; a symbolic one is not."""
    return isinstance(value, int) and value == number


def _moved(x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function that moves or clears entries; wide unsigned types go through signed ones."""
    signed = _SIGNED.get(x.dtype)
    return move(x) if signed is None else move(x.view(signed)).view(x.dtype)


@operator("Shape", raw=True)
def _shape(call: Call, x: Tensor | Ints) -> Ints:
    """Sizes of the axes from `start` to `end`, which are clamped as in a Python slice."""
    return sizes(_tensor(x).shape[call.integer("start", 0) : call.get("end")])


@operator("Size", raw=True)
def _size(call: Call, x: Tensor | Ints) -> Ints:
    return Ints((prod(_tensor(x).shape),), 0)


@operator("Reshape", raw=True)
def _reshape(call: Call, x: Tensor | Ints, shape: Any = None) -> Tensor:
    """A size of 0 copies that of the same axis, unless `allowzero` takes it as it is; -1 is what is left."""
    x, asked = _tensor(x), _given(call, shape, "shape")
    if asked is None:
        raise call.refuse("it has no shape")
    if call.flag("allowzero"):
        if any(_is(v, 0) for v in asked) and any(_is(v, -1) for v in asked):
            raise call.refuse(f"its shape {asked} has both 0 and -1 where 0 is a size")
        return x.reshape(asked)
    if any(_is(v, 0) for v in asked[x.ndim :]):
        raise call.refuse(f"its shape {asked} copies the size of an axis that a tensor of rank {x.ndim} has not")
    return x.reshape([x.shape[i] if _is(v, 0) else v for i, v in enumerate(asked)])


@operator("Transpose")
def _transpose(call: Call, x: Tensor) -> Tensor:
    """Without `perm` the axes are reversed."""
    order = call.integers("perm")
    return x.permute(list(range(x.ndim))[::-1] if order is None else order)


@operator("Squeeze", raw=True)
def _squeeze(call: Call, x: Tensor | Ints, axes: Any = None) -> Tensor:
    """Without axes all of size 1 are dropped."""
    x, asked = _tensor(x), _given(call, axes, "axes")
    if asked is None:
        return x.squeeze()
    chosen = _axes(call, asked, x.ndim)
    wide = [axis for axis in chosen if not _is(x.shape[axis], 1)]
    if wide:
        raise call.refuse(f"axis {wide[0]} has the size {x.shape[wide[0]]}, and only axes of size 1 can be dropped")
    return x.squeeze(chosen)


@operator("Unsqueeze", raw=True)
def _unsqueeze(call: Call, x: Tensor | Ints, axes: Any = None) -> Tensor:
    """The axes are those of the result."""
    x, asked = _tensor(x), _given(call, axes, "axes")
    if asked is None:
        raise call.refuse("it has no axes")
    for axis in sorted(_axes(call, asked, x.ndim + len(asked))):
        x = x.unsqueeze(axis)
    return x


@operator("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    """A matrix whose rows are the axes before `axis`, which may be the rank."""
    axis = axis_of(call.integer("axis", 1), x.ndim)
    if not 0 <= axis <= x.ndim:
        raise call.refuse(f"its axis {axis} is none of a tensor of rank {x.ndim}")
    if axis == 1 and x.ndim > 1:
        return x.flatten(1)
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


@operator("Expand", raw=True)
def _expand(call: Call, x: Tensor | Ints, shape: Any) -> Tensor:
    """Broadcasting goes both ways: a size of 1 in the shape keeps the tensor's, and the shape may be shorter."""
    x, asked = _tensor(x), sizes_of(call, shape, "its shape")
    if any(isinstance(v, int) and v < 0 for v in asked):
        raise call.refuse(f"its shape {asked} has a negative size")
    added = len(asked) - x.ndim
    asked = [1] * -added + asked
    return x.expand([-1 if i >= added and _is(v, 1) else v for i, v in enumerate(asked)])


@operator("Concat")
def _concat(call: Call, *parts: Tensor) -> Tensor:
    return torch.cat(parts, call.integer("axis", 1))


@operator("Split", raw=True)
def _split(call: Call, x: Tensor | Ints, split: Any = None) -> tuple[Tensor, ...]:
    """Parts of given sizes along an axis, or as many as there are results."""
    x, asked = _tensor(x), _given(call, split, "split")
    (axis,) = _axes(call, [call.integer("axis", 0)], x.ndim)
    return tuple(torch.split(x, asked or _parts(call, x.shape[axis]), axis))


def _parts(call: Call, size: Any) -> list[Any]:
    """Return the sizes of equal parts; from version 18 the last may be smaller."""
    count = call.integer("num_outputs", call.outputs)
    part = (size + count - 1) // count
    last = size - part * (count - 1)
    if (call.version < 18 and last != part) or last < 0:
        raise call.refuse(f"the size {size} cannot be split into {count} parts")
    return [part] * (count - 1) + [last]


@operator("Slice", raw=True)
def _slice(
    call: Call, x: Tensor | Ints, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
) -> Tensor:
    """Entries from start to before end by a step, along each axis that is named; positions may be out of range."""
    x, first, last = _tensor(x), _given(call, starts, "starts"), _given(call, ends, "ends")
    if first is None or last is None:
        raise call.refuse("it has no starts or no ends")
    asked, by = _given(call, axes, "axes"), _given(call, steps, "steps")
    chosen = _axes(call, range(len(first)) if asked is None else asked, x.ndim)
    by = [1] * len(first) if by is None else by
    if any(not isinstance(step, int) or step == 0 for step in by):
        raise call.refuse(f"its steps {by} are not numbers other than 0")
    for axis, start, end, step in zip(chosen, first, last, by, strict=True):
        x = _cut(x, axis, start, end, step)
    return x


def _cut(x: Tensor, axis: int, start: Any, end: Any, step: int) -> Tensor:
    """Slice an axis; a negative step goes forward through the reversed axis, and starts on it."""
    if step > 0:
        return _part(x, axis, start, end, step)
    size = x.shape[axis]
    start = torch.sym_min(_mirrored(start, size), size - 1)
    return _part(_moved(x, lambda v: v.flip(axis)), axis, start, _mirrored(end, size), -step)


def _part(x: Tensor, axis: int, start: Any, end: Any, step: int = 1) -> Tensor:
    """Slice one axis forward, without the slices of all other axes that indexing would add."""
    found: Tensor = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return found


def _mirrored(position: Any, size: Any) -> Any:
    """Return where a position is in a reversed axis, 0 for one behind the axis."""
    return -1 - position if position < 0 else torch.sym_max(size - 1 - position, 0)


@operator("Tile", raw=True)
def _tile(call: Call, x: Tensor | Ints, repeats: Any, axis: Any = None) -> Tensor:
    """Before version 6, one number for one axis."""
    x = _tensor(x)
    if axis is not None:
        count = size_of(call, repeats, "its number of copies")
        (chosen,) = _axes(call, sizes_of(call, axis, "its axis"), x.ndim)
        return x.repeat([count if i == chosen else 1 for i in range(x.ndim)])
    counts = sizes_of(call, repeats, "its numbers of copies")
    if len(counts) != x.ndim:
        raise call.refuse(f"there are {len(counts)} numbers of copies for a tensor of rank {x.ndim}")
    return x.repeat(counts)


@operator("Pad", raw=True)
def _pad(call: Call, x: Tensor | Ints, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    """Entries before and after each axis; negative numbers cut off as many."""
    x, asked = _tensor(x), _given(call, pads, "paddings" if call.version < 2 else "pads")
    chosen = list(range(x.ndim)) if axes is None else _axes(call, sizes_of(call, axes, "its axes"), x.ndim)
    if asked is None or len(asked) != 2 * len(chosen):
        raise call.refuse(f"it has {len(asked or [])} widths for {len(chosen)} axes")
    both = zip(asked[: len(chosen)], asked[len(chosen) :], strict=True)
    widths = {axis: w for axis, w in zip(chosen, both, strict=True) if not (_is(w[0], 0) and _is(w[1], 0))}
    mode = call.text("mode", "constant")
    if mode == "constant":
        return _padded(call, x, widths, call.real("value", 0.0) if value is None else value)
    if mode not in _SOURCES:
        raise call.refuse(f"its mode {mode} is not known")
    for axis, (before, after) in widths.items():
        x = _continued(call, x, axis, before, after, _SOURCES[mode])
    return x


def _padded(call: Call, x: Tensor, widths: dict[int, tuple[Any, Any]], value: Any) -> Tensor:
    """Pad with one value, which may come from data."""
    # torch counts from the last axis, and takes the axes before the first padded one as not padded.
    flat = [w for axis in range(x.ndim)[: min(widths, default=x.ndim) - 1 - x.ndim : -1] for w in _width(widths, axis)]
    if not isinstance(value, float):
        if not isinstance(value, Ints) and constant_of(value) is None:
            inside = torch.constant_pad_nd(torch.ones_like(x, dtype=torch.bool), flat, False)
            fill: Tensor = value.reshape(())
            return torch.where(inside, torch.constant_pad_nd(x, flat, 0), fill)
        value = number_of(call, value, "its value")
    return torch.constant_pad_nd(x, flat, value)


def _width(widths: dict[int, tuple[Any, Any]], axis: int) -> tuple[Any, Any]:
    return widths.get(axis, (0, 0))


def _reflected(at: Tensor, size: Any) -> Tensor:
    """The last entry is not repeated, so that positions come again after twice the size less 2."""
    last = size - 1
    found: Tensor = last - (at.remainder(1 if _is(last, 0) else 2 * last) - last).abs()
    return found


# By mode: from positions that may be before or behind an axis, and its size, which entry is there.
_SOURCES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reflect": _reflected,
    "edge": lambda at, size: at.clamp(0, size - 1),
    "wrap": lambda at, size: at.remainder(size),
}


def _continued(
    call: Call, x: Tensor, axis: int, before: Any, after: Any, source: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """Pad an axis with entries of its own; what negative widths cut off is not among them."""
    size = x.shape[axis]
    x = _part(x, axis, max(0, -before), size - max(0, -after))
    size, before, after = x.shape[axis], max(0, before), max(0, after)
    if _is(size, 0):
        raise call.refuse("it repeats the entries of an axis that has none")
    at = torch.arange(-before, size + after, device=x.device)
    return x.index_select(axis, source(at, size))


@operator("DepthToSpace")
def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    """Channels become blocks of pixels; the place in a block comes before the channel (DCR) or after it (CRD)."""
    block, mode = _block(call, x)
    if mode == "CRD":
        return _moved(x, lambda v: F.pixel_shuffle(v, block))
    n, c, h, w = x.shape
    depth = c // block**2
    split = x.reshape(n, block, block, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    return split.reshape(n, depth, h * block, w * block)


@operator("SpaceToDepth")
def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    """Blocks of pixels become channels, in the orders of DepthToSpace."""
    block, mode = _block(call, x)
    if mode == "CRD":
        return _moved(x, lambda v: F.pixel_unshuffle(v, block))
    n, c, h, w = x.shape
    split = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return split.reshape(n, c * block**2, h // block, w // block)


def _block(call: Call, x: Tensor) -> tuple[int, str]:
    """Return the length of a block and the order of channels."""
    block, mode = call.integer("blocksize", 0), call.text("mode", "DCR")
    if x.ndim != 4 or block < 1 or mode not in ("DCR", "CRD"):
        raise call.refuse(f"its rank is {x.ndim}, its block size {block} and its mode {mode}")
    return block, mode


@operator("CenterCropPad", raw=True)
def _center_crop_pad(call: Call, x: Tensor | Ints, shape: Any) -> Tensor:
    """Cut or pad with zeros to a shape; of an odd number, one more is cut or added at the end."""
    x, asked = _tensor(x), sizes_of(call, shape, "its shape")
    axes = call.integers("axes")
    chosen = _axes(call, range(x.ndim) if axes is None else axes, x.ndim)
    widths = {}
    for axis, size in zip(chosen, asked, strict=True):
        more = size - x.shape[axis]
        before = more // 2 if more >= 0 else -(-more // 2)
        widths[axis] = (before, more - before)
    return _padded(call, x, widths, 0.0)


@operator("ReverseSequence")
def _reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the first entries along the time axis, as many as the length for the place on the batch axis says."""
    batch, time = call.integer("batch_axis", 1), call.integer("time_axis", 0)
    if {batch, time} != {0, 1}:
        raise call.refuse(f"its batch axis is {batch} and its time axis {time}, which must be 0 and 1")
    at = torch.arange(x.shape[time], device=x.device).unsqueeze(batch)
    count = lengths.unsqueeze(time)
    source = torch.where(at < count, count - 1 - at, at)
    source = source.reshape([*source.shape, *[1] * (x.ndim - 2)]).expand(x.shape)
    return _moved(x, lambda v: v.gather(time, source))


@operator("Trilu", raw=True)
def _trilu(call: Call, x: Tensor | Ints, k: Any = None) -> Tensor:
    """Clear what is below the diagonal k, or above it unless `upper`; k may come from data."""
    x, upper = _tensor(x), call.flag("upper", True)
    if k is None or isinstance(k, Ints) or constant_of(k) is not None:
        diagonal = 0 if k is None else size_of(call, k, "its diagonal")
        return _moved(x, lambda v: v.triu(diagonal) if upper else v.tril(diagonal))
    offset = _offsets(x)
    kept = offset >= k.reshape(()) if upper else offset <= k.reshape(())
    return torch.where(kept, x, torch.zeros_like(x))


def _offsets(x: Tensor) -> Tensor:
    """Return for each entry of a matrix by how much its column is behind its row."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    return columns - rows.unsqueeze(1)


@operator("EyeLike")
def _eye_like(call: Call, x: Tensor) -> Tensor:
    """Ones on the diagonal k."""
    if x.ndim != 2:
        raise call.refuse(f"its input has rank {x.ndim} and must be a matrix")
    return (_offsets(x) == call.integer("k", 0)).to(call.dtype("dtype", x.dtype))
