"""Sequences as Python lists, and optional values as the value or None, both known in length and presence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frontend.onnx.arguments import axis_of, size_of, sizes_of
from frontend.onnx.call import Call
from frontend.onnx.registry import operator
from frontend.onnx.values import Ints, as_tensor


@operator("SequenceConstruct", raw=True)
def _construct(call: Call, *entries: Any) -> list[Any]:
    return list(entries)


@operator("SequenceEmpty")
def _empty(call: Call) -> list[Any]:
    return []


@operator("SequenceAt", raw=True)
def _at(call: Call, sequence: list[Any], position: Any) -> Any:
    return sequence[_position(call, position, len(sequence))]


@operator("SequenceInsert", raw=True)
def _insert(call: Call, sequence: list[Any], entry: Any, position: Any = None) -> list[Any]:
    """Without a position the entry comes last; a negative position is counted from the back, before what is there."""
    count = len(sequence)
    at = count if position is None else size_of(call, position, "its position")
    if not -count <= at <= count:
        raise call.refuse(f"its position {at} is not in a sequence of {count}")
    at = axis_of(at, count)
    return [*sequence[:at], entry, *sequence[at:]]


@operator("SequenceErase", raw=True)
def _erase(call: Call, sequence: list[Any], position: Any = None) -> list[Any]:
    """Without a position the last entry goes."""
    at = _position(call, position, len(sequence))
    return [*sequence[:at], *sequence[at + 1 :]]


def _position(call: Call, position: Any, count: int) -> int:
    """Return a position counted from the front, the last where none is given."""
    at = -1 if position is None else size_of(call, position, "its position")
    if not isinstance(at, int) or not -count <= at < count:
        raise call.refuse(f"its position {at} is not in a sequence of {count}")
    return axis_of(at, count)


@operator("SequenceLength", raw=True)
def _length(call: Call, sequence: list[Any]) -> Ints:
    return Ints((len(sequence),), 0)


@operator("SplitToSequence", raw=True)
def _split_to_sequence(call: Call, x: Any, split: Any = None) -> list[Tensor]:
    """Parts of given sizes, or all of one size but a smaller last; without sizes single entries."""
    x = as_tensor(x)
    axis = axis_of(call.integer("axis", 0), x.ndim)
    if split is not None and (split.rank if isinstance(split, Ints) else split.ndim):
        return list(torch.split(x, sizes_of(call, split, "its split"), axis))
    if not isinstance(x.shape[axis], int):
        raise call.refuse(f"the size of axis {axis}, and so the number of parts, is not known")
    if split is None and not call.flag("keepdims", True):
        return list(x.unbind(axis))
    size = 1 if split is None else size_of(call, split, "its split")
    if not isinstance(size, int) or size < 1:
        raise call.refuse(f"its split is {size} and must be a known number above 0")
    return list(torch.split(x, size, axis))


@operator("ConcatFromSequence")
def _concat_from_sequence(call: Call, sequence: list[Tensor]) -> Tensor:
    """Join entries along an axis of theirs, or with `new_axis` along one that is added."""
    if not sequence:
        raise call.refuse("its sequence is empty")
    join = torch.stack if call.flag("new_axis") else torch.cat
    return join(sequence, call.integer("axis", 0))


@operator("Optional", raw=True)
def _optional(call: Call, value: Any = None) -> Any:
    return value


@operator("OptionalGetElement", raw=True)
def _get_element(call: Call, value: Any = None) -> Any:
    if value is None:
        raise call.refuse("its optional value is absent")
    return value


@operator("OptionalHasElement", raw=True)
def _has_element(call: Call, value: Any = None) -> Ints:
    return Ints((value is not None,), 0, torch.bool)
