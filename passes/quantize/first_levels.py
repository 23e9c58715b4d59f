"""Where the levels of each group begin that training then moves: scales, and zero points or offsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from passes.quantize.uniform import steps_of
from passes.training.trained_codes import Grid, TrainedCodes

Begin = Literal["l4q", "minmax", "lsqplus", "mse", "hessian"]
# The least scale that float16 holds, and shares of a range that are tried.
_LEAST = 2.0**-24
_SHARES = [1 - 0.04 * step for step in range(16)]


def first_levels(
    weight: Tensor, grid: Grid, begin: Begin, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return scales [N, G] and zero points or offsets [N, G], None without, for a weight [N, K].

    `minmax`: from the least weight of a group to its greatest. `l4q`: the least scale whose levels, as many below zero
    as codes have, clip nothing, and no offset (2402.04902, section 3.3). `lsqplus`: the same for three standard
    deviations around the mean (2004.09576, section 3.2). `mse`: of the first two, cut to 1, 0.96, ... 0.4 of their
    range, what leaves the least squared error; `hessian`: that error weighed by `importance` [K], such as the diagonal
    of the inputs' Gram matrix, or like `mse` without.
    """
    weight = weight.float()
    groups = weight.unflatten(1, (-1, grid.group))
    if begin == "minmax":
        return _covering(*_ends(groups), grid)
    if begin == "l4q":
        return _covering(*_around_zero(*_ends(groups), grid), grid)
    if begin == "lsqplus":
        mean, three = groups.mean(-1), 3 * groups.std(-1, correction=0)
        bound = torch.maximum((mean - three).abs(), (mean + three).abs())
        return _covering(-bound, bound * (1 - 2 / 2**grid.bits), grid)
    weigh = importance.float() if importance is not None and begin == "hessian" else torch.ones(weight.shape[1])
    return _best(weight, grid, weigh)


def _best(weight: Tensor, grid: Grid, weigh: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the levels of the ranges tried that leave each group the least weighted error."""
    least = best = at = None
    for scales, offsets in _tried(weight.unflatten(1, (-1, grid.group)), grid):
        tried = TrainedCodes(weight, grid, scales, offsets).bound({}).dense()
        error = ((weight - tried).square() * weigh).unflatten(1, (-1, grid.group)).sum(-1)
        if least is None or best is None:
            least, best, at = error, scales, offsets
            continue
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scales, best)
        at = None if at is None or offsets is None else torch.where(better, offsets, at)
    assert best is not None
    return best, at


def _tried(groups: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor | None]]:
    low, high = _ends(groups)
    ranges = [(low, high)] if grid.offset == "none" else [(low, high), _around_zero(low, high, grid)]
    for first, last in ranges:
        for share in _SHARES:
            yield _covering(share * first, share * last, grid)


def _ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1), groups.amax(-1)


def _around_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the least range of levels with as many below zero as codes have that holds low to high."""
    below, above = 2 ** (grid.bits - 1), 2 ** (grid.bits - 1) - 1
    scale = torch.maximum((-low / below).clamp(min=0), (high / above).clamp(min=0))
    return -below * scale, above * scale


def _covering(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return the levels whose lowest and highest lie at the ends of a range, or beyond them."""
    if grid.offset == "float":
        # The levels of a range without width lie half a scale off it.
        return ((high - low) / grid.top).clamp(min=_LEAST), (low + high) / 2
    if grid.offset == "none":
        low, high = _around_zero(low, high, grid)
        return steps_of(low, high, grid.bits), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = steps_of(low, high, grid.bits).half().float()
    return scale, torch.round(-low / scale).clamp(0, grid.top)
