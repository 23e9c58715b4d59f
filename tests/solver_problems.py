"""Problems for the shift-add solver and what is measured on its answers, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ir.ops.shiftcode import ShiftCodes
from passes.quantize.hessian import inverse_factor, prepare
from passes.shiftcode import group_fit, solver
from passes.shiftcode.rounding import limits_of, rounding_table
from passes.shiftcode.solver import metric_of
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.tiles import Tiles

F64 = torch.float64
BARE = ShiftSpec(bits=2, group=8, starts=1, iterations=0, polish=0, sweeps=0)
CODES = [("planes", 3), ("trits", 2), ("trits31", 2)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def problem(rows: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight and the Grams of calibration and held-out tokens with strongly correlated features."""
    mix = draw(inputs, inputs, seed=seed) * torch.logspace(0, -1.2, inputs, dtype=F64)[:, None]
    mix = mix * torch.exp2(draw(inputs, seed=seed + 1))
    x, y = draw(512, inputs, seed=seed + 2) @ mix, draw(512, inputs, seed=seed + 3) @ mix
    return draw(rows, inputs, seed=seed + 4) * 0.05, x.T @ x, y.T @ y


def solve(weight: Tensor, hessian: Tensor | None, spec: ShiftSpec) -> ShiftCodes:
    return solver.solve(weight, None if hessian is None else metric_of(hessian, spec), spec)


def solved(weight: Tensor, hessian: Tensor | None, spec: ShiftSpec) -> Tensor:
    return solve(weight, hessian, spec).dequantize(F64)


def forms(error: Tensor, metric: Tensor, row_group: int = 1) -> Tensor:
    """Return the quadratic form of each tile of rows."""
    rows = ((error @ metric) * error).sum(1)
    return torch.stack([part.sum() for part in rows.split(row_group)])


def unrounded(weight: Tensor, spec: ShiftSpec) -> Tiles:
    """Return tiles that round nothing."""
    return Tiles(spec, spec.design(), rounding_table(-1), limits_of(weight, spec.row_group))


def factors(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and F = U^-1, upper triangular, with metric^-1 = U^T U."""
    upper = inverse_factor(metric)
    assert upper is not None
    return upper, torch.linalg.inv(upper)


def columns_of(codes: Tensor, spec: ShiftSpec) -> Tensor:
    """Return each weight's ones and design columns, [N, n, S+1]."""
    design = torch.from_numpy(spec.design().matrix)[codes.long()]
    return torch.cat([torch.full_like(design[..., :1], float(spec.offset)), design], -1)


def random_codes(rows: int, n: int, spec: ShiftSpec, seed: int = 0) -> Tensor:
    count = spec.design().matrix.shape[0]
    return torch.randint(0, count, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


METRICS = {
    "full": lambda n: prepare(problem(1, n, seed=n)[1]).matrix,
    "diagonal": lambda n: torch.diag(torch.logspace(-3, 2, n, dtype=F64)),
    "identity": lambda n: torch.eye(n, dtype=F64),
}


def refit(w: Tensor, codes: Tensor, metric: Tensor, tiles: Tiles) -> tuple[Tensor, float]:
    """Run the scale solve of one tile in a group's metric; return the unknowns and the loss it reports."""
    upper, factor = factors(metric)
    fit = group_fit.solved_scales(group_fit.Group(w, upper, factor, metric, torch.zeros_like(codes), tiles), codes)
    return fit.unknowns[0], float(fit.error.square().sum())


def nasty(rows: int, inputs: int) -> Tensor:
    """Return a weight with rows of zeros, of one value, of one outlier, of two values, and of groups of zeros."""
    w = draw(max(rows, 6), inputs) * 0.05
    w[0], w[1], w[2] = 0.0, 0.25, 0.0
    w[2, inputs // 2] = 1e4
    w[3] = torch.where(w[3] > 0, 0.5, -0.25)
    w[4, : inputs // 2] = 0.0
    return w[:rows]
