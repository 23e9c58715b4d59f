"""How far a block's output is from where it should be, so that no single token governs it."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens weaker than this share of the median energy are not weighed up further; a mean would follow massive tokens.
_FLOOR = 1e-3


def token_loss(found: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens of a token's squared error relative to its energy; both [..., width].

    A plain mean of squares is governed by the few tokens with massive activations (2402.17762), which can hold nearly
    all the energy of a sequence; the norm that reads a residual stream sees every token at the same size.
    """
    energy = target.square().mean(-1)
    floor = (_FLOOR * energy.median()).clamp(min=torch.finfo(energy.dtype).tiny)
    loss: Tensor = ((found - target).square().mean(-1) / torch.maximum(energy, floor)).mean()
    return loss


def plain_loss(found: Tensor, target: Tensor) -> Tensor:
    """Return the mean of squared errors (OmniQuant, 2308.13137, eq. 1)."""
    loss: Tensor = (found - target).square().mean()
    return loss
