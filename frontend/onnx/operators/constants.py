"""Tensors that come from attributes and sizes alone: constants, filled tensors and ranges."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from frontend.onnx.arguments import number_of, sizes_of
from frontend.onnx.call import Call
from frontend.onnx.dtypes import torch_dtype
from frontend.onnx.registry import operator
from frontend.onnx.tensors import tensor_of
from frontend.onnx.values import MOST_INTS, Ints, as_tensor

_NARROW = (torch.float16, torch.bfloat16)


@operator("Constant")
def _constant(call: Call) -> Any:
    """A stored tensor, or numbers given as such."""
    if call.has("value"):
        return _stored(call.get("value"))
    if call.has("value_int"):
        return Ints((call.integer("value_int", 0),), 0)
    if call.has("value_ints"):
        listed = call.integers("value_ints") or []
        return Ints(tuple(listed)) if len(listed) <= MOST_INTS else torch.tensor(listed, dtype=torch.int64)
    if call.has("value_float"):
        return torch.tensor(call.real("value_float", 0.0), dtype=torch.float32)
    if call.has("value_floats"):
        return torch.tensor([float(v) for v in call.get("value_floats")], dtype=torch.float32)
    raise call.refuse(f"its value is {', '.join(call.attributes) or 'absent'}, and no tensor here can hold that")


def _stored(value: Any) -> Any:
    """Return a stored tensor; few whole numbers stay numbers, since tensors made while tracing lose their values."""
    dtype, array = torch_dtype(int(value.dtype)), value.numpy()
    if dtype is None or dtype.is_floating_point or dtype.is_complex or array.ndim > 1 or array.size > MOST_INTS:
        return tensor_of(value)
    return Ints(tuple(array.reshape(-1).tolist()), array.ndim, dtype)


@operator("ConstantOfShape", raw=True)
def _constant_of_shape(call: Call, shape: Any) -> Tensor:
    """One value everywhere, without `value` a 0 in float32."""
    value = call.get("value")
    dims = sizes_of(call, shape, "its shape")
    if value is None:
        return torch.zeros(dims)
    dtype = torch_dtype(int(value.dtype))
    if dtype is None or int(value.size) != 1:
        raise call.refuse(f"its value has type {value.dtype.name} and {value.size} entries")
    return torch.full(dims, value.numpy().reshape(-1)[0].item(), dtype=dtype)


@operator("Range", raw=True)
def _range(call: Call, start: Any, limit: Any, delta: Any) -> Tensor:
    """Entry i is start + i * delta, as long as that is before the limit."""
    dtype = start.dtype
    first, end, step = (number_of(call, v, "its start, limit or delta") for v in (start, limit, delta))
    if isinstance(step, (int, float)) and step == 0:
        raise call.refuse("its delta is 0")
    if not dtype.is_floating_point:
        return torch.arange(first, _reached(first, end, step), step, dtype=dtype)
    count = max(0, ceil((end - first) / step))
    wide = call.dtype("stash_type", torch.float32) if dtype in _NARROW else dtype
    at = torch.arange(count, dtype=wide)
    by, begin = (as_tensor(v).reshape(()).to(wide) for v in (delta, start))
    entries: Tensor = at * by + begin
    return entries.to(dtype)


def _reached(first: Any, end: Any, step: Any) -> Any:
    """Return an end that is not on the wrong side of the start, which torch does not take for an empty range."""
    return torch.sym_max(first, end) if step > 0 else torch.sym_min(first, end)
