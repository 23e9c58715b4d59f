"""DSnoT: kept and dropped weights that change places until a row's expected error is small (2310.08915)."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.sparsify.pattern import Pattern

# Rows whose expected error is below this stop (the release's threshold), and exchanges end after so many rounds.
_SMALL, _ROUNDS = 0.1, 50


def exchanged(weight: Tensor, mask: Tensor, score: Tensor, mean: Tensor, variance: Tensor, pattern: Pattern) -> Tensor:
    """Return a mask [N, K] in which weights changed places within their groups of m, as many kept as before.

    weight: [N, K]; mask: bool, of the pattern; score: by which the least kept weight of a group goes (Wanda's);
    mean, variance: of each input over tokens, [K]. A row's expected error is the sum of w * mean over what it dropped
    (section 3.2). In each round, of the exchanges that lower it, the dropped weight comes back that adds most for its
    variance, for the least kept weight of its group; a row stops where its error is small or no exchange lowers it.
    """
    shape = (weight.shape[0], -1, pattern.m)
    adds = (weight * mean).double()
    worth = adds.abs() / variance.double().clamp_min(torch.finfo(torch.float32).tiny)
    found, rows = mask.clone(), torch.arange(weight.shape[0])
    error = torch.where(found, 0.0, adds).sum(1)
    live = torch.ones_like(error, dtype=torch.bool)
    for _ in range(_ROUNDS):
        live &= error.abs() > _SMALL
        if not bool(live.any()):
            break
        least = torch.where(found, score.double(), torch.inf).view(shape).argmin(-1, keepdim=True)
        gone = adds.view(shape).gather(-1, least)
        new = (error[:, None, None] - adds.view(shape) + gone).flatten(1)
        helps = ~found & (new.abs() < error.abs()[:, None])
        rank = torch.where(helps, worth, -1.0)
        back = rank.argmax(1)
        moved = live & helps[rows, back]
        r, group = rows[moved], back[moved] // pattern.m
        found[r, back[moved]] = True
        found[r, group * pattern.m + least[r, group, 0]] = False
        error, live = torch.where(moved, new[rows, back], error), moved
    return found
