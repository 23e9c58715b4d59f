"""Arithmetic, comparisons, logic, casts and activations: operators that go element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from backends.onnxruntime.emitter import CONTRIB, Emitter, Entry, Refused, Result
from ir.program import TYPE, tensor_type_of
from ir.types import TensorType

aten = torch.ops.aten


def dtype_of(arg: Any) -> torch.dtype | None:
    """Return the dtype of a tensor node, None for a number or a size."""
    kind = arg.meta.get(TYPE) if isinstance(arg, fx.Node) else None
    return kind.dtype if isinstance(kind, TensorType) else None


def common_dtype(*args: Any) -> torch.dtype:
    """Return the dtype that operands are compared in: numbers follow tensors, tensors without dims follow others."""
    stand_ins: list[Any] = []
    for arg in args:
        kind = arg.meta.get(TYPE) if isinstance(arg, fx.Node) else None
        if isinstance(kind, TensorType):
            stand_ins.append(torch.empty((1,) * len(kind.dims), dtype=kind.dtype))
        else:
            stand_ins.append(1 if kind is not None else arg)
    found = stand_ins[0]
    for other in stand_ins[1:]:
        found = torch.empty_like(torch.as_tensor(found), dtype=torch.result_type(found, other))
    return torch.as_tensor(found).dtype


def operand(e: Emitter, arg: Any, dtype: torch.dtype) -> Any:
    """Return a tensor node, size or number as a value of a dtype."""
    if isinstance(arg, fx.Node):
        return e.cast(e.value(arg), dtype, dtype_of(arg) or torch.long)
    return e.scalar(arg, dtype)


def neutral(e: Emitter, node: fx.Node, arg: Any, other: Any, number: float) -> Any | None:
    """Return the value of `arg` where `other` is this number everywhere and changes neither dtype nor dims."""
    found = e.tensor(other) if isinstance(other, fx.Node) else torch.tensor(other)
    if found is None or not isinstance(arg, fx.Node) or arg.meta[TYPE] != node.meta[TYPE]:
        return None
    return e.value(arg) if found.numel() == 1 and found.item() == number else None


def _arithmetic(op: str, unit: float | None = None, commutes: bool = False) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        a, b, *rest = e.args(node)
        if rest and rest[0] not in (None, 1):
            return _scaled(e, node, op, a, b, rest[0])
        same = neutral(e, node, a, b, unit) if unit is not None else None
        if same is None and unit is not None and commutes:
            same = neutral(e, node, b, a, unit)
        if same is not None:
            return same
        dtype = tensor_type_of(node).dtype
        return e.add(op, operand(e, a, dtype), operand(e, b, dtype))

    return emit


def _scaled(e: Emitter, node: fx.Node, op: str, a: Any, b: Any, alpha: Any) -> Result:
    """Emit a + alpha b or a - alpha b."""
    dtype = tensor_type_of(node).dtype
    return e.add(op, operand(e, a, dtype), e.add("Mul", operand(e, b, dtype), operand(e, alpha, dtype)))


def _reverse_sub(e: Emitter, node: fx.Node) -> Result:
    a, b, alpha = e.args(node)
    if alpha not in (None, 1):
        return _scaled(e, node, "Sub", b, a, alpha)
    dtype = tensor_type_of(node).dtype
    return e.add("Sub", operand(e, b, dtype), operand(e, a, dtype))


def _divide(e: Emitter, node: fx.Node) -> Result:
    a, b, *rest = e.args(node)
    dtype, mode = tensor_type_of(node).dtype, rest[0] if rest else None
    if mode == "floor":
        return floor_quotient(e, a, b, dtype)
    quotient = e.add("Div", operand(e, a, dtype), operand(e, b, dtype))
    if mode is None or not dtype.is_floating_point:  # ONNX truncates whole quotients by itself
        return quotient
    return e.add("Mul", e.add("Sign", quotient), e.add("Floor", e.add("Abs", quotient)))


def floor_quotient(e: Emitter, a: Any, b: Any, dtype: torch.dtype) -> Any:
    """Return floor(a / b); integers are divided exactly, with ONNX's truncation mended for negative quotients."""
    x, y = operand(e, a, dtype), operand(e, b, dtype)
    if dtype.is_floating_point:
        return e.add("Floor", e.add("Div", x, y))
    return e.add("Div", e.add("Sub", x, e.add("Mod", x, y)), y)


def _floor_divide(e: Emitter, node: fx.Node) -> Result:
    a, b, *_ = e.args(node)
    return floor_quotient(e, a, b, tensor_type_of(node).dtype)


def _remainder(e: Emitter, node: fx.Node) -> Result:
    a, b = e.args(node)
    dtype = tensor_type_of(node).dtype
    x, y = operand(e, a, dtype), operand(e, b, dtype)
    if not dtype.is_floating_point:  # the sign of the divisor, as in torch
        return e.add("Mod", x, y)
    return e.add("Sub", x, e.add("Mul", e.add("Floor", e.add("Div", x, y)), y))


def _power(e: Emitter, node: fx.Node) -> Result:
    a, b = e.args(node)
    dtype = tensor_type_of(node).dtype
    if b == 2 and not isinstance(b, fx.Node):
        x = operand(e, a, dtype)
        return e.add("Mul", x, x)
    return e.add("Pow", operand(e, a, dtype), operand(e, b, dtype))


def _compare(op: str, negate: bool = False) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        a, b = e.args(node)
        dtype = common_dtype(a, b)
        found = e.add(op, operand(e, a, dtype), operand(e, b, dtype))
        return e.add("Not", found) if negate else found

    return emit


def _logic(op: str, bits: str = "", unit: bool | None = None) -> Entry:
    """Return an entry for a logical operator; on integers it is `bits`, where the operator goes bit by bit."""

    def emit(e: Emitter, node: fx.Node) -> Result:
        a, b = e.args(node)
        dtype = tensor_type_of(node).dtype
        if dtype != torch.bool:
            return e.add(bits, operand(e, a, dtype), operand(e, b, dtype))
        if unit is not None:
            same = neutral(e, node, a, b, unit)
            same = neutral(e, node, b, a, unit) if same is None else same
            if same is not None:
                return same
        return e.add(op, operand(e, a, torch.bool), operand(e, b, torch.bool))

    return emit


def _not(e: Emitter, node: fx.Node) -> Result:
    (x,) = e.args(node)
    if tensor_type_of(node).dtype != torch.bool:
        return e.add("BitwiseNot", e.value(x))
    return e.add("Not", operand(e, x, torch.bool))


def _unary(op: str, **attributes: Any) -> Entry:
    def emit(e: Emitter, node: fx.Node) -> Result:
        return e.add(op, operand(e, e.args(node)[0], tensor_type_of(node).dtype), **attributes)

    return emit


def _rsqrt(e: Emitter, node: fx.Node) -> Result:
    return e.add("Reciprocal", e.add("Sqrt", operand(e, e.args(node)[0], tensor_type_of(node).dtype)))


def _square(e: Emitter, node: fx.Node) -> Result:
    x = operand(e, e.args(node)[0], tensor_type_of(node).dtype)
    return e.add("Mul", x, x)


def _clamp(e: Emitter, node: fx.Node) -> Result:
    x, low, high = (*e.args(node), None, None)[:3]
    dtype = tensor_type_of(node).dtype
    found = operand(e, x, dtype)
    if low is not None:
        found = e.add("Max", found, operand(e, low, dtype))
    return found if high is None else e.add("Min", found, operand(e, high, dtype))


def _clamp_max(e: Emitter, node: fx.Node) -> Result:
    x, high = e.args(node)
    dtype = tensor_type_of(node).dtype
    return e.add("Min", operand(e, x, dtype), operand(e, high, dtype))


def _cast(e: Emitter, node: fx.Node) -> Result:
    x, dtype = e.args(node)[0], tensor_type_of(node).dtype
    return e.cast(e.value(x), dtype, dtype_of(x))


def _where(e: Emitter, node: fx.Node) -> Result:
    condition, a, b = e.args(node)
    dtype = tensor_type_of(node).dtype
    return e.add("Where", operand(e, condition, torch.bool), operand(e, a, dtype), operand(e, b, dtype))


def _masked_fill(e: Emitter, node: fx.Node) -> Result:
    x, mask, number = e.args(node)
    dtype = tensor_type_of(node).dtype
    return e.add("Where", operand(e, mask, torch.bool), operand(e, number, dtype), operand(e, x, dtype))


def _silu(e: Emitter, node: fx.Node) -> Result:
    x = e.value(e.args(node)[0])
    if e.fuse and dtype_of(node) == torch.float32:
        return e.add("QuickGelu", x, domain=CONTRIB, alpha=1.0)
    return e.add("Mul", x, e.add("Sigmoid", x))


def _gelu(e: Emitter, node: fx.Node) -> Result:
    x, kind = e.args(node)
    return e.add("Gelu", e.value(x), approximate=kind)


def _leaky_relu(e: Emitter, node: fx.Node) -> Result:
    x, slope = e.args(node)
    return e.add("LeakyRelu", e.value(x), alpha=float(slope))


def _softplus(e: Emitter, node: fx.Node) -> Result:
    x, beta, threshold = e.args(node)
    if beta != 1 or threshold < 20:
        raise Refused(f"softplus with beta {beta} and threshold {threshold} has no ONNX form")
    return e.add("Softplus", e.value(x))


def _all_of(*packets: Any) -> Callable[[Entry], dict[Any, Entry]]:
    """Return a function that gives every overload of these packets, except in-place and out forms, one entry."""

    def spread(entry: Entry) -> dict[Any, Entry]:
        overloads = [getattr(p, name) for p in packets for name in p.overloads()]
        return {o: entry for o in overloads if not o._schema.is_mutable and "out" not in o._overloadname.split("_")}

    return spread


_UNARY = {
    "Neg": aten.neg, "Exp": aten.exp, "Log": aten.log, "Sqrt": aten.sqrt, "Sin": aten.sin, "Cos": aten.cos,
    "Tan": aten.tan, "Atan": aten.atan, "Tanh": aten.tanh, "Sigmoid": aten.sigmoid, "Relu": aten.relu,
    "Abs": aten.abs, "Floor": aten.floor, "Ceil": aten.ceil, "Round": aten.round, "Sign": aten.sign, "Erf": aten.erf,
    "Reciprocal": aten.reciprocal, "IsNaN": aten.isnan,
}  # fmt: skip
_ROWS: tuple[tuple[tuple[Any, ...], Entry], ...] = (
    ((aten.add,), _arithmetic("Add", 0, commutes=True)),
    ((aten.sub,), _arithmetic("Sub", 0)),
    ((aten.mul,), _arithmetic("Mul", 1, commutes=True)),
    ((aten.rsub,), _reverse_sub),
    ((aten.div, aten.true_divide), _divide),
    ((aten.floor_divide,), _floor_divide),
    ((aten.remainder,), _remainder),
    ((aten.pow,), _power),
    ((aten.maximum,), _arithmetic("Max")),
    ((aten.minimum,), _arithmetic("Min")),
    ((aten.eq,), _compare("Equal")),
    ((aten.ne,), _compare("Equal", negate=True)),
    ((aten.lt,), _compare("Less")),
    ((aten.le,), _compare("LessOrEqual")),
    ((aten.gt,), _compare("Greater")),
    ((aten.ge,), _compare("GreaterOrEqual")),
    ((aten.logical_and,), _logic("And", unit=True)),
    ((aten.logical_or,), _logic("Or", unit=False)),
    ((aten.logical_xor,), _logic("Xor")),
    ((aten.bitwise_and, aten.__and__), _logic("And", "BitwiseAnd", unit=True)),
    ((aten.bitwise_or, aten.__or__), _logic("Or", "BitwiseOr", unit=False)),
    ((aten.bitwise_xor, aten.__xor__), _logic("Xor", "BitwiseXor")),
    ((aten.logical_not, aten.bitwise_not), _not),
    ((aten.rsqrt,), _rsqrt),
    ((aten.square,), _square),
    ((aten.clamp, aten.clamp_min), _clamp),
    ((aten.clamp_max,), _clamp_max),
    ((aten.to, aten._to_copy, aten.type_as), _cast),
    ((aten.where,), _where),
    ((aten.masked_fill,), _masked_fill),
    ((aten.silu,), _silu),
    ((aten.gelu,), _gelu),
    ((aten.leaky_relu,), _leaky_relu),
    ((aten.softplus,), _softplus),
    *(((packet,), _unary(op)) for op, packet in _UNARY.items()),
)
TABLE: dict[Any, Entry] = {}
for _packets, _entry in _ROWS:
    TABLE |= _all_of(*_packets)(_entry)
