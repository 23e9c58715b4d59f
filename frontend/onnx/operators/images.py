"""Images read at other points: resizing, and grids of points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from frontend.onnx.arguments import axis_of, constant_of, sizes_of
from frontend.onnx.call import Call
from frontend.onnx.registry import operator
from frontend.onnx.values import entries

# By how many axes after the second: torch's name of linear interpolation.
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_HALF = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel")
_TRANSFORMS = (*_HALF, "align_corners", "asymmetric", "tf_crop_and_resize")
_NEAREST: dict[str, Callable[[Any], Any]] = {
    "round_prefer_floor": lambda x: -((0.5 - x) // 1),
    "round_prefer_ceil": lambda x: (x + 0.5) // 1,
    "floor": lambda x: x // 1,
    "ceil": lambda x: -(-x // 1),
}


@dataclass(frozen=True)
class _Axis:
    """One axis of a resized tensor.

    size, out: entries before and after, which may be symbolic; scale: given, None where the sizes are; part: which part
    of the axis is read, as fractions of it.
    """

    axis: int
    size: Any
    out: Any
    scale: float | None
    part: tuple[float, float] = (0.0, 1.0)

    @property
    def known(self) -> bool:
        """Whether the sizes are numbers."""
        return isinstance(self.size, int) and isinstance(self.out, int)

    @property
    def ratio(self) -> Any:
        """Entries after for each before."""
        return self.out / self.size if self.scale is None else self.scale

    @property
    def kept(self) -> bool:
        """Whether the axis stays as it is."""
        same = self.out is self.size or (self.known and self.out == self.size)
        return same and self.scale in (None, 1.0) and self.part == (0.0, 1.0)

    @property
    def whole(self) -> bool:
        """Whether the scale, if one is given, leads to a whole number of entries."""
        return self.scale is None or (self.known and self.size * self.scale == self.out) or self.scale.is_integer()

    @property
    def many(self) -> bool:
        """Whether there surely is more than one entry after."""
        return self.out > 1 if self.known else (self.times or 0) > 1

    @property
    def times(self) -> int | None:
        """By which whole number the axis grows, None where it does otherwise."""
        if self.scale is not None:
            return int(self.scale) if self.scale.is_integer() else None
        return self.out // self.size if self.known and self.size and self.out % self.size == 0 else None


@dataclass(frozen=True)
class _Style:
    """How a tensor is resized, as the attributes of Resize say."""

    mode: str
    transform: str
    rounding: str
    antialias: bool
    exclude: bool
    cubic: float
    beyond: float


def _style(call: Call) -> _Style:
    mode = {"bilinear": "linear"}.get(call.text("mode", "nearest"), call.text("mode", "nearest"))
    old = call.version < 11
    style = _Style(
        mode,
        "asymmetric" if old else call.text("coordinate_transformation_mode", "half_pixel"),
        "floor" if old else call.text("nearest_mode", "round_prefer_floor"),
        call.flag("antialias"),
        call.flag("exclude_outside"),
        call.real("cubic_coeff_a", -0.75),
        call.real("extrapolation_value", 0.0),
    )
    if mode not in ("nearest", "linear", "cubic") or (mode == "nearest" and style.antialias):
        raise call.refuse(f"its mode is {mode}, antialias {style.antialias}")
    if style.transform not in _TRANSFORMS or style.rounding not in _NEAREST:
        raise call.refuse(f"its points are transformed by {style.transform} and rounded by {style.rounding}")
    return style


@operator("Upsample", raw=True)
def _upsample(call: Call, x: Any, scales: Any = None) -> Tensor:
    if call.version < 7:
        raise call.refuse("before version 7 it has other attributes")
    given = call.get("scales") if scales is None else _reals(call, scales, "its scales")
    return _resized(call, x, [_scaled(axis, x.shape[axis], float(s)) for axis, s in enumerate(given)])


@operator("Resize", raw=True)
def _resize(call: Call, x: Any, *rest: Any) -> Tensor:
    if call.version < 11:
        roi, scales, sizes = None, rest[0], None
    else:
        roi, scales, sizes = [*rest, None, None, None][:3]
    axes = [axis_of(a, x.ndim) for a in call.integers("axes") or range(x.ndim)]
    if _given(scales):
        factors = _reals(call, scales, "its scales")
        plan = [_scaled(a, x.shape[a], float(f)) for a, f in zip(axes, factors, strict=True)]
    elif _given(sizes):
        outs = _kept_aspect(call, [x.shape[a] for a in axes], sizes_of(call, sizes, "its sizes"))
        plan = [_Axis(a, x.shape[a], out, scale) for a, (out, scale) in zip(axes, outs, strict=True)]
    else:
        raise call.refuse("it has neither scales nor sizes")
    if call.text("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        if _given(scales):
            raise call.refuse("ONNX and its reference disagree on the size of what is cut out by scales")
        parts = _reals(call, roi, "its region")
        pairs = zip(plan, parts[: len(axes)], parts[len(axes) :], strict=True)
        plan = [_Axis(p.axis, p.size, p.out, p.scale, (begin, end)) for p, begin, end in pairs]
    return _resized(call, x, plan)


def _given(value: Any) -> bool:
    """Return whether an input is there and not empty, as which older models leave it out."""
    return value is not None and not (isinstance(value, Tensor) and value.shape[0] == 0)


def _reals(call: Call, value: Any, what: str) -> list[float]:
    constant = constant_of(value)
    if constant is None:
        raise call.unknown(what)
    return [float(v) for v in entries(constant)]


def _scaled(axis: int, size: Any, scale: float) -> _Axis:
    """Return an axis grown by a factor; the product is rounded as ONNX infers shapes, in single precision."""
    if scale.is_integer():
        out = size if scale == 1 else size * int(scale)
    elif (1 / scale).is_integer():
        out = size // int(1 / scale)
    else:
        out = floor(np.float32(size) * np.float32(scale)) if isinstance(size, int) else floor(size * scale)
    return _Axis(axis, size, out, scale)


def _kept_aspect(call: Call, sizes: list[Any], wanted: list[Any]) -> list[tuple[Any, float | None]]:
    """Return each axis' size and scale where sizes are wanted, all scaled alike if the node says so."""
    policy = call.text("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [(out, None) for out in wanted]
    if policy not in ("not_larger", "not_smaller") or not all(isinstance(v, int) for v in [*sizes, *wanted]):
        raise call.refuse(f"its keep_aspect_ratio_policy is {policy}, for sizes {wanted} of {sizes}")
    ratios = [Fraction(out, size) for out, size in zip(wanted, sizes, strict=True)]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [(floor(scale * size + Fraction(1, 2)), float(scale)) for size in sizes]


def _resized(call: Call, x: Tensor, plan: Sequence[_Axis]) -> Tensor:
    """Return a tensor resized along axes, by torch's own function where that reads the same points."""
    style = _style(call)
    plan = [axis for axis in plan if not axis.kept]
    if not plan:
        return x
    if style.mode != "nearest" and not x.is_floating_point():
        raise call.refuse("how means of whole numbers are rounded is not agreed")
    short = x.dtype in (torch.float16, torch.bfloat16) and style.mode != "nearest"
    found = _by_torch(x.float() if short else x, plan, style)
    if found is None:
        found = x.float() if short else x
        for axis in plan:
            found = _along(call, found, axis, style)
    return found.to(x.dtype)


def _by_torch(x: Tensor, plan: Sequence[_Axis], style: _Style) -> Tensor | None:
    """Return a tensor resized by `interpolate`, None where it would read other points."""
    rank = x.ndim - 2
    if rank not in _LINEAR or any(p.axis < 2 for p in plan) or not x.is_floating_point():
        return None
    found = {p.axis: p for p in plan}
    every = [found.get(a, _Axis(a, x.shape[a], x.shape[a], None)) for a in range(2, x.ndim)]
    sizes = [p.out for p in every]
    if style.mode == "nearest":
        return F.interpolate(x, sizes, mode="nearest") if all(_repeats(p, style) for p in plan) else None
    cubic = style.mode == "cubic"
    if style.antialias or style.exclude or (cubic and (rank != 2 or style.cubic != -0.75)):
        return None
    if not all(p.whole for p in plan) or style.transform not in (*_HALF, "align_corners"):
        return None
    # Of one entry alone torch reads the middle, and ONNX's torch-like form of the half pixel the first.
    if style.transform == "pytorch_half_pixel" and not all(p.many for p in plan):
        return None
    return F.interpolate(
        x, sizes, mode="bicubic" if cubic else _LINEAR[rank], align_corners=style.transform == "align_corners"
    )


def _repeats(axis: _Axis, style: _Style) -> bool:
    """Return whether the nearest entries along an axis are each one so and so many times."""
    # As many times as torch, which computes in single precision, surely finds the right entry.
    if axis.times is None or axis.times > 16:
        return False
    if style.transform == "asymmetric":
        return style.rounding == "floor"
    return style.transform in ("half_pixel", "half_pixel_symmetric") and style.rounding.startswith("round")


def _along(call: Call, x: Tensor, axis: _Axis, style: _Style) -> Tensor:
    """Return a tensor resized along one axis: each entry a weighted sum of some, all read at once."""
    if style.mode == "nearest" and call.version < 11 and not (isinstance(axis.ratio, float) and axis.ratio >= 1):
        raise call.refuse("before version 11 ONNX does not tell which entry is the nearest where there are fewer")
    if style.antialias and not (axis.known or axis.scale is not None):
        raise call.refuse("how many entries it takes a mean of depends on sizes that are not known")
    at = _points(call, axis, style)
    if style.mode == "nearest":
        chosen = _NEAREST[style.rounding](at).clip(0, axis.size - 1)
        found = x.index_select(axis.axis, _indices(chosen))
    else:
        places, weights = _weights(at, axis, style)
        read = x.index_select(axis.axis, _indices(places.clip(0, axis.size - 1)).reshape(-1))
        shape = [1] * axis.axis + list(weights.shape) + [1] * (x.ndim - axis.axis - 1)
        parts = read.reshape(*x.shape[: axis.axis], *weights.shape, *x.shape[axis.axis + 1 :])
        found = (parts * torch.as_tensor(weights).to(x.dtype).reshape(shape)).sum(axis.axis + 1)
    if style.transform != "tf_crop_and_resize":
        return found
    inside = torch.as_tensor((at >= 0) & (at <= axis.size - 1)).reshape([-1] + [1] * (x.ndim - axis.axis - 1))
    return torch.where(inside, found, torch.scalar_tensor(style.beyond, dtype=x.dtype))


def _indices(values: Any) -> Tensor:
    return torch.as_tensor(values).to(torch.int64)


def _points(call: Call, axis: _Axis, style: _Style) -> Any:
    """Return where along an axis each new entry is read; NumPy computes it where the sizes are known, else torch."""
    x = np.arange(axis.out, dtype=np.float64) if axis.known else torch.arange(axis.out, dtype=torch.float64)
    size, out, transform = axis.size, axis.out, style.transform
    # The width may be a fraction where a scale is given.
    width = out if axis.scale is None else size * axis.scale
    if transform == "asymmetric":
        return x * size / out if axis.scale is None else x / axis.scale
    if transform == "align_corners":
        # Where there is only the entry 0, what it is divided by is the same.
        return x * (size - 1) / torch.sym_max(width - 1, 1)
    if transform == "tf_crop_and_resize":
        if not axis.known:
            raise call.refuse("what is cut out depends on sizes that are not known")
        begin, end = axis.part
        if out == 1:
            return x * 0 + 0.5 * (begin + end) * (size - 1)
        return begin * (size - 1) + x * (end - begin) * (size - 1) / (width - 1)
    middle = ((x + 0.5) * size / out if axis.scale is None else (x + 0.5) / axis.scale) - 0.5
    if transform == "half_pixel_symmetric" and not axis.whole:
        return middle + size / 2 * (1 - out / width)
    if transform == "pytorch_half_pixel" and not axis.many:
        return _first_alone(call, middle, axis, style)
    return middle


def _first_alone(call: Call, middle: Any, axis: _Axis, style: _Style) -> Any:
    """Return points as torch's form of the half pixel has them: the first entry where there is only one."""
    if style.mode == "cubic":
        raise call.refuse("ONNX and its reference disagree on where it reads a single entry")
    if axis.known:
        return middle * 0 if axis.out == 1 and axis.whole else middle
    if axis.scale is not None:
        raise call.refuse("whether it gives a single entry depends on sizes that are not known")
    return middle * torch.sym_min(axis.out - 1, 1)


def _weights(at: Any, axis: _Axis, style: _Style) -> tuple[Any, Any]:
    """Return the entries that count for each point and their weights, both (point, entry)."""
    reach = 1 if style.mode == "linear" else 2
    shrink = min(1.0, axis.ratio) if style.antialias else 1.0
    first = 1 - ceil(reach / shrink)
    near = np.arange(first, 2 - first, dtype=np.float64)
    low = at // 1
    offsets = near if isinstance(at, np.ndarray) else torch.from_numpy(near)
    distance = abs((at - low)[:, None] - offsets) * shrink
    weights = (1 - distance).clip(0, None) if reach == 1 else _cubic(distance, style.cubic)
    places = low[:, None] + offsets
    if style.exclude:
        weights = weights * ((places >= 0) & (places <= axis.size - 1))
    return places, weights / weights.sum(-1)[:, None]


def _cubic(x: Any, a: float) -> Any:
    """Return the weight of an entry by its distance, 0 from 2 on.

    From: Keys 1981, "Cubic convolution interpolation for digital image processing", equation 4.
    """
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return near * (x <= 1) + far * ((x > 1) & (x < 2))


_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


@operator("GridSample")
def _grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    """The grid's last axis is a point in the image, its last axis first, from -1 to 1."""
    mode = _MODES.get(call.text("mode", "linear"))
    padding, corners = call.text("padding_mode", "zeros"), call.flag("align_corners")
    rank = x.ndim - 2
    if mode is None or padding not in ("zeros", "border", "reflection") or not x.is_floating_point():
        raise call.refuse(f"its mode is {call.text('mode', '')}, its padding {padding} and its input {x.dtype}")
    if rank not in (1, 2, 3) or (mode == "bicubic" and rank == 3):
        raise call.refuse(f"its mode {mode} is not known for {rank} axes")
    dtype = torch.promote_types(x.dtype, grid.dtype)
    image, points = x.to(dtype), grid.to(dtype)
    if mode == "bicubic" and padding == "border":
        points = _on_border(points, x.shape[2:], corners)
    if rank == 1:
        # An image of one row, read in the middle of it.
        image, points = (
            image[:, :, None],
            torch.stack([points[:, None, :, 0], torch.zeros_like(points[:, None, :, 0])], -1),
        )
    found = F.grid_sample(image, points, mode, padding, corners)
    return (found[:, :, 0] if rank == 1 else found).to(x.dtype)


def _on_border(points: Tensor, sizes: Sequence[Any], corners: bool) -> Tensor:
    """Return points with those outside an image moved to the middle of its outermost entries, as ONNX does first."""
    if corners:
        return points.clamp(-1, 1)
    last = torch.stack([torch.scalar_tensor(1 - 1 / size, dtype=points.dtype) for size in reversed(sizes)])
    return torch.where(points.abs() > 1, points.sign() * last, points)


@operator("AffineGrid", raw=True)
def _affine_grid(call: Call, theta: Any, size: Any) -> Tensor:
    return F.affine_grid(theta, sizes_of(call, size, "its size"), call.flag("align_corners"))


@operator("NonMaxSuppression", raw=True)
def _non_max_suppression(call: Call, *inputs: Any) -> Tensor:
    raise call.refuse("how many boxes it gives depends on data")
