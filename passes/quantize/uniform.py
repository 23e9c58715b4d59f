"""Asymmetric min-max uniform rounding to nearest per row group, the baseline every method is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import UsageError

_F16_TINY, _F16_MAX = 2.0**-24, 65504.0


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


def rtn(weight: Tensor, bits: int, group: int, symmetric: bool = False) -> UniformCodes:
    """Round a weight [N, K] to the nearest of 2**bits levels per row group, against the scale as stored in float16.

    The range of a group always includes 0; symmetric: the zero is 2**(bits-1) and the range is +-max|w|. Raises
    UsageError for a width outside 2..8, a group below 1 or a weight that is not a finite matrix.
    """
    if not 2 <= bits <= 8 or group < 1 or weight.ndim != 2 or not torch.isfinite(weight).all():
        raise UsageError(
            "uniform rounding needs a finite matrix, 2 to 8 bits and a positive group",
            why=f"shape {list(weight.shape)}, {bits} bits, group {group}",
        )
    top = 2**bits - 1
    w = weight.float()
    groups = -(-w.shape[1] // group)
    # Padding with zero is neutral because every range includes zero.
    padded = torch.nn.functional.pad(w, (0, groups * group - w.shape[1])).unflatten(1, (groups, group))
    low, high = padded.amin(-1).clamp(max=0.0), padded.amax(-1).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    span = (high / top - low / top).clamp(_F16_TINY, _F16_MAX)
    scales = torch.where(high == low, 1.0, span).half()
    step = scales.float()
    centre = torch.full_like(step, 2.0 ** (bits - 1))
    zeros = centre if symmetric else torch.round(-low / step).clamp(0, top)
    codes = (torch.round(padded / step[..., None]) + zeros[..., None]).clamp(0, top)
    codes = codes.flatten(1)[:, : w.shape[1]].to(torch.uint8).contiguous()
    return UniformCodes(codes, scales, zeros.to(torch.uint8), bits, group)


def reconstruct(codes: UniformCodes) -> Tensor:
    """Return the float32 weight [N, K] that uniform codes stand for."""
    inputs = codes.codes.shape[1]
    scale = codes.scales.float().repeat_interleave(codes.group, 1)[:, :inputs]
    zero = codes.zeros.float().repeat_interleave(codes.group, 1)[:, :inputs]
    return (codes.codes.float() - zero) * scale
