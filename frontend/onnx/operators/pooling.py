"""Pooling: the largest, the mean or a norm of each window or of a whole channel, its inverse, and regions' means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frontend.onnx.arguments import sizes_of
from frontend.onnx.call import Call
from frontend.onnx.operators.convolution import Windows, convolved, padded, windows_of
from frontend.onnx.registry import operator

_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _pool_windows(call: Call, x: Tensor) -> tuple[Windows, bool]:
    """Return the windows of a pooling, and whether one that the image ends in counts."""
    windows = windows_of(call, x, call.integers("kernel_shape") or [])
    return windows, call.flag("ceil_mode") and call.text("auto_pad", "NOTSET") in ("NOTSET", "")


def _fits(windows: Windows, sizes: Sequence[Any], ceil: bool) -> bool:
    """Return whether torch's pooling takes the pads: as many on both sides, at most half a window."""
    half = all(2 * p <= k for p, k in zip(windows.begin, windows.kernel, strict=True)) if windows.even else False
    # Where the last window begins, torch would decide for the sizes that a symbol stands for while tracing.
    return half and (not ceil or all(isinstance(size, int) for size in sizes))


def _completed(windows: Windows, sizes: Sequence[Any]) -> Windows:
    """Return windows with the image continued to the end of the last one, if that begins before what was added."""
    end = []
    for i, size in enumerate(sizes):
        stride, span = windows.strides[i], windows.spans[i]
        before = size + windows.begin[i]
        steps = torch.sym_min(-((span - before - windows.end[i]) // stride), (before - 1) // stride)
        end.append(steps * stride + span - before)
    return replace(windows, end=end)


@operator("MaxPool")
def _max_pool(call: Call, x: Tensor) -> Any:
    """The second result is where the largest lies in the whole input as one vector."""
    windows, ceil = _pool_windows(call, x)
    sizes, dtype = x.shape[2:], x.dtype
    pads, fits = windows.begin, _fits(windows, sizes, ceil)
    if not fits:
        # Whole numbers of a byte have no value below all others, and as floats they are exact.
        image = x if x.is_floating_point() else x.float()
        whole = _completed(windows, sizes) if ceil else windows
        x, pads, ceil = padded(image, whole.begin, whole.end, -inf), [0] * windows.rank, False
    run, indices = _MAX[windows.rank], len(call.wanted) > 1 and call.wanted[1]
    found = run(x, windows.kernel, windows.strides, pads, windows.dilations, ceil, indices)
    if not indices:
        return found.to(dtype)
    values, places = found
    shift = [0] * windows.rank if fits else windows.begin
    return values.to(dtype), _flat(places, x.shape[2:], sizes, shift, call.flag("storage_order"))


def _flat(places: Tensor, wide: Sequence[Any], sizes: Sequence[Any], shift: Sequence[Any], columns: bool) -> Tensor:
    """Return places in a padded channel as places in the whole input; columns: its axes counted from the first."""
    along, rest = list[Tensor](), places
    for size, moved in zip(reversed(wide), reversed(shift), strict=True):
        along.insert(0, rest % size - moved)
        rest = rest // size
    found, step = torch.zeros_like(places), 1
    order = range(len(sizes)) if columns else reversed(range(len(sizes)))
    for axis in order:
        found, step = found + along[axis] * step, step * sizes[axis]
    channel = torch.arange(places.shape[0] * places.shape[1]).reshape(*places.shape[:2], *[1] * len(sizes))
    return found + channel * step


def _sums(x: Tensor, windows: Windows) -> Tensor:
    """Return the sum of each window, without pads, by a convolution of every channel with ones."""
    ones = torch.ones([x.shape[1], 1, *windows.kernel], dtype=x.dtype)
    plain = replace(windows, begin=[0] * windows.rank, end=[0] * windows.rank)
    return convolved(x, ones, None, plain, x.shape[1])


@operator("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    """What is added around the image counts if the node says so, what completes the last window never."""
    windows, ceil = _pool_windows(call, x)
    counted = call.flag("count_include_pad")
    run = _MEAN[windows.rank]
    if max(windows.dilations) == 1:
        if _fits(windows, x.shape[2:], ceil):
            return run(x, windows.kernel, windows.strides, windows.begin, ceil, counted)
        if counted and not ceil:
            return run(padded(x, windows.begin, windows.end), windows.kernel, windows.strides)
    whole = _completed(windows, x.shape[2:]) if ceil else windows
    inside = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    beyond = [0] * windows.rank
    if counted:
        inside = padded(inside, windows.begin, windows.end, 1)
        beyond = [w - e for w, e in zip(whole.end, windows.end, strict=True)]
        members = padded(inside, [0] * windows.rank, beyond)
    else:
        members = padded(inside, whole.begin, whole.end)
    return _sums(padded(x, whole.begin, whole.end), windows) / _sums(members, windows)


@operator("LpPool")
def _lp_pool(call: Call, x: Tensor) -> Tensor:
    windows, ceil = _pool_windows(call, x)
    whole = _completed(windows, x.shape[2:]) if ceil else windows
    return _root(_sums(padded(_powers(call, x), whole.begin, whole.end), windows), call.real("p", 2))


def _powers(call: Call, x: Tensor) -> Tensor:
    degree = call.real("p", 2)
    return x.abs() if degree == 1 else x.abs().pow(degree)


def _root(x: Tensor, degree: float) -> Tensor:
    return x if degree == 1 else x.pow(1 / degree)


@operator("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalLpPool")
def _global_lp_pool(call: Call, x: Tensor) -> Tensor:
    return _root(_powers(call, x).sum(list(range(2, x.ndim)), keepdim=True), call.real("p", 2))


@operator("MaxUnpool", raw=True)
def _max_unpool(call: Call, x: Any, places: Any, shape: Any = None) -> Tensor:
    """Each value goes to its place in the whole output as one vector, all else is 0."""
    kernel = call.integers("kernel_shape") or []
    rank = len(kernel)
    strides, pads = call.integers("strides") or [1] * rank, call.integers("pads") or [0] * (2 * rank)
    axes = zip(x.shape[2:], kernel, strides, pads[:rank], pads[rank:], strict=True)
    sizes = [*x.shape[:2], *((size - 1) * s + k - b - e for size, k, s, b, e in axes)]
    if shape is not None:
        wanted = sizes_of(call, shape, "its output shape")
        if wanted[-rank:] != sizes[-rank:]:
            # The suite reads the places in the smaller shape, and ONNX Runtime (pull request 2193) in the given one.
            raise call.refuse(f"its output shape {wanted} is not {sizes}, for which its places have no agreed meaning")
    flat = torch.zeros([prod(sizes)], dtype=x.dtype)
    return flat.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(sizes)


@operator("RoiAlign")
def _roi_align(call: Call, x: Tensor, regions: Tensor, images: Tensor) -> Tensor:
    """Each region is cut into cells and read at points in them, between entries by their weighted mean.

    With mode max, a point counts by the largest of its four weighted entries.
    """
    points, mode = call.integer("sampling_ratio", 0), call.text("mode", "avg")
    if points < 1:
        raise call.refuse("how many points it reads depends on the regions, for its sampling_ratio is 0")
    if mode not in ("avg", "max"):
        raise call.refuse(f"its mode is {mode}")
    rows, columns = call.integer("output_height", 1), call.integer("output_width", 1)
    half = call.text("coordinate_transformation_mode", "half_pixel" if call.version >= 16 else "") == "half_pixel"
    scaled = regions * call.real("spatial_scale", 1.0) - (0.5 if half else 0.0)
    downs = _axis_points(scaled[:, 1], scaled[:, 3], rows, points, x.shape[2], half)
    acrosses = _axis_points(scaled[:, 0], scaled[:, 2], columns, points, x.shape[3], half)
    image = images.long().reshape(-1, 1, 1)
    corners = []
    for down, weight_down in downs:
        for across, weight_across in acrosses:
            read = x[image, :, down[:, :, None], across[:, None, :]]
            corners.append(read * (weight_down[:, :, None] * weight_across[:, None, :])[..., None])
    stacked = torch.stack(corners)
    found = stacked.sum(0) if mode == "avg" else stacked.amax(0)
    cells = found.reshape(-1, rows, points, columns, points, x.shape[1])
    pooled = cells.mean([2, 4]) if mode == "avg" else cells.amax([2, 4])
    return pooled.permute(0, 3, 1, 2)


def _axis_points(
    start: Tensor, end: Tensor, cells: int, points: int, size: Any, half: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return the entry below and above each point along an axis, with their weights; (region, point)."""
    length = end - start if half else (end - start).clamp(min=1)
    place = (torch.arange(cells * points, dtype=start.dtype) + 0.5) / (cells * points)
    at = start[:, None] + length[:, None] * place
    inside = ((at >= -1) & (at <= size)).to(start.dtype)
    at = at.clamp(0, size - 1)
    low = at.floor()
    share = at - low
    high = (low + 1).clamp(max=size - 1)
    return [(low.long(), (1 - share) * inside), (high.long(), share * inside)]
