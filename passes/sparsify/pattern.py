"""N:M patterns and the masks that a score chooses under them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Members of a group that are ranked by comparing each pair.
_FEW = 8
_TEXT = re.compile(r"([0-9]+):([0-9]+)")


@dataclass(frozen=True)
class Pattern:
    """n of every m neighbouring inputs of a row are kept."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def fits(self, inputs: int) -> bool:
        """Return whether m divides the inputs."""
        return inputs % self.m == 0


# All of every one: what a weight without a mask has.
DENSE = Pattern(1, 1)


def pattern_of(text: str) -> Pattern:
    """Return the pattern that text such as `2:4` spells; ValueError for another text or n not below m."""
    found = _TEXT.fullmatch(text)
    if found is None or not 1 <= int(found[1]) < int(found[2]) <= 64:
        raise ValueError(f"{text} is no pattern n:m with 1 <= n < m <= 64")
    return Pattern(int(found[1]), int(found[2]))


def nm_mask(score: Tensor, pattern: Pattern) -> Tensor:
    """Return which inputs a score [N, K] keeps, bool [N, K]: the n highest of every m, the first ones where they tie.

    Ties are broken by place, so that a mask is the same on every machine and in every run. Scores are not NaN.
    """
    groups = score.unflatten(1, (-1, pattern.m))
    if pattern.m > _FEW:
        order = torch.argsort(groups, dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(groups, dtype=torch.bool)
        return mask.scatter_(-1, order[..., : pattern.n], True).flatten(1)
    # Counting who is ahead takes m^2 comparisons and is several times faster than sorting many short rows.
    columns = groups.unbind(-1)
    kept = [_ahead(columns, i) < pattern.n for i in range(pattern.m)]
    return torch.stack(kept, -1).flatten(1)


def _ahead(columns: Sequence[Tensor], i: int) -> Tensor:
    """Return how many of a group's members come before member i."""
    count = torch.zeros_like(columns[i], dtype=torch.uint8)
    for j, other in enumerate(columns):
        if j != i:
            count += other >= columns[i] if j < i else other > columns[i]
    return count
