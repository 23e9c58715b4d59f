"""From one element type to another: by value, and by bits."""

from __future__ import annotations

import onnx_ir as onnx
import torch
from torch import Tensor

from frontend.onnx.call import Call
from frontend.onnx.dtypes import torch_dtype
from frontend.onnx.registry import operator


@operator("Cast")
def _cast(call: Call, x: Tensor) -> Tensor:
    """Floats lose their fraction, whole numbers their upper bits; a float outside a whole type's range is undefined."""
    return x.to(_target(call))


@operator("CastLike")
def _cast_like(call: Call, x: Tensor, model: Tensor) -> Tensor:
    return x.to(model.dtype)


@operator("BitCast")
def _bit_cast(call: Call, x: Tensor) -> Tensor:
    """The same bits as another type of the same width."""
    dtype = _target(call)
    if dtype.itemsize != x.dtype.itemsize:
        raise call.refuse(f"{x.dtype} has {8 * x.dtype.itemsize} bits, and {dtype} has {8 * dtype.itemsize}")
    return x.view(dtype)


def _target(call: Call) -> torch.dtype:
    """Return the type to cast to, which an attribute names by its number, before version 6 by its name."""
    given = call.get("to")
    if given is None:
        raise call.refuse("it does not say to which type")
    try:
        kind = onnx.DataType[call.text("to", "").upper()] if isinstance(given, (str, bytes)) else onnx.DataType(given)
    except (KeyError, ValueError):
        raise call.refuse(f"{given!r} names no type") from None
    dtype = torch_dtype(int(kind))
    if dtype is None:
        raise call.refuse(f"no tensor here has the type {kind.name}")
    return dtype
