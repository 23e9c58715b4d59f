"""Numbers on a grid of whole ones: to and from them, and products and convolutions of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frontend.onnx.arguments import axis_of
from frontend.onnx.call import Call
from frontend.onnx.operators.convolution import convolved, windows_of
from frontend.onnx.registry import operator

_GRIDS = (torch.uint8, torch.int8, torch.uint16, torch.int16)
_HALVES = (torch.float16, torch.bfloat16)


@operator("QuantizeLinear")
def _quantise(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The grid is that of the zero point, of the attribute output_dtype, or uint8."""
    grid = torch.uint8 if zero is None else zero.dtype
    if call.integer("output_dtype", 0):
        asked = call.dtype("output_dtype")
        if zero is not None and asked != zero.dtype:
            raise call.refuse(f"its zero point has type {zero.dtype}, and its result type {asked}")
        grid = asked
    working = call.dtype("precision") if call.integer("precision", 0) else scale.dtype
    if not working.is_floating_point:
        raise call.refuse(f"its scale has type {working}")
    if not call.integer("precision", 0) and torch.promote_types(x.dtype, working) != working:
        raise call.refuse(f"it divides {x.dtype} by a scale of {working}, a type with fewer digits")
    ratio = x.to(working) / _spread(call, scale, x).to(working)
    return _on_grid(call, ratio, None if zero is None else _spread(call, zero, x), grid)


@operator("DequantizeLinear")
def _dequantise(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if x.dtype not in (*_GRIDS, torch.int32):
        raise call.refuse(f"its input has type {x.dtype}")
    if zero is not None and zero.dtype != x.dtype:
        raise call.refuse(f"its input has type {x.dtype}, and its zero point {zero.dtype}")
    dtype = call.dtype("output_dtype") if call.integer("output_dtype", 0) else scale.dtype
    found = x.to(torch.float32)
    if zero is not None:
        found = found - _spread(call, zero, x).to(torch.float32)
    return (found * _spread(call, scale, x).to(torch.float32)).to(dtype)


@operator("DynamicQuantizeLinear")
def _dynamic(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The grid of uint8 covers the range of the input and 0; for an input of zeros the scale is 1/255."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = torch.where(high == low, 1.0, high - low) / 255.0
    zero = torch.round((-low / scale).clamp(0.0, 255.0))
    y = (torch.round(x / scale) + zero).clamp(0.0, 255.0)
    return y.to(torch.uint8), scale, zero.to(torch.uint8)


@operator("MatMulInteger")
def _matmul(call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return torch.matmul(_moved(a, _rows(a_zero)), _moved(b, _columns(b_zero)))


@operator("QLinearMatMul")
def _quantised_matmul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """Scales and zero points are for all, for rows of a, or for columns of b; those of the result for all."""
    if y_scale.numel() != 1 or y_zero.numel() != 1:
        raise call.refuse("its result has several scales or zero points")
    total = torch.matmul(_moved(a, _rows(a_zero)), _moved(b, _columns(b_zero)))
    factor = _rows(a_scale) * _columns(b_scale) / y_scale.reshape(())
    return _on_grid(call, total.to(torch.float32) * factor.to(torch.float32), y_zero.reshape(()), y_zero.dtype)


@operator("QLinearConv")
def _quantised_conv(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The weight's scale and zero point are for all or for each output channel; the bias is on the products' grid."""
    if any(t.numel() != 1 for t in (x_scale, x_zero, y_scale, y_zero)):
        raise call.refuse("its input or its result has several scales or zero points")
    windows = windows_of(call, x, w.shape[2:])
    across = [1] * (w.ndim - 1)
    rows = _moved(x, _single(x_zero))
    kernel = _moved(w, _single(w_zero) if w_zero.numel() == 1 else w_zero.reshape(-1, *across))
    if any(d != 1 for d in windows.dilations):
        # Torch has no dilated convolution of whole numbers; float64 holds such sums exactly.
        rows, kernel, bias = rows.double(), kernel.double(), None if bias is None else bias.double()
    total = convolved(rows, kernel, bias, windows, call.integer("group", 1))
    by_channel = _single(w_scale) if w_scale.numel() == 1 else w_scale.reshape(-1, *across[1:])
    factor = _single(x_scale) * by_channel / _single(y_scale)
    return _on_grid(call, total.to(torch.float32) * factor.to(torch.float32), _single(y_zero), y_zero.dtype)


def _moved(x: Tensor, zero: Tensor | None) -> Tensor:
    """Return whole numbers counted from their zero point, as int32."""
    wide = x.to(torch.int32)
    return wide if zero is None else wide - zero.to(torch.int32)


def _single(x: Tensor) -> Tensor:
    return x.reshape(())


def _rows(x: Any) -> Any:
    """Return what belongs to rows of a left factor so that it broadcasts: a vector has an entry for each row."""
    if x is None or x.ndim != 1:
        return x
    return x.reshape(()) if x.numel() == 1 else x.unsqueeze(-1)


def _columns(x: Any) -> Any:
    """Return what belongs to columns of a right factor so that it broadcasts."""
    return x.reshape(()) if x is not None and x.numel() == 1 else x


def _spread(call: Call, value: Tensor, x: Tensor) -> Tensor:
    """Return a scale or zero point so that it broadcasts over x: for all, for places of an axis, or for blocks."""
    if value.numel() == 1:
        return value.reshape(())
    axis, block = axis_of(call.integer("axis", 1), x.ndim), call.integer("block_size", 0)
    if not 0 <= axis < x.ndim:
        raise call.refuse(f"its axis is {call.integer('axis', 1)}, and its input has rank {x.ndim}")
    if block > 0:
        if value.ndim != x.ndim:
            raise call.refuse(f"its blocks have scales of rank {value.ndim} for an input of rank {x.ndim}")
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if value.ndim != 1:
        raise call.refuse(f"its scale or zero point has rank {value.ndim}, and no size of blocks is given")
    return value.reshape([-1 if d == axis else 1 for d in range(x.ndim)])


def _on_grid(call: Call, x: Tensor, zero: Tensor | None, grid: torch.dtype) -> Tensor:
    """Return numbers rounded to even, moved by a zero point and clamped to a type; halves are widened for that."""
    if grid not in _GRIDS:
        raise call.refuse(f"its result has type {grid}")
    found = torch.round(x)
    found = found.to(torch.float32) if x.dtype in _HALVES else found
    if zero is not None:
        found = found + zero.to(found.dtype)
    bounds = torch.iinfo(grid)
    return found.clamp(bounds.min, bounds.max).to(torch.int32).to(grid)
