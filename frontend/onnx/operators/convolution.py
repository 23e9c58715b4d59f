"""Convolutions: plain, transposed, of whole numbers and with offsets, and blocks put back into an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frontend.onnx.arguments import sizes_of
from frontend.onnx.call import Call
from frontend.onnx.registry import operator

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Windows:
    """How windows lie on an image, a number for each of its axes.

    begin, end: what is added before and after the image, negative where it is cut; sizes may be symbolic.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[Any]
    end: list[Any]

    @property
    def rank(self) -> int:
        """How many axes an image has."""
        return len(self.kernel)

    @property
    def spans(self) -> list[int]:
        """From the first to the last entry that a window covers."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @property
    def even(self) -> bool:
        """Whether as much is added before the image as after it, and how much is known."""
        known = all(isinstance(p, int) and p >= 0 for p in [*self.begin, *self.end])
        return known and self.begin == self.end


def windows_of(call: Call, x: Tensor, kernel: Sequence[Any]) -> Windows:
    """Return the windows that a node's attributes give over the axes of x after the second."""
    rank = x.ndim - 2
    if rank not in _CONV or len(kernel) != rank:
        raise call.refuse(f"its input has {x.ndim} axes and its kernel {len(kernel)}; images have 1 to 3 axes")
    given = call.integers("kernel_shape")
    if given is not None and given != list(kernel):
        raise call.refuse(f"its kernel_shape is {given}, and its weight's {list(kernel)}")
    strides, dilations = _per_axis(call, "strides", rank), _per_axis(call, "dilations", rank)
    placed = Windows([int(k) for k in kernel], strides, dilations, [0] * rank, [0] * rank)
    mode = call.text("auto_pad", "NOTSET")
    if mode == "VALID":
        return placed
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        begin, end = _same_pads(x.shape[2:], placed, mode == "SAME_LOWER")
    elif mode in ("NOTSET", ""):
        pads = call.integers("pads", [0] * (2 * rank)) or []
        if len(pads) != 2 * rank:
            raise call.refuse(f"its pads are {pads}, for {rank} axes")
        begin, end = pads[:rank], pads[rank:]
    else:
        raise call.refuse(f"its auto_pad is {mode}")
    return Windows(placed.kernel, strides, dilations, begin, end)


def _per_axis(call: Call, name: str, rank: int) -> list[int]:
    found = call.integers(name) or [1] * rank
    if len(found) != rank or min(found) < 1:
        raise call.refuse(f"its {name} are {found}, for {rank} axes")
    return found


def _same_pads(sizes: Sequence[Any], windows: Windows, lower: bool) -> tuple[list[Any], list[Any]]:
    """Return the pads with which there are as many windows as strides in the image, the last one begun included."""
    begin, end = [], []
    for size, stride, span in zip(sizes, windows.strides, windows.spans, strict=True):
        needed = span - 1 if stride == 1 else torch.sym_max(0, ((size - 1) // stride) * stride + span - size)
        first = (needed + 1) // 2 if lower else needed // 2
        begin.append(first)
        end.append(needed - first)
    return begin, end


def padded(x: Tensor, begin: Sequence[Any], end: Sequence[Any], value: float = 0) -> Tensor:
    """Return an image with entries added around it, or cut where a number is negative."""
    if all(isinstance(p, int) and p == 0 for p in [*begin, *end]):
        return x
    pairs = zip(reversed(begin), reversed(end), strict=True)
    return F.pad(x, [p for pair in pairs for p in pair], value=value)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, groups: int) -> Tensor:
    """Return a convolution."""
    pads = windows.begin if windows.even else 0
    x = x if windows.even else padded(x, windows.begin, windows.end)
    return _CONV[windows.rank](x, weight, bias, windows.strides, pads, windows.dilations, groups)


@operator("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    windows = windows_of(call, x, weight.shape[2:])
    return convolved(x, weight, bias, windows, call.integer("group", 1))


@operator("ConvInteger")
def _conv_integer(
    call: Call, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None
) -> Tensor:
    """The zero points are taken off first, so that what is added around the image counts as 0."""
    windows = windows_of(call, x, weight.shape[2:])
    x, weight = x.to(torch.int32), weight.to(torch.int32)
    if x_zero is not None:
        x = x - x_zero.to(torch.int32).reshape(())
    if weight_zero is not None:
        weight = weight - weight_zero.to(torch.int32).reshape([-1] + [1] * (weight.ndim - 1))
    return convolved(x, weight, None, windows, call.integer("group", 1))


@operator("ConvTranspose")
def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    windows, extra = _transposed_windows(call, x, weight)
    run, groups = _TRANSPOSED[windows.rank], call.integer("group", 1)
    if windows.even and all(e < max(s, d) for e, s, d in zip(extra, windows.strides, windows.dilations, strict=True)):
        return run(x, weight, bias, windows.strides, windows.begin, extra, groups, windows.dilations)
    full = run(x, weight, None, windows.strides, 0, 0, groups, windows.dilations)
    cut = padded(full, [-b for b in windows.begin], [o - e for e, o in zip(windows.end, extra, strict=True)])
    return cut if bias is None else cut + bias.reshape([-1] + [1] * windows.rank)


def _transposed_windows(call: Call, x: Tensor, weight: Tensor) -> tuple[Windows, list[int]]:
    """Return the windows of a transposed convolution, with pads as what is cut, and what is added at the end."""
    rank, mode = x.ndim - 2, call.text("auto_pad", "NOTSET")
    extra = call.integers("output_padding") or [0] * rank
    wanted = call.integers("output_shape")
    windows = windows_of(call, x, weight.shape[2:])
    if wanted is not None:
        axes = zip(x.shape[2:], windows.strides, windows.spans, extra, wanted[-rank:], strict=True)
        totals = [stride * (size - 1) + more + span - out for size, stride, span, more, out in axes]
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        # What is more than as many strides as the image has entries.
        totals = [
            more + span - stride for stride, span, more in zip(windows.strides, windows.spans, extra, strict=True)
        ]
    else:
        return windows, extra
    cut = [torch.sym_max(0, total) for total in totals]
    begin = [c // 2 if mode == "SAME_UPPER" else c - c // 2 for c in cut]
    end = [total - first for total, first in zip(totals, begin, strict=True)]
    return Windows(windows.kernel, windows.strides, windows.dilations, begin, end), extra


@operator("Col2Im", raw=True)
def _col2im(call: Call, x: Any, image: Any, block: Any) -> Tensor:
    """Blocks are added up where they overlap: a transposed convolution whose kernel takes each entry to its place."""
    sizes, kernel = sizes_of(call, image, "its image shape"), sizes_of(call, block, "its block shape")
    if len(sizes) not in _CONV or len(sizes) != len(kernel):
        raise call.refuse(f"its image has {len(sizes)} axes and its blocks {len(kernel)}")
    rank = len(sizes)
    strides, dilations = _per_axis(call, "strides", rank), _per_axis(call, "dilations", rank)
    pads = call.integers("pads") or [0] * (2 * rank)
    if rank == 2 and pads[:2] == pads[2:]:
        folded: Tensor = F.fold(x, tuple(sizes), tuple(kernel), tuple(dilations), tuple(pads[:2]), tuple(strides))
        return folded
    placed = Windows(kernel, strides, dilations, pads[:rank], pads[rank:])
    wide = [size + b + e for size, b, e in zip(sizes, placed.begin, placed.end, strict=True)]
    counts = [(w - span) // s + 1 for w, span, s in zip(wide, placed.spans, strides, strict=True)]
    entries = prod(kernel)
    channels = x.shape[1] // entries
    weight = torch.eye(entries, dtype=x.dtype).reshape(entries, 1, *kernel)
    blocks = x.reshape(-1, entries, *counts)
    full = _TRANSPOSED[rank](blocks, weight, None, strides, 0, 0, 1, dilations)
    reached = [(c - 1) * s + span for c, s, span in zip(counts, strides, placed.spans, strict=True)]
    end = [w - r - e for w, r, e in zip(wide, reached, placed.end, strict=True)]
    return padded(full, [-b for b in placed.begin], end).reshape(x.shape[0], channels, *sizes)


@operator("DeformConv")
def _deform_conv(
    call: Call, x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Each entry of a window reads the image where its offset takes it, between entries by their weighted mean.

    The offsets' second axis: group, row and column in the kernel, and then down and across.
    """
    if x.ndim != 4:
        raise call.refuse(f"its input has {x.ndim} axes, not 4")
    if x.dtype in (torch.float16, torch.bfloat16):
        # Of such types, places in an image are too coarse.
        wide = [None if v is None else v.float() for v in (x, weight, offset, bias, mask)]
        found: Tensor = _deform_conv(call, *wide)
        return found.to(x.dtype)
    windows = windows_of(call, x, weight.shape[2:])
    groups, parts = call.integer("group", 1), call.integer("offset_group", 1)
    batch, channels, height, width = x.shape
    entries, (rows, columns) = prod(windows.kernel), offset.shape[2:]
    moved = offset.reshape(batch * parts, *windows.kernel, 2, rows, columns)
    down = moved[:, :, :, 0] + _positions(windows, 0, rows, x.dtype)
    across = moved[:, :, :, 1] + _positions(windows, 1, columns, x.dtype)
    grid = torch.stack([(2 * across + 1) / width - 1, (2 * down + 1) / height - 1], -1)
    grid = grid.reshape(batch * parts, entries * rows, columns, 2)
    image = x.reshape(batch * parts, channels // parts, height, width)
    read = F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)
    read = read.reshape(batch, parts, channels // parts, entries, rows, columns)
    if mask is not None:
        read = read * mask.reshape(batch, parts, 1, entries, rows, columns)
    lines = read.reshape(batch, groups, channels // groups * entries, rows * columns)
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1)
    summed = torch.matmul(kernels, lines).reshape(batch, weight.shape[0], rows, columns)
    return summed if bias is None else summed + bias.reshape(-1, 1, 1)


def _positions(windows: Windows, axis: int, count: Any, dtype: torch.dtype) -> Tensor:
    """Return where each window's entries lie along an axis, shaped for (row and column in kernel, row, column)."""
    inside: Tensor = torch.arange(windows.kernel[axis], dtype=dtype) * windows.dilations[axis] - windows.begin[axis]
    starts: Tensor = torch.arange(count, dtype=dtype) * windows.strides[axis]
    if axis == 0:
        return inside.reshape(-1, 1, 1, 1) + starts.reshape(-1, 1)
    return inside.reshape(-1, 1, 1) + starts
