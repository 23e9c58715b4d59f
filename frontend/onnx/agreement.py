"""Inputs that an operator's definition wants to be of one type: torch would promote them, and ONNX has no such rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import onnx
import torch

from frontend.onnx.call import Call
from frontend.onnx.values import Ints


def check_types(call: Call, inputs: Sequence[Any]) -> None:
    """Raise Refused where inputs that share a type variable in the operator's schema have different types."""
    letters = _variables(call.op, call.version)
    seen: dict[str, torch.dtype] = {}
    for place, value in enumerate(inputs if letters else ()):
        if not isinstance(value, (torch.Tensor, Ints)):
            continue
        letter = letters[min(place, len(letters) - 1)]
        if letter and seen.setdefault(letter, value.dtype) != value.dtype:
            raise call.refuse(f"its inputs are of types {seen[letter]} and {value.dtype}, which must be the same")


@cache
def _variables(op: str, version: int) -> tuple[str, ...]:
    """Return the type variable of each input, empty where a type is fixed; the last one holds for all that follow."""
    try:
        schema = onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return ()
    return tuple("" if "(" in i.type_str or (not i.is_homogeneous) else i.type_str for i in schema.inputs)
