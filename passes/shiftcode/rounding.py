"""What scales and offsets are rounded to while they are fitted: the values that codes can hold."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ir.ops.powerterms import HIGHEST, LOWEST, OFFSET_OCTAVES, SCALE_OCTAVES, leading_exponent, power_table
from passes.shiftcode.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Codes = NDArray[np.uint8]

Rounding = tuple[Floats, Floats, Ints]


@compiled
def first_not_below(borders: Floats, x: float) -> int:
    """Return the place of the first of ascending borders that is not below x, their number when all are."""
    first, last = 0, len(borders)
    while first < last:
        centre = (first + last) >> 1
        if borders[centre] < x:
            first = centre + 1
        else:
            last = centre
    return first


@compiled
def round_value(x: float, values: Floats, middles: Floats, leads: Ints, low: int, high: int) -> float:
    """Return x rounded to the nearest short sum of powers of two that leads at an exponent in [low, high].

    values, middles, leads: a table of `rounding_table`.
    """
    if x == 0.0 or len(leads) == 0:
        return x
    mantissa, exponent = math.frexp(abs(x))
    if len(values) == 0:
        # float16 keeps 11 bits, and fewer below its smallest normal number.
        quantum = math.ldexp(1.0, max(exponent, -13) - 11)
        return math.copysign(np.rint(abs(x) / quantum) * quantum, x)
    mantissa, exponent = mantissa * 2.0, exponent - 1
    first = first_not_below(middles, mantissa)
    lead = exponent + leads[first]
    if lead > high:
        top = 1.0
        for i in range(len(values)):
            if leads[i] == 0:
                top = values[i]
        return math.copysign(math.ldexp(top, high), x)
    if lead < low:
        return 0.0
    return math.copysign(math.ldexp(values[first], exponent), x)


def rounding_table(terms: int) -> Rounding:
    """Return mantissas in [1, 2], the middles between them and the leads of their first terms, for compiled rounding.

    terms: powers of two per value; 0: no mantissas, which asks for float16; -1: no leads either, nothing is rounded.
    """
    if terms <= 0:
        return np.empty(0), np.empty(0), np.zeros(1 + terms, np.int64)
    table = power_table(terms)
    return table.values.numpy(), table.middles.numpy(), table.lead.long().numpy()


def limits_of(weight: Tensor, row_group: int) -> Ints:
    """Return the leading exponents that the codes of each tile of rows may have, set before anything is fitted.

    weight: float64 [N, K]; row_group: rows a tile. Returns int64 [T, 4]: lowest and highest for offsets, then for
    scales. Scales may lead up to 4 times the tile's largest weight (error compensation makes weights grow); offsets up
    to 4 times its mean |w|, because their code reaches only 6 octaves down.
    """
    pieces = weight.abs().split(row_group)
    peak = torch.stack([p.amax() for p in pieces]) if row_group > 1 else weight.abs().amax(1)
    mean = torch.stack([p.mean() for p in pieces]) if row_group > 1 else weight.abs().mean(1)
    highs = leading_exponent(mean, 1).long() + 1, leading_exponent(peak, 1).long() + 2
    offset, scale = (high.clamp(LOWEST, HIGHEST) for high in highs)
    lows = offset - (OFFSET_OCTAVES - 1), scale - (SCALE_OCTAVES - 1)
    return torch.stack([lows[0].clamp_min(LOWEST), offset, lows[1].clamp_min(LOWEST), scale], 1).numpy()
