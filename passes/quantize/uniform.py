"""Asymmetric min-max uniform rounding to nearest per row group, the baseline every method is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.packing import pack_bits
from ir.ops.powerterms import (
    SCALE_OCTAVES,
    leading_exponent,
    power_of_two,
    round_power_terms,
    round_power_terms_up,
)
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import group_count

_F16_TINY, _F16_MAX = 2.0**-24, 65504.0
# The least power of two in float16, and the greatest.
_LOWEST, _POWER_MAX = -24, 2.0**15
# Shares of a range that are tried, in these steps down from 1.
_SHARES, _SHARE_STEP = 16, 0.04


@dataclass(frozen=True)
class UniformCodes:
    """w = (code - zero) * scale: codes uint8 [N, K], scales float16 [N, G], zeros uint8 [N, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    @property
    def stored_bits(self) -> int:
        """Bits when codes and zeros are packed at `bits` and scales take 16."""
        return self.codes.numel() * self.bits + self.scales.numel() * (16 + self.bits)

    def dequantize(self) -> Tensor:
        """Return the weight, float32 [N, K], from the stored codes and float16 scales."""
        return reconstruct(self)


def rtn(
    weight: Tensor, bits: int, group: int, symmetric: bool = False, terms: int = 0, share: float = 1.0
) -> UniformCodes:
    """Round a weight [N, K] to the nearest of 2**bits levels per row group, against the scale as stored in float16.

    The range of a group always includes 0; symmetric: the zero is 2**(bits-1) and the range is +-max|w|; terms: above 0
    scales are sums of that many powers of two, the nearest or the next above, whichever leaves a group the smaller
    error; share: of a group's range that the levels cover, what lies beyond is clipped. Raises UsageError for a width
    outside 2..8, a group below 1 or a weight that is not a finite matrix.
    """
    if not 2 <= bits <= 8 or group < 1 or weight.ndim != 2 or not torch.isfinite(weight).all():
        raise UsageError(
            "uniform rounding needs a finite matrix, 2 to 8 bits and a positive group",
            why=f"shape {list(weight.shape)}, {bits} bits, group {group}",
        )
    low, high = ranges(weight.float(), group)
    return within(weight, share * low, share * high, bits, group, symmetric, terms)


def ranges(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest weight of each row group, [N, G], or 0 where that is not beyond 0."""
    padded = in_groups(weight, group)
    return padded.amin(-1).clamp(max=0.0), padded.amax(-1).clamp(min=0.0)


def in_groups(weight: Tensor, group: int) -> Tensor:
    """Return a weight [N, K] as [N, G, group]; padding with zero is neutral because every range includes zero."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group))
    parts: Tensor = padded.unflatten(1, (-1, group))
    return parts


def within(
    weight: Tensor, low: Tensor, high: Tensor, bits: int, group: int, symmetric: bool = False, terms: int = 0
) -> UniformCodes:
    """Round a weight [N, K] to the levels that cover low to high, [N, G], which include 0; the rest is clipped.

    Scales are as `steps_of` has them, but for terms as in `rtn`.
    """
    padded = in_groups(weight.float(), group)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if not terms:
        scales = steps_of(low, high, bits).half()
        codes, zeros = _assign(padded, low, scales, bits, symmetric)
    else:
        choices = power_scales(_span(low, high, bits), high != low, terms)
        found = [(*_assign(padded, low, scales, bits, symmetric), scales) for scales in choices]
        errors = [(padded - (c - z[..., None]) * s.float()[..., None]).square().sum(-1) for c, z, s in found]
        up = errors[1] < errors[0]
        codes = torch.where(up[..., None], found[1][0], found[0][0])
        zeros, scales = (torch.where(up, found[1][i], found[0][i]) for i in (1, 2))
    codes = codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8).contiguous()
    return UniformCodes(codes, scales, zeros.to(torch.uint8), bits, group)


def steps_of(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the steps of levels from low to high, [N, G], within float16 and not rounded to it; 1 for empty ranges."""
    return torch.where(high == low, 1.0, _span(low, high, bits))


def _span(low: Tensor, high: Tensor, bits: int) -> Tensor:
    top = 2**bits - 1
    span: Tensor = high / top - low / top
    return span.clamp(_F16_TINY, _F16_MAX)


def searched(
    weight: Tensor, bits: int, group: int, symmetric: bool = False, terms: int = 0, importance: Tensor | None = None
) -> UniformCodes:
    """Round as `rtn` does, with each group's range cut to its share of `best_shares`."""
    share = best_shares(weight, bits, group, symmetric, terms, importance)
    low, high = ranges(weight.float(), group)
    return within(weight, share * low, share * high, bits, group, symmetric, terms)


def best_shares(
    weight: Tensor, bits: int, group: int, symmetric: bool = False, terms: int = 0, importance: Tensor | None = None
) -> Tensor:
    """Return the share in 1, 0.96, ... 0.4 of each group's range that leaves the least error when rounded, [N, G].

    importance: [K], by which squared errors of the inputs are weighed, such as the diagonal of their Gram matrix; None
    counts all alike. A share of 1 is among those tried, so that no group gets worse than by `rtn`.
    """
    weigh = torch.ones(weight.shape[1]) if importance is None else importance.float()
    best, least = torch.empty(0), torch.empty(0)
    for step in range(_SHARES):
        share = 1.0 - _SHARE_STEP * step
        error = (weight.float() - rtn(weight, bits, group, symmetric, terms, share).dequantize()).square() * weigh
        found = in_groups(error, group).sum(-1)
        if step == 0:
            best, least = torch.ones_like(found), found
        best, least = torch.where(found < least, share, best), torch.minimum(found, least)
    return best


def packed(codes: UniformCodes, symmetric: bool) -> QuantCodes:
    """Return uniform codes as they are stored; symmetric: without zero points."""
    zeros = None if symmetric else pack_bits(codes.zeros, codes.bits)
    stored = pack_bits(codes.codes, codes.bits)
    return QuantCodes(stored, codes.scales, zeros, codes.bits, codes.group, codes.codes.shape[1])


def packed_bytes(rows: int, inputs: int, bits: int, group: int, symmetric: bool) -> int:
    """Return the bytes of a weight's codes, scales and zero points."""
    groups = group_count(inputs, group)
    return rows * (-(-inputs * bits // 8) + 2 * groups + (0 if symmetric else -(-groups * bits // 8)))


def _assign(padded: Tensor, low: Tensor, scales: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the codes [N, G, group] and zero points [N, G] of weights under stored scales, float32 whole numbers."""
    top, step = 2**bits - 1, scales.float()
    centre = torch.full_like(step, 2.0 ** (bits - 1))
    zeros = centre if symmetric else torch.round(-low / step).clamp(0, top)
    return (torch.round(padded / step[..., None]) + zeros[..., None]).clamp(0, top), zeros


def power_scales(span: Tensor, alive: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Return steps [N, G] rounded to sums of `terms` powers of two, to the nearest and upwards, exact in float16.

    alive: bool [N, G], groups whose range is not empty; the others and steps too far below their row's largest for its
    window of scale codes are raised to the window's least power.
    """
    span = span.double().clamp(_F16_TINY, _POWER_MAX)
    nearest, up = _exact_half(span, terms, round_power_terms), _exact_half(span, terms, round_power_terms_up)
    row = torch.where(alive, leading_exponent(up, terms), _LOWEST).amax(1, keepdim=True)
    floor = power_of_two((row - SCALE_OCTAVES + 1).clamp(min=_LOWEST))
    return tuple(torch.where(alive, s, 0.0).maximum(floor).half() for s in (nearest, up))  # type: ignore[return-value]


def _exact_half(span: Tensor, terms: int, rounding: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return steps rounded to the most terms, up to `terms`, that float16 holds exactly; float64."""
    result = rounding(span, 1)
    for count in range(2, terms + 1):
        finer = rounding(span, count)
        result = torch.where(finer.half().double() == finer, finer, result)
    return result


def reconstruct(codes: UniformCodes) -> Tensor:
    """Return the float32 weight [N, K] that uniform codes stand for."""
    inputs = codes.codes.shape[1]
    scale = codes.scales.float().repeat_interleave(codes.group, 1)[:, :inputs]
    zero = codes.zeros.float().repeat_interleave(codes.group, 1)[:, :inputs]
    return (codes.codes.float() - zero) * scale
