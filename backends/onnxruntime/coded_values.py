"""Stored scales, offsets, zero points and digits as float values, by standard operators; exact but for sums of planes.

`ir.ops.shiftcode` says what the codes mean. Bytes and nibbles are int32 here, the type that tables are looked up by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.onnxruntime.bodies import Body
from ir.ops.powerterms import OFFSET_OCTAVES, SCALE_OCTAVES
from ir.ops.trits import PER_BYTE

_BYTES = torch.arange(256)
_NIBBLES = torch.arange(16)
# Two's complement: what a byte means as the exponent of a power of two.
_POWERS = torch.ldexp(torch.ones(256, dtype=torch.float64), ((_BYTES + 128) % 256 - 128)).float()
# First nibbles: of a scale octaves below the exponent; of an offset three bits of octaves, and a sign.
_SCALES = torch.where(_NIBBLES < SCALE_OCTAVES, 0.5**_NIBBLES, 0.0)
_MINUS = 1.0 - 2.0 * (_NIBBLES >> 3)
_OFFSETS = torch.where((_NIBBLES & 7) < OFFSET_OCTAVES, _MINUS * 0.5 ** (_NIBBLES & 7), 0.0)
# Later nibbles: octaves below the term before, where 0 ends the sum.
_STEPS = torch.where((_NIBBLES & 7) > 0, 0.5 ** (_NIBBLES & 7), 0.0)


def signs(b: Body, stored: Any) -> Any:
    """Return the eight signs of bytes int32 [...], float -1 and +1 [..., 8]."""
    return b.look_up(((_BYTES[:, None] >> torch.arange(8)) & 1) * 2.0 - 1.0, stored)


def trits(b: Body, stored: Any) -> Any:
    """Return the five trits of bytes int32 [...], float -1, 0 and +1 [..., 5]."""
    return b.look_up((_BYTES[:, None] // 3 ** torch.arange(PER_BYTE)) % 3 - 1.0, stored)


def bits(b: Body, stored: Any) -> Any:
    """Return the eight bits of bytes int32 [...], low first, float 0 and 1 [..., 8]."""
    return b.look_up((_BYTES[:, None] >> torch.arange(8) & 1).float(), stored)


def nibbles(b: Body, stored: Any) -> Any:
    """Return the two nibbles of bytes int32 [...], the low one first, int32 [..., 2]."""
    return b.look_up(torch.stack([_BYTES & 15, _BYTES >> 4], 1).int(), stored)


def powers(b: Body, stored: Any) -> Any:
    """Return 2**e, float, of bytes int32 that stand for exponents e from -128 to 127."""
    return b.look_up(_POWERS, stored)


def scale(b: Body, terms: Sequence[Any]) -> Any:
    """Return scales relative to their power of two, of the nibbles of each term, int32 [...]; float [...]."""
    return _sum(b, _SCALES, terms)


def offset(b: Body, terms: Sequence[Any]) -> Any:
    """Return offsets relative to their power of two, of the nibbles of each term, int32 [...]; float [...]."""
    return _sum(b, _OFFSETS, terms)


def _sum(b: Body, firsts: Tensor, terms: Sequence[Any]) -> Any:
    """Return first (1 + s_1 2^-d_1 (1 ...)) from the inside out; at most 22 bits, so that nothing is rounded."""
    first = b.look_up(firsts, terms[0])
    if len(terms) == 1:
        return first
    total = b.look_up(_STEPS * _MINUS, terms[-1])
    for nibble in reversed(terms[1:-1]):
        total = b.add("Mul", b.look_up(_STEPS, nibble), b.add("Add", b.look_up(_MINUS, nibble), total))
    return b.add("Add", first, b.add("Mul", first, total))


def half(b: Body, low: Any, high: Any) -> Any:
    """Return the float16 numbers of bytes int32 as float: the high byte says what the low one's unit is worth."""
    exponent, sign = (_BYTES >> 2) & 31, 1.0 - 2.0 * (_BYTES >> 7)
    unit = sign * 2.0 ** (exponent.clamp(min=1) - 25).double()
    base = unit * ((_BYTES & 3) * 256 + (exponent > 0) * 1024)
    scaled = b.add("Mul", b.cast(low, torch.float32), b.look_up(unit.float(), high))
    return b.add("Add", b.look_up(base.float(), high), scaled)
