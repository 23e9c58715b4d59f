"""How the reference backend runs compressed linears: by decoded weights, by real shifts, or as stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ir.edit import Editor
from ir.errors import UsageError
from ir.ops.quant import QuantCodes
from ir.ops.shiftadd import shiftadd_by_shifts
from ir.ops.shiftcode import ShiftCodes
from ir.overloads import bound_args
from ir.params import Entry
from ir.program import Program, tensor_type_of
from ir.types import TensorType

aten, nomul = torch.ops.aten, torch.ops.nomul

MULTIPLY, SHIFT, CODES = "multiply", "shift", "codes"
DEFAULT_MODE = MULTIPLY
MODES = {
    MULTIPLY: "decode each weight once when loading, then run as fast as float (takes the memory of a float model)",
    SHIFT: "evaluate shift-add linears by additions and shifts alone (slow: it shows that no multiply is needed)",
    CODES: "decode each weight anew in every call, as the operators are defined (least memory)",
}
# Elements of one intermediate [tokens, rows, groups] of the shift evaluation; 2**22 float64 are 32 MiB.
_SHIFT_ELEMENTS = 1 << 22


def executable(program: Program, mode: str = DEFAULT_MODE) -> nn.Module:
    """Return a module that computes the program, which stays as it is.

    mode: one of `MODES`. `multiply` holds every compressed weight as a dense tensor of the activations' dtype (4 bytes
    a weight in float32, instead of the stored bits), `shift` and `codes` keep the codes. Raises UsageError for others.

    Attention stays as traced. On one CPU core with 9 query and 3 key heads of 64 over 1024 tokens `enable_gqa` takes
    0.82 of the time of repeating keys and values first (0.16 when decoding one token), and the boolean mask 1.04 of
    that of an additive one, so that there is nothing to win by rewriting it.
    """
    if mode not in MODES:
        choices = "; ".join(f"{name}: {meaning}" for name, meaning in MODES.items())
        raise UsageError(f"there is no mode {mode}", where="mode", fix=f"use one of {choices}")
    if mode == CODES:
        return program.module()
    copy = program.clone()
    if mode == MULTIPLY:
        _decode_linears(program, copy)
    else:
        for node in copy.calls(nomul.shiftadd_linear):
            node.target = by_shifts
    return copy.module()


class DecodedWeight:
    """One compressed weight as a source of its dense tensor, decoded when it is read."""

    def __init__(self, name: str, kind: TensorType, decode: Callable[[], Tensor]) -> None:
        self._name, self._type, self._decode = name, kind, decode

    def names(self) -> tuple[str, ...]:
        return (self._name,)

    def type_of(self, name: str) -> TensorType:
        return self._type

    def stored_bytes(self, name: str) -> int:
        return self._type.nbytes

    def load(self, name: str) -> Tensor:
        return self._decode()


def _decode_linears(program: Program, copy: Program) -> None:
    editor = Editor(copy, "reference")
    for node in list(copy.calls(*_DECODERS)):
        values = _arguments(node)
        x, bias = values["x"], values["bias"]
        dims = tensor_type_of(node).dims[-1], tensor_type_of(x).dims[-1]
        kind = TensorType(tensor_type_of(x).dtype, dims)
        name = editor.fresh(f"{node.name}_decoded")
        # Codes are read from the program itself: the copy forgets them below, before anything is decoded.
        source = DecodedWeight(name, kind, _decoder(program, node, values, kind))
        copy.params.enter(name, Entry(source, name, kind))
        weight = editor.param(name)
        new = editor.before(node).call(aten.linear.default, x, weight, bias, like=node)
        editor.replace(node, new, keep_name=True)
        editor.erase(node)
    editor.sweep()


def _arguments(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    values = bound_args(target, node.args, node.kwargs)
    assert values is not None
    return {a.name: v for a, v in zip(target._schema.arguments, values, strict=True)}


def _decoder(program: Program, node: fx.Node, values: dict[str, Any], kind: TensorType) -> Callable[[], Tensor]:
    build = next(build for op, build in _DECODERS.items() if op is getattr(node.target, "overloadpacket", None))
    names = {k: str(v.target) for k, v in values.items() if isinstance(v, fx.Node) and v.op == "get_attr"}
    numbers = {k: v for k, v in values.items() if not isinstance(v, fx.Node)}

    def decode() -> Tensor:
        tensors = {k: program.params.get(name) for k, name in names.items()}
        return build({**numbers, **tensors}, int(kind.dims[1])).dequantize(kind.dtype)

    return decode


def _shift_codes(v: dict[str, Any], inputs: int) -> ShiftCodes:
    return ShiftCodes(v["signs"], v["scales"], v["exponents"], v["offsets"], v["group"], v["terms"], inputs)


def _quant_codes(v: dict[str, Any], inputs: int) -> QuantCodes:
    return QuantCodes(v["codes"], v["scales"], v["zeros"], v["bits"], v["group"], inputs)


_DECODERS: dict[Any, Callable[[dict[str, Any], int], ShiftCodes | QuantCodes]] = {
    nomul.shiftadd_linear: _shift_codes,
    nomul.quant_linear: _quant_codes,
}


def by_shifts(
    x: Tensor,
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    group: int,
    terms: int,
) -> Tensor:
    """Evaluate a shift-add linear by real shifts, some tokens at a time so that its intermediates stay small.

    Arguments as for `nomul::shiftadd_linear`.
    """
    flat = x.reshape(-1, x.shape[-1])
    step = max(1, _SHIFT_ELEMENTS // (signs.shape[1] * -(-x.shape[-1] // group)))
    parts = [
        shiftadd_by_shifts(part, signs, scales, exponents, offsets, bias, group, terms) for part in flat.split(step)
    ]
    return torch.cat(parts).reshape(*x.shape[:-1], signs.shape[1])
