"""Element by element: arithmetic, powers, rounding, bits, running sums, and the functions of one value."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from frontend.onnx.arguments import axis_of, constant_of, number_of, size_of
from frontend.onnx.call import Call
from frontend.onnx.registry import operator
from frontend.onnx.values import as_tensor

_One = Callable[[Tensor], Tensor]
_Two = Callable[[Tensor, Tensor], Tensor]

# Unsigned types that torch has no arithmetic for, and the types to compute in; 64 bits keep their pattern.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
_SIGN = -(2**63)
_MOST = 2**63 - 1
# What limits of Clip are where they are left out, before they became inputs.
_LARGEST = 3.4028234663852886e38


def signed(x: Tensor) -> Tensor:
    """Return a wide unsigned tensor as a signed one: the same numbers, for 64 bits the same bits."""
    return x.to(_WIDER[x.dtype]) if x.dtype in _WIDER else x


def ordered(x: Tensor) -> Tensor:
    """Return as `signed`, 64 bits with their sign flipped, so that comparing gives what it gives without signs."""
    return torch.bitwise_xor(signed(x), _SIGN) if x.dtype == torch.uint64 else signed(x)


def wrapping(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function whose low bits depend on low bits only, such as a sum, to tensors of one type."""
    dtype = tensors[0].dtype
    return function(*map(signed, tensors)).to(dtype) if dtype in _WIDER else function(*tensors)


def choosing(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Apply a function that picks among tensors of one type by their order, such as a maximum."""
    dtype = next(x.dtype for x in tensors if x is not None)
    if dtype not in _WIDER:
        return function(*tensors)
    found = function(*(None if x is None else ordered(x) for x in tensors))
    return (torch.bitwise_xor(found, _SIGN) if dtype == torch.uint64 else found).to(dtype)


def aligned(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Return the second operand so that it broadcasts: before version 7 its axes start at an axis of the first."""
    axis = call.get("axis")
    if call.version >= 7 or axis is None or not call.flag("broadcast"):
        return b
    after = a.ndim - axis_of(int(axis), a.ndim) - b.ndim
    return b.reshape([*b.shape, *[1] * max(after, 0)])


_ONE: dict[str, _One] = {
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_TWO: dict[str, _Two] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}
_CHOICES: dict[str, _Two] = {"Max": torch.maximum, "Min": torch.minimum}


def _enter_all() -> None:
    def one(function: _One) -> Any:
        return lambda call, x: function(x)

    def two(function: _Two) -> Any:
        return lambda call, a, b: wrapping(function, a, aligned(call, a, b))

    def choice(function: _Two) -> Any:
        return lambda call, *tensors: choosing(lambda *given: reduce(function, given), *tensors)

    for name, function in _ONE.items():
        operator(name)(one(function))
    for name, pair in _TWO.items():
        operator(name)(two(pair))
    for name, pair in _CHOICES.items():
        operator(name)(choice(pair))


_enter_all()


@operator("Identity", raw=True)
def _identity(call: Call, x: Any) -> Any:
    return x


@operator("Abs")
def _abs(call: Call, x: Tensor) -> Tensor:
    return torch.abs(x) if x.dtype.is_signed else x


@operator("Sign")
def _sign(call: Call, x: Tensor) -> Tensor:
    return torch.sign(x) if x.dtype.is_signed else torch.ne(x, 0).to(x.dtype)


@operator("BitwiseNot")
def _bitwise_not(call: Call, x: Tensor) -> Tensor:
    return wrapping(torch.bitwise_not, x)


@operator("Div")
def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Whole numbers are divided towards zero."""
    b = aligned(call, a, b)
    if a.is_floating_point():
        return torch.div(a, b)
    return wrapping(_divided64 if a.dtype == torch.uint64 else _divided, a, b)


@operator("Mod")
def _mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """The remainder of a quotient rounded down, which has the sign of the divisor; with fmod, rounded towards zero."""
    if call.flag("fmod"):
        return torch.fmod(a, b) if a.dtype.is_signed else wrapping(_unsigned_rest(a), a, b)
    if a.is_floating_point():
        # A remainder of zero has the divisor's sign too, which torch does not promise.
        return torch.copysign(torch.remainder(a, b), b)
    return torch.remainder(a, b) if a.dtype.is_signed else wrapping(_unsigned_rest(a), a, b)


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def _divided64(a: Tensor, b: Tensor) -> Tensor:
    """Divide bits that stand for 64-bit numbers without sign (Hacker's Delight, 9-3: half the dividend, then mend)."""
    large = b < 0
    rough = torch.bitwise_left_shift(_divided(_shifted64(a, torch.ones_like(a)), torch.where(large, 1, b)), 1)
    rough = torch.where(large, 0, rough)
    rest = torch.sub(a, torch.mul(rough, b))
    missed = torch.bitwise_xor(rest, _SIGN) >= torch.bitwise_xor(b, _SIGN)
    return torch.add(rough, missed.to(torch.int64))


def _unsigned_rest(a: Tensor) -> _Two:
    if a.dtype != torch.uint64:
        return torch.remainder
    return lambda x, y: torch.sub(x, torch.mul(_divided64(x, y), y))


@operator("BitShift")
def _bit_shift(call: Call, x: Tensor, count: Tensor) -> Tensor:
    """Shifts by less than 0, or by the width and more, move every bit out; to the right the sign is what moves in."""
    direction = call.text("direction", "")
    if direction == "LEFT":
        return wrapping(torch.bitwise_left_shift, x, count)
    if direction != "RIGHT":
        raise call.refuse(f"its direction is {direction!r}, neither LEFT nor RIGHT")
    return wrapping(_shifted64 if x.dtype == torch.uint64 else torch.bitwise_right_shift, x, count)


def _shifted64(x: Tensor, count: Tensor) -> Tensor:
    """Shift bits that stand for 64-bit numbers without sign to the right: by one, and then what has no sign."""
    halved = torch.bitwise_and(torch.bitwise_right_shift(x, 1), _MOST)
    return torch.where(count == 0, x, torch.bitwise_right_shift(halved, count - 1))


@operator("Pow", raw=True)
def _pow(call: Call, a: Any, b: Any) -> Tensor:
    """The result has the type of the base."""
    base, exponent, known = as_tensor(a), as_tensor(b), constant_of(b)
    if known is not None and known.numel() == 1 and known.ndim <= base.ndim and base.is_floating_point():
        number = number_of(call, b, "its exponent")
        if base.dtype in (torch.float32, torch.float64) or number in (0.5, 1, 2, 3, 4, -0.5, -1, -2):
            return torch.pow(base, number)
    exponent = aligned(call, base, exponent)
    if not base.is_floating_point() and not exponent.is_floating_point():
        return torch.pow(signed(base).to(torch.int64), signed(exponent).to(torch.int64)).to(base.dtype)
    if not base.is_floating_point() or not exponent.is_floating_point():
        # In 64 bits whole numbers stay what they are, so that a power of a negative number has its sign.
        return torch.pow(base.double(), exponent.double()).to(base.dtype)
    common = torch.promote_types(base.dtype, exponent.dtype)
    return torch.pow(base.to(common), exponent.to(common)).to(base.dtype)


@operator("Sum")
def _sum(call: Call, *tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors)


@operator("Mean")
def _mean(call: Call, *tensors: Tensor) -> Tensor:
    """The mean of several tensors, element by element."""
    return torch.div(reduce(torch.add, tensors), len(tensors))


@operator("Clip", raw=True)
def _clip(call: Call, x: Any, low: Any = None, high: Any = None) -> Tensor:
    """Limits are attributes before version 11, then inputs; where they cross, the upper one wins."""
    data: Tensor = as_tensor(x)
    if call.version < 11:
        # What is left out is the largest number of 32 bits, so that infinity does not pass.
        default = _LARGEST if data.dtype in (torch.float32, torch.float64) else None
        return _clamped(data, call.get("min", None if default is None else -default), call.get("max", default))
    if data.dtype not in _WIDER and all(limit is None or constant_of(limit) is not None for limit in (low, high)):
        return _clamped(data, *(None if limit is None else number_of(call, limit, "a limit") for limit in (low, high)))
    limits = [None if limit is None else as_tensor(limit).reshape(()) for limit in (low, high)]
    return _clamped(data, *limits)


def _clamped(x: Tensor, low: Any, high: Any) -> Tensor:
    if low is None and high is None:
        return x
    return choosing(torch.clamp, x, low, high) if x.dtype in _WIDER else torch.clamp(x, low, high)


@operator("CumSum", raw=True)
def _cum_sum(call: Call, x: Any, axis: Any) -> Tensor:
    return _running(call, as_tensor(x), axis, torch.cumsum, 0)


@operator("CumProd", raw=True)
def _cum_prod(call: Call, x: Any, axis: Any) -> Tensor:
    return _running(call, as_tensor(x), axis, torch.cumprod, 1)


def _running(call: Call, x: Tensor, axis: Any, function: Callable[..., Tensor], first: int) -> Tensor:
    """Accumulate along an axis, from the back with `reverse`; with `exclusive`, without the element itself."""
    along = axis_of(size_of(call, axis, "its axis"), x.ndim)

    def run(rows: Tensor) -> Tensor:
        if call.flag("reverse"):
            rows = rows.flip(along)
        if call.flag("exclusive"):
            before = [0, 0] * (x.ndim - 1 - along) + [1, 0]
            rows = torch.nn.functional.pad(rows, before, value=first).narrow(along, 0, x.shape[along])
        found = function(rows, along, dtype=rows.dtype)
        return torch.flip(found, [along]) if call.flag("reverse") else found

    return wrapping(run, x)


@operator("Det")
def _det(call: Call, x: Tensor) -> Tensor:
    """The determinants of the last two axes."""
    found: Tensor = torch.linalg.det(x if x.dtype == torch.float64 else x.float())
    return found.to(x.dtype)


@operator("IsInf")
def _is_inf(call: Call, x: Tensor) -> Tensor:
    up, down = call.flag("detect_positive", True), call.flag("detect_negative", True)
    if up and down:
        return torch.isinf(x)
    if not up and not down:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if up else torch.isneginf(x)


@operator("Where")
def _where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("MatMul")
def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return wrapping(torch.matmul, a, b)
