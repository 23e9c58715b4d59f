"""Shape arithmetic: operators on whole numbers that are known, or are sizes of inputs, as Python computes them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from math import prod
from typing import Any

import torch

from frontend.onnx.call import Call
from frontend.onnx.dtypes import torch_dtype
from frontend.onnx.registry import numbers
from frontend.onnx.values import MOST_INTS, Ints

_DECLINED: Any = NotImplemented


def _paired(*given: Ints) -> list[tuple[Any, ...]] | None:
    """Return the entries side by side, one for all repeated; None where lengths disagree."""
    count = max(len(g.values) for g in given)
    if any(len(g.values) not in (1, count) for g in given):
        return None
    return [tuple(g.values[i if len(g.values) > 1 else 0] for g in given) for i in range(count)]


def _elementwise(function: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """Return a rule that applies a function entry by entry."""

    def rule(call: Call, *given: Ints) -> Any:
        pairs = _paired(*given)
        if pairs is None or any(not _whole(g) for g in given):
            return _DECLINED
        found = [function(*pair) for pair in pairs]
        if any(v is None for v in found):
            return _DECLINED
        return Ints(tuple(found), max(g.rank for g in given), dtype or given[-1].dtype)

    return rule


def _whole(value: Ints) -> bool:
    """Return whether the entries are of a type whose arithmetic is Python's as long as nothing overflows."""
    return value.dtype in (torch.int64, torch.int32, torch.bool)


def _divided(a: Any, b: Any) -> Any:
    """Return a / b towards zero; sizes are not negative, so that they may be divided down."""
    if isinstance(b, int) and b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a // b


def _same(a: Any, b: Any) -> bool | None:
    """Return whether numbers are equal, None where that depends on sizes that are not known."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return True if statically_known_true(a == b) else False if statically_known_true(a != b) else None


def _ordered(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], bool | None]:
    def found(a: Any, b: Any) -> bool | None:
        return bool(compare(a, b)) if isinstance(a, int) and isinstance(b, int) else None

    return found


def _least(*values: Any) -> Any:
    return torch.sym_min(*values) if len(values) == 2 else min(values)


def _largest(*values: Any) -> Any:
    return torch.sym_max(*values) if len(values) == 2 else max(values)


for _names, _rule in {
    ("Add",): _elementwise(lambda a, b: a + b),
    ("Sub",): _elementwise(lambda a, b: a - b),
    ("Mul",): _elementwise(lambda a, b: a * b),
    ("Div",): _elementwise(_divided),
    ("Neg",): _elementwise(lambda a: -a),
    ("Abs",): _elementwise(abs),
    ("Identity",): _elementwise(lambda a: a),
    ("Min",): _elementwise(_least),
    ("Max",): _elementwise(_largest),
    ("Equal",): _elementwise(_same, torch.bool),
    ("Less",): _elementwise(_ordered(lambda a, b: a < b), torch.bool),
    ("LessOrEqual",): _elementwise(_ordered(lambda a, b: a <= b), torch.bool),
    ("Greater",): _elementwise(_ordered(lambda a, b: a > b), torch.bool),
    ("GreaterOrEqual",): _elementwise(_ordered(lambda a, b: a >= b), torch.bool),
    ("Not",): _elementwise(lambda a: not a, torch.bool),
    ("And",): _elementwise(lambda a, b: a and b, torch.bool),
    ("Or",): _elementwise(lambda a, b: a or b, torch.bool),
    ("Where",): _elementwise(lambda c, a, b: a if c else b),
}.items():
    numbers(*_names)(_rule)


@numbers("Mod")
def _mod(call: Call, a: Ints, b: Ints) -> Any:
    """The sign is the divisor's; the other kind is left to tensors."""
    if call.flag("fmod"):
        return _DECLINED
    return _elementwise(lambda x, y: x % y if not isinstance(y, int) or y else None)(call, a, b)


@numbers("Cast")
def _cast(call: Call, x: Ints) -> Any:
    to = torch_dtype(call.integer("to", 0))
    known = all(isinstance(v, int) for v in x.values)
    if to in (torch.int64, torch.int32) and _whole(x):
        return Ints(tuple(int(v) if isinstance(v, int) else v for v in x.values), x.rank, to)
    return Ints(tuple(v != 0 for v in x.values), x.rank, to) if to == torch.bool and known else _DECLINED


@numbers("Concat")
def _concat(call: Call, *parts: Ints) -> Any:
    if any(p.rank != 1 for p in parts) or sum(len(p.values) for p in parts) > MOST_INTS:
        return _DECLINED
    return Ints(tuple(v for p in parts for v in p.values), 1, parts[0].dtype)


@numbers("Gather")
def _gather(call: Call, x: Ints, index: Ints) -> Any:
    if x.rank != 1 or any(not isinstance(i, int) or not -len(x.values) <= i < len(x.values) for i in index.values):
        return _DECLINED
    return Ints(tuple(x.values[i] for i in index.values), index.rank, x.dtype)


@numbers("Slice")
def _slice(
    call: Call,
    x: Ints,
    starts: Ints | None = None,
    ends: Ints | None = None,
    axes: Ints | None = None,
    steps: Ints | None = None,
) -> Any:
    if starts is None or ends is None:
        return _DECLINED
    given = [part.values for part in (starts, ends, *([steps] if steps is not None else []))]
    if x.rank != 1 or any(len(v) != 1 or not isinstance(v[0], int) for v in given):
        return _DECLINED
    start, end, *step = (v[0] for v in given)
    return Ints(x.values[_range(start, end, step[0] if step else 1, len(x.values))], 1, x.dtype)


def _range(start: int, end: int, step: int, length: int) -> slice:
    """Return the slice; an end before the first entry means up to and with it, which Python writes as None."""
    if step < 0 and end < -length:
        return slice(start, None, step)
    return slice(start, end, step)


@numbers("Squeeze")
def _squeeze(call: Call, x: Ints, axes: Ints | None = None) -> Any:
    return Ints(x.values, 0, x.dtype) if len(x.values) == 1 else _DECLINED


@numbers("Unsqueeze")
def _unsqueeze(call: Call, x: Ints, axes: Ints | None = None) -> Any:
    count = len(call.integers("axes") or []) if axes is None else len(axes.values)
    return Ints(x.values, 1, x.dtype) if x.rank == 0 and count == 1 else _DECLINED


@numbers("Reshape")
def _reshape(call: Call, x: Ints, shape: Ints | None = None) -> Any:
    if shape is None:
        return _DECLINED
    if shape.values in ((), (1,), (-1,), (len(x.values),)) and (shape.values or len(x.values) == 1):
        return Ints(x.values, len(shape.values), x.dtype)
    return _DECLINED


@numbers("Shape")
def _shape(call: Call, x: Ints) -> Any:
    dims: tuple[int, ...] = (len(x.values),) if x.rank else ()
    return Ints(dims[slice(call.integer("start", 0), call.get("end"))])


@numbers("Size")
def _size(call: Call, x: Ints) -> Any:
    return Ints((len(x.values),), 0)


@numbers("ReduceProd", "ReduceSum")
def _reduced(call: Call, x: Ints, axes: Ints | None = None) -> Any:
    """Return the product or sum of all entries."""
    idle = call.flag("noop_with_empty_axes") and (axes is None or not axes.values) and not call.has("axes")
    if idle or not _whole(x):
        return _DECLINED
    found = prod(x.values) if call.op == "ReduceProd" else sum(x.values)
    return Ints((found,), x.rank if call.flag("keepdims", True) else 0, x.dtype)


@numbers("Range")
def _steps(call: Call, start: Ints, limit: Ints, delta: Ints) -> Any:
    ends = [v.values[0] for v in (start, limit, delta)]
    if any(not isinstance(v, int) for v in ends) or ends[2] == 0:
        return _DECLINED
    found = range(*ends)
    return Ints(tuple(found), 1, start.dtype) if len(found) <= MOST_INTS else _DECLINED


@numbers("ConstantOfShape")
def _filled(call: Call, shape: Ints) -> Any:
    """Return a vector of one whole number again and again."""
    value = call.get("value")
    entry = 0 if value is None else value.numpy().reshape(-1)[0]
    dtype = torch.float32 if value is None else torch_dtype(int(value.dtype))
    count = shape.values[0] if len(shape.values) == 1 else None
    if dtype != torch.int64 or not isinstance(count, int) or not 0 <= count <= MOST_INTS:
        return _DECLINED
    return Ints((int(entry),) * count)


@numbers("Expand")
def _expand(call: Call, x: Ints, shape: Ints) -> Any:
    dims = shape.values
    if len(x.values) != 1 or len(dims) != 1 or not isinstance(dims[0], int) or not 1 <= dims[0] <= MOST_INTS:
        return _DECLINED
    return Ints(x.values * dims[0], 1, x.dtype)


@numbers("Split")
def _split(call: Call, x: Ints, lengths: Ints | None = None) -> Any:
    asked = call.integers("split") if lengths is None else list(lengths.values)
    if x.rank != 1 or asked is None or any(not isinstance(n, int) for n in asked) or sum(asked) != len(x.values):
        return _DECLINED
    ends = [sum(asked[: i + 1]) for i in range(len(asked))]
    return tuple(Ints(x.values[a:b], 1, x.dtype) for a, b in zip_longest([0, *ends[:-1]], ends))
