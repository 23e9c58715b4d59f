"""What rules need of inputs that must be known when a model is imported: sizes, axes, scalars."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from frontend.onnx.call import Call
from frontend.onnx.values import Ints, entries


def sizes_of(call: Call, value: Any, what: str) -> list[Any]:
    """Return whole numbers that are known or sizes of inputs, one or many; raises Unknown for numbers from data."""
    if isinstance(value, Ints):
        return list(value.values)
    constant = constant_of(value)
    if constant is None:
        raise call.unknown(what)
    return [int(v) for v in entries(constant)]


def size_of(call: Call, value: Any, what: str) -> Any:
    """Return one whole number; raises as `sizes_of`, and Refused where there are several."""
    found = sizes_of(call, value, what)
    if len(found) != 1:
        raise call.refuse(f"{what} must be one number, and there are {len(found)}")
    return found[0]


def number_of(call: Call, value: Any, what: str) -> Any:
    """Return a scalar as a Python number; raises Unknown where data decides it."""
    if isinstance(value, Ints):
        return size_of(call, value, what)
    constant = constant_of(value)
    if constant is None:
        raise call.unknown(what)
    return entries(constant)[0]


def constant_of(value: Any) -> Tensor | None:
    """Return a tensor whose entries are known while tracing, None for one that stands for data or a weight.

    What is traced is of a subclass of torch's, while constants are plain tensors.
    """
    if isinstance(value, Ints):
        return value.tensor() if all(isinstance(v, int) for v in value.values) else None
    return value if type(value) is Tensor else None


def axis_of(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + rank if axis < 0 else axis
