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


def expand(tie: TieMap, s: Tensor, untouched: float = 1.0) -> Tensor:
    """Return one value per channel from the free parameters; channels the group does not touch get `untouched`.

    s: [size]; returns [channels] of its dtype.
    """
    return torch.cat([s, s.new_full((1,), untouched)])[tie.index]


def fold_norm(
    gain: Tensor, beta: Tensor | None, s: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return gain and offset of a norm from whose output `shift` is taken before it is divided by s.

    All of the normalised shape. With a shift there must be an offset, zeros where the norm had none.
    """
    if beta is None:
        return gain / s, None
    return gain / s, (beta if shift is None else beta - shift) / s


def fold_rows(weight: Tensor, bias: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear whose outputs are divided by s.

    weight: [..., N, K] (leading dim: experts); bias, s: [N].
    """
    return weight / s.unsqueeze(-1), None if bias is None else bias / s


def fold_cols(weight: Tensor, s: Tensor) -> Tensor:
    """Return the weight of a linear whose inputs were divided by s; weight: [..., N, K], s: [K]."""
    return weight * s


def scale_weight(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """Return a weight [..., N, K] with its rows divided and its columns multiplied."""
    if rows is not None:
        weight, _ = fold_rows(weight, None, rows)
    return weight if cols is None else fold_cols(weight, cols)


def fold_linear(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    into: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return weight [N, K] and bias [N] of a linear between values that were shifted and scaled on both sides.

    Its inputs x come as (x - into) / cols, its outputs y are to be (y - out) / rows; None changes nothing. The bias
    takes in what the old weight makes of `into`; with shifts there must be one.
    """
    moved = bias
    if moved is not None and into is not None:
        moved = moved + weight @ into
    if moved is not None and out is not None:
        moved = moved - out
    if moved is not None and rows is not None:
        moved = moved / rows
    return scale_weight(weight, rows, cols), moved


def unit_scales(gain: Tensor, beta: Tensor | None) -> Tensor:
    """Return the scales that leave a norm with a gain of one, both of the normalised shape.

    Channels with a gain next to zero get 1 and keep their gain: the offset could not be divided by it.
    """
    tiny = TINY_GAIN * gain.abs().max() if beta is not None else gain.new_zeros(())
    return torch.where(gain.abs() <= tiny, torch.ones_like(gain), gain)
