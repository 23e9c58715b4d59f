"""Operator schemas: arguments in their full positional form, and the overload a packet call means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from ir.errors import InvariantError
from ir.types import TYPE, ScalarType, TensorType

_MISSING = object()
_ZEROS: dict[str, Any] = {"int": 1, "float": 1.0, "bool": True}


@cache
def _slots(overload: OpOverload) -> tuple[tuple[str, ...], tuple[Any, ...], tuple[int | None, ...], int]:
    """Return names, defaults, sizes of lists that one number may stand for, and how many may be positional."""
    arguments = overload._schema.arguments
    names = tuple(a.name for a in arguments)
    defaults = tuple(a.default_value if a.has_default_value() else _MISSING for a in arguments)
    sizes = tuple(a.N for a in arguments)  # type: ignore[attr-defined]
    return names, defaults, sizes, sum(not a.kwarg_only for a in arguments)


def bound_args(overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return one value per schema argument, defaults filled in, or None when the arguments do not fit the schema."""
    names, defaults, sizes, positional = _slots(overload)
    if len(args) > positional:
        return None
    values = [*args, *defaults[len(args) :]]
    for name, value in kwargs.items():
        if name not in names or names.index(name) < len(args):
            return None
        values[names.index(name)] = value
    if any(value is _MISSING for value in values):
        return None
    for index, size in enumerate(sizes):
        # ATen lets `dim=-1` stand for `dim=[-1]`, and export writes either.
        if size is not None and isinstance(values[index], (int, float)):
            values[index] = [values[index]] * size
    return tuple(values)


def packet_of(target: Any) -> Any:
    """Return the overload packet of an overload, and any other target as it is."""
    return target.overloadpacket if isinstance(target, OpOverload) else target


def resolve(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the overload that a call of a packet with these arguments means, and any other target as it is.

    Raises InvariantError when no overload takes them.
    """
    if not isinstance(target, OpOverloadPacket):
        return target
    overloads = target.overloads()
    if len(overloads) == 1:
        return getattr(target, overloads[0])
    try:
        stand_ins = [_stand_in(a) for a in args], {k: _stand_in(v) for k, v in kwargs.items()}
        name = torch._C._jit_resolve_packet(target._qualified_op_name, *stand_ins[0], **stand_ins[1])
    except RuntimeError as error:
        raise InvariantError(
            f"no overload of {target} takes these arguments",
            where=f"args {tuple(args)}, kwargs {dict(kwargs)}",
            why=str(error).strip().splitlines()[0],
            fix="name the overload, as in aten.mul.Tensor",
        ) from None
    return getattr(target, name or "default")


def _stand_in(value: Any) -> Any:
    """Return a concrete value of the kind an argument has, since overloads are chosen by kind alone."""
    if isinstance(value, fx.Node):
        return _of_type(value.meta.get(TYPE))
    if isinstance(value, (list, tuple)):
        return [_stand_in(v) for v in value]
    return value


def _of_type(kind: Any) -> Any:
    if isinstance(kind, ScalarType):
        return _ZEROS[kind.kind]
    if isinstance(kind, tuple):
        return [_of_type(k) for k in kind]
    if isinstance(kind, TensorType):
        return torch.empty((1,) * len(kind.dims), dtype=kind.dtype, device="meta")
    return None
