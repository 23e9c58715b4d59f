"""Weighted binary (or ternary) coding of whole rows, each a group of its own, without a Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passes.shiftcode.design import Design, design_of
from passes.shiftcode.levels import How
from passes.shiftcode.rounding import Ints, Rounding
from passes.shiftcode.threads import over_tiles
from passes.shiftcode.value_fit import fit_rows

_NO_LIMITS = np.array([-1000, 1000, -1000, 1000])


@dataclass(frozen=True, eq=False)
class BcqFit:
    """A fit of R rows: z [R], alpha [R, scales] and weighted loss [R] in float64, codes u8 [R, n], their code book."""

    z: Tensor
    alpha: Tensor
    codes: Tensor
    loss: Tensor
    design: Design

    @property
    def values(self) -> Tensor:
        """The coded weights, float64 [R, n]."""
        levels = self.z[:, None] + self.alpha @ torch.from_numpy(self.design.matrix).T
        return levels.gather(1, self.codes.long())


def fit_bcq(
    w: Tensor,
    bits: int,
    weight: Tensor | None = None,
    *,
    rounding: Rounding,
    code: str = "planes",
    offset: bool = False,
    limits: Ints | None = None,
    rounds: int = 10,
    starts: int = 1,
) -> BcqFit:
    """Fit scales, an offset and codes to each row by alternating least squares and nearest levels.

    w: [R, n]; weight: [n] or [R, n] >= 0, importance of each column, default 1; rounding: see
    `passes.shiftcode.rounding.rounding_table`; limits: int64 [R, 4], the leading exponents each row may store, default
    any; rounds: alternations at most, a row stops when its cells repeat; starts: code books it is fitted from. The best
    iterate of each row is returned (ShiftAddLLM, 2406.05981, Alg. 1, with exact solves and keep-best).
    """
    w = w.double().contiguous()
    weight = torch.ones_like(w) if weight is None else weight.double().expand_as(w).contiguous()
    design = design_of(code, bits, starts)
    rows = w.shape[0]
    limits = np.broadcast_to(_NO_LIMITS, (rows, 4)).copy() if limits is None else limits
    unknowns = np.empty((rows, design.matrix.shape[1] + 1))
    codes, losses = np.empty(w.shape, np.uint8), np.empty(rows)
    how = How(design.matrix, design.starts, *rounding, 0 if offset else 1, rounds, True, design.sortable, 0)
    task = (w.numpy(), weight.numpy(), limits, how, unknowns, codes, losses)
    over_tiles(rows, lambda start, stop: fit_rows(start, stop, *task))
    found = torch.from_numpy(unknowns)
    return BcqFit(found[:, 0], found[:, 1:], torch.from_numpy(codes), torch.from_numpy(losses), design)
