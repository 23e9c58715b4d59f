"""Refitting all scales and offsets of a row together, under the layer's full Hessian, with the codes fixed."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from passes.shiftcode.compiled import compiled
from passes.shiftcode.levels import How, add_scaled, dot, solve_rounded
from passes.shiftcode.rounding import Codes, Floats, Ints
from passes.shiftcode.threads import over_tiles
from passes.shiftcode.tiles import Tiles


def refit_scales(w: Tensor, metric: Tensor, groups: Tensor, unknowns: Tensor, codes: Tensor, tiles: Tiles) -> Tensor:
    """Return scales and offsets [T, G, S+1] that lower tr(E H E^T) of every tile for fixed codes; never raise it.

    w: [N, K]; metric: the damped Hessian [K, K]; groups: int64 [K], the group of each column; unknowns: those to beat.
    The objective is quadratic in all scales of a tile's rows at once: with Z the group-wise ones and design columns,
    (Z H Z^T) u = Z H w, summed over the rows. Unknowns are rounded in order, later ones making up for it.
    """
    found = unknowns.clone()
    arrays = (w.contiguous().numpy(), tiles.spec.row_group, metric.contiguous().numpy(), groups.numpy())
    rest = (codes.contiguous().numpy(), tiles.limits, tiles.how(), found.numpy())
    over_tiles(found.shape[0], lambda start, stop: _refit_tiles(start, stop, *arrays, *rest))
    return found


@compiled
def _normal(w: Floats, metric: Floats, groups: Ints, codes: Codes, how: How, normal: Floats, right: Floats) -> None:
    """Add one row's Z H Z^T [m, m] and Z H w [m], m = groups * (S+1)."""
    size, inputs = how.design.shape[1] + 1, len(w)
    weighted = np.zeros((len(right), inputs))
    for j in range(inputs):
        line, base = metric[j], groups[j] * size
        for s in range(how.first, size):
            d = 1.0 if s == 0 else how.design[codes[j], s - 1]
            add_scaled(weighted[base + s], d, line)
    for a in range(len(right)):
        line = weighted[a]
        right[a] += dot(line, w)
        for k in range(inputs):
            base = groups[k] * size
            for s in range(how.first, size):
                d = 1.0 if s == 0 else how.design[codes[k], s - 1]
                normal[a, base + s] += line[k] * d


@compiled
def _objective(normal: Floats, right: Floats, u: Floats) -> float:
    total = 0.0
    for a in range(len(u)):
        total += u[a] * (dot(normal[a], u) - 2.0 * right[a])
    return total


@compiled
def _refit_tiles(
    start: int,
    stop: int,
    w: Floats,
    tile_rows: int,
    metric: Floats,
    groups: Ints,
    codes: Codes,
    limits: Ints,
    how: How,
    unknowns: Floats,
) -> None:
    for t in range(start, stop):
        flat = unknowns[t].copy().reshape(-1)
        normal, right = np.zeros((len(flat), len(flat))), np.zeros(len(flat))
        for r in range(t * tile_rows, min((t + 1) * tile_rows, w.shape[0])):
            _normal(w[r], metric, groups, codes[r], how, normal, right)
        fresh = flat.copy()
        solve_rounded(normal.copy(), right.copy(), fresh, limits[t], how)
        if _objective(normal, right, fresh) < _objective(normal, right, flat):
            unknowns[t] = fresh.reshape(unknowns[t].shape)
