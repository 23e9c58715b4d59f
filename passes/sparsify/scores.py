"""What a weight is worth before any is cut: its size, or what it adds to its output."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Return |W|, [N, K]."""
    return weight.abs()


def wanda(weight: Tensor, energy: Tensor) -> Tensor:
    """Return |W_ij| * ||x_j||_2 (Wanda, 2306.11695, eq. 1), [N, K]; energy: [K], the inputs' sums of squares."""
    return weight.abs() * energy.to(weight.dtype).clamp_min(0.0).sqrt()


def mask_change(before: Tensor, after: Tensor) -> float:
    """Return the share of a mask's weights that were kept before and are not now, or the other way round."""
    return float((before != after).float().mean()) if before.numel() else 0.0


def kept_share(weight: Tensor, mask: Tensor) -> float:
    """Return the share of a weight's energy that a mask keeps."""
    whole = float(weight.square().sum())
    return float(torch.where(mask, weight, 0.0).square().sum()) / whole if whole > 0 else 1.0
