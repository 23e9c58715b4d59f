"""How the tiles of a column group are fitted, and what their codes stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passes.shiftcode.design import Design
from passes.shiftcode.levels import How
from passes.shiftcode.rounding import Ints, Rounding, limits_of, rounding_table
from passes.shiftcode.spec import ShiftSpec


@dataclass(frozen=True, eq=False)
class Tiles:
    """How tiles are fitted: the solver's options, the code book, the rounding table, limits int64 [T, 4].

    frozen: planes whose codes are given and shared, see `passes.shiftcode.nested`.
    """

    spec: ShiftSpec
    design: Design
    rounding: Rounding
    limits: Ints
    frozen: int = 0

    @property
    def scales(self) -> int:
        """Scales a set, without the offset."""
        return int(self.design.matrix.shape[1])

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.limits)

    def some(self, start: int, stop: int) -> Tiles:
        """Return how tiles `start` up to `stop` of these are fitted."""
        return replace(self, limits=self.limits[start:stop])

    def sums(self, rows: Tensor) -> Tensor:
        """Return the sums [T] over the rows of each tile of values [N]."""
        step = self.spec.row_group
        if step == 1:
            return rows
        whole = rows.new_zeros(self.count * step)
        whole[: rows.shape[0]] = rows
        return whole.view(self.count, step).sum(1)

    def rows(self, tiles: Tensor, count: int) -> Tensor:
        """Return values [T, ...] of tiles for each of their `count` rows, [N, ...]."""
        step = self.spec.row_group
        return tiles if step == 1 else tiles.repeat_interleave(step, 0)[:count]

    def how(self) -> How:
        """Return the same in the form compiled code takes."""
        spec, design = self.spec, self.design
        return How(
            design.matrix,
            design.starts,
            *self.rounding,
            0 if spec.offset else 1,
            spec.rounds,
            spec.feedback,
            design.sortable,
            self.frozen,
        )


def tiles_of(weight: Tensor, spec: ShiftSpec, frozen: int = 0) -> Tiles:
    """Return how the tiles of a float64 weight [N, K] are fitted."""
    return Tiles(spec, spec.design(), rounding_table(spec.terms), limits_of(weight, spec.row_group), frozen)


def code_levels(unknowns: Tensor, tiles: Tiles) -> Tensor:
    """Return the weight that every code stands for in each tile, float64 [T, codes]; unknowns [T, S+1]."""
    return unknowns[:, :1] + unknowns[:, 1:] @ torch.from_numpy(tiles.design.matrix).T


def levels_of(unknowns: Tensor, codes: Tensor, tiles: Tiles) -> Tensor:
    """Return the weights of codes [N, n] of one group, float64; unknowns [T, S+1]."""
    return tiles.rows(code_levels(unknowns, tiles), codes.shape[0]).gather(1, codes.long())
