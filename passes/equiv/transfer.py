"""What folding a scale does to weights: pure, differentiable functions that `fold` and training passes share.

One convention throughout: the source of a group is divided by s and its sinks are multiplied by s, so that the value
between them is divided by s (SmoothQuant, 2211.10438, eq. 3; OmniQuant, 2308.13137, eq. 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.equiv.groups import TieMap

# Below this share of the largest gain, a gain is left in its norm: dividing the offset by it could overflow.
TINY_GAIN = 1e-6


def expand(tie: TieMap, s: Tensor) -> Tensor:
    """Return one factor per channel from the free parameters; channels the group does not touch get 1.

    s: [size]; returns [channels] of its dtype.
    """
    return torch.cat([s, s.new_ones(1)])[tie.index]


def fold_norm(gain: Tensor, beta: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return gain and offset of a norm whose output is divided by s; all of the normalised shape."""
    return gain / s, None if beta is None else beta / s


def fold_rows(weight: Tensor, bias: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear whose outputs are divided by s.

    weight: [..., N, K] (leading dim: experts); bias, s: [N].
    """
    return weight / s.unsqueeze(-1), None if bias is None else bias / s


def fold_cols(weight: Tensor, s: Tensor) -> Tensor:
    """Return the weight of a linear whose inputs were divided by s; weight: [..., N, K], s: [K]."""
    return weight * s


def unit_scales(gain: Tensor, beta: Tensor | None) -> Tensor:
    """Return the scales that leave a norm with a gain of one, both of the normalised shape.

    Channels with a gain next to zero get 1 and keep their gain: the offset could not be divided by it.
    """
    tiny = TINY_GAIN * gain.abs().max() if beta is not None else gain.new_zeros(())
    return torch.where(gain.abs() <= tiny, torch.ones_like(gain), gain)
