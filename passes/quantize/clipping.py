"""Learnable weight clipping: uniform codes whose range is a learned share of a group's, differentiable.

OmniQuant (2308.13137), section 3.2, eq. 2. What it gives is what is stored: the scales are those of float16, so that
`clipped` and the codes of `clipped_codes` are the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from passes.quantize.uniform import UniformCodes, in_groups, ranges, steps_of, within

# Where strengths start: a share of 0.982 of the range.
START = 4.0


def clipped(
    weight: Tensor, strengths: Tensor, bits: int, group: int, symmetric: bool = False, zero_moves: bool = True
) -> Tensor:
    """Return the weight [N, K] rounded within a share of each group's range, with gradients to both.

    strengths: [2, N, G], of the greatest and the least weight of a group; the shares are their sigmoids. Rounding
    passes gradients on as they are, that of scales and zero points too; what is clipped passes them to the range alone.
    zero_moves: False lets no gradient through the rounding of zero points, as the release of OmniQuant has it.
    """
    low, high = _range(weight, strengths, group, symmetric)
    found: Tensor = _Rounded.apply(in_groups(weight, group), low, high, bits, symmetric, zero_moves)
    return found.flatten(1)[:, : weight.shape[1]]


def clipped_codes(weight: Tensor, strengths: Tensor, bits: int, group: int, symmetric: bool = False) -> UniformCodes:
    """Return the codes of `clipped`."""
    with torch.no_grad():
        return within(weight, *_range(weight, strengths, group, symmetric), bits, group, symmetric)


def _range(weight: Tensor, strengths: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = ranges(weight, group)
    shares = torch.sigmoid(strengths)
    low, high = shares[1] * low, shares[0] * high
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


class _Rounded(Function):
    """Weights [N, G, group] rounded to the levels from low to high, [N, G]."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, zero_moves: bool
    ) -> Tensor:
        step = steps_of(low, high, bits).half().to(weight.dtype)
        zero = torch.full_like(step, 2.0 ** (bits - 1)) if symmetric else torch.round(-low / step).clamp(0, 2**bits - 1)
        ctx.save_for_backward(weight, low, high, step, zero)
        ctx.bits, ctx.zero_moves = bits, zero_moves and not symmetric
        codes = (torch.round(weight / step[..., None]) + zero[..., None]).clamp_(0, 2**bits - 1)
        return codes.sub_(zero[..., None]).mul_(step[..., None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The derivative of w + (t - w/h) h for whole numbers t within the range, of (top - z) h and -z h beyond it."""
        weight, low, high, step, zero = ctx.saved_tensors
        (grad,), top = grads, 2**ctx.bits - 1
        ratio = weight / step[..., None]
        whole = torch.round(ratio)
        above, below = whole + zero[..., None] > top, whole + zero[..., None] < 0
        inside = ~(above | below)
        grad_weight = grad * inside
        by_rounding = (grad_weight * (whole - ratio)).sum(-1)
        over, under = (grad * above).sum(-1), (grad * below).sum(-1)
        if not ctx.zero_moves:
            grad_step, direct = by_rounding + over * (top - zero) - under * zero, torch.zeros_like(step)
        else:
            # z = -low / h, rounded, so that both ends move with the range and not with the other end.
            off = zero + low / step
            grad_step, direct = by_rounding + over * (top - off) - under * off, over + under
        # An empty range has a step of its own.
        grad_step = torch.where(high == low, 0.0, grad_step) / top
        return grad_weight, direct - grad_step, grad_step, None, None, None
