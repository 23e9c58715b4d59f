"""The whole operator table: standard operators here, those of nomul from `nomul_ops` where it is there.

`nomul_ops` has `TABLE`, of the same form as those here, and `GROUPS`: functions of the program, and of what runs
uniform codes, that return `groups.Fused` for calls that are better emitted together.
"""

from __future__ import annotations

import importlib
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from backends.onnxruntime import attention, elementwise, experts, indexing, linear, reductions, shapes, sizes
from backends.onnxruntime.emitter import Entry, Uniform
from ir.text import op_name

_NOMUL = "backends.onnxruntime.nomul_ops"

STANDARD: dict[Any, Entry] = {
    **sizes.TABLE,
    **elementwise.TABLE,
    **shapes.TABLE,
    **indexing.TABLE,
    **reductions.TABLE,
    **linear.TABLE,
    **attention.TABLE,
    **experts.TABLE,
}


@cache
def whole_table() -> dict[Any, Entry]:
    """Return operator overload (or function on sizes) -> entry."""
    own = importlib.import_module(_NOMUL).TABLE if find_spec(_NOMUL) is not None else {}
    return {**STANDARD, **own}


def own_groups(uniform: Uniform) -> tuple[Any, ...]:
    """Return the functions of a program that find groups of nomul's operators."""
    found = importlib.import_module(_NOMUL).GROUPS if find_spec(_NOMUL) is not None else ()
    return tuple(partial(find, uniform=uniform) for find in found)


def op_names() -> frozenset[str]:
    """Return the names of all operators in the table, without overloads: `aten.linear`, `operator.add`."""
    return frozenset(op_name(target) for target in whole_table())


def overload_text(target: Any) -> str:
    """Return what a call calls as a reader knows it: `aten.add.Tensor`, `add`."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else str(getattr(target, "__name__", target))
