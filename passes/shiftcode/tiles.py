"""Fitting the tiles of one column group: the door between tensors and the compiled loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passes.shiftcode import kernels
from passes.shiftcode.design import Design
from passes.shiftcode.levels import How
from passes.shiftcode.rounding import Ints, Rounding, limits_of, rounding_table
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.threads import over_tiles


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

    def how(self) -> How:
        """Return the same in the form compiled code takes."""
        spec, design = self.spec, self.design
        return How(
            design.matrix,
            design.starts,
            *self.rounding,
            0 if spec.offset else 1,
            spec.rounds,
            spec.iterations,
            spec.polish,
            spec.feedback,
            design.sortable,
            self.frozen,
        )


@dataclass(frozen=True, eq=False)
class Fit:
    """The best found for one group: unknowns float64 [T, S+1], offset first; codes u8 [N, n]; error float64 [N, n].

    error: (targets - levels) @ factor, whose squares sum to the loss and which later columns compensate.
    """

    unknowns: Tensor
    codes: Tensor
    error: Tensor


def tiles_of(weight: Tensor, spec: ShiftSpec, frozen: int = 0) -> Tiles:
    """Return how the tiles of a float64 weight [N, K] are fitted."""
    return Tiles(spec, spec.design(), rounding_table(spec.terms), limits_of(weight, spec.row_group), frozen)


def fit_tiles(
    w: Tensor, upper: Tensor, factor: Tensor, tiles: Tiles, given: tuple[Tensor, Tensor] | None = None
) -> Fit:
    """Fit targets w [N, n] under the metric factor @ factor.T with upper = factor^-1, both upper triangular.

    given: unknowns and codes to improve instead of fitting anew; with frozen planes the codes' low bits stay.
    """
    spec, count = tiles.spec, tiles.limits.shape[0]
    rows, n = w.shape
    unknowns = np.zeros((count, tiles.scales + 1)) if given is None else given[0].numpy().copy()
    codes = np.zeros((rows, n), np.uint8) if given is None else given[1].numpy().copy()
    error = np.empty((rows, n))
    prefix, frame = codes & np.uint8((1 << tiles.frozen) - 1), _frame(upper, factor, spec)
    task = (_array(w), spec.row_group, frame, prefix, tiles.limits, tiles.how(), given is not None)
    over_tiles(count, lambda start, stop: kernels.solve_tiles(start, stop, *task, unknowns, codes, error))
    return Fit(torch.from_numpy(unknowns), torch.from_numpy(codes), torch.from_numpy(error))


def _frame(upper: Tensor, factor: Tensor, spec: ShiftSpec) -> kernels.Frame:
    importance = 1.0 / upper.diagonal().square() if spec.weighted else torch.ones_like(upper.diagonal())
    return kernels.Frame(*map(_array, (upper, factor, factor.sum(0), factor @ factor.T, importance)))


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.contiguous().numpy()


def levels_of(unknowns: Tensor, codes: Tensor, tiles: Tiles) -> Tensor:
    """Return the weights of codes [N, n] of one group, float64; unknowns [T, S+1]."""
    levels = unknowns[:, :1] + unknowns[:, 1:] @ torch.from_numpy(tiles.design.matrix).T
    return levels.repeat_interleave(tiles.spec.row_group, 0)[: codes.shape[0]].gather(1, codes.long())
