"""Compiled binary (or ternary) coding of weighted values that share one set of scales, without a Hessian."""

from __future__ import annotations

import math

import numpy as np

from passes.shiftcode.compiled import compiled
from passes.shiftcode.levels import How, copy, fill, nearest, rounded, set_levels, solve_rounded
from passes.shiftcode.rounding import Codes, Floats, Ints

_HUGE = 1e300


@compiled
def _cells(
    values: Floats, mass: Floats, moment: Floats, middles: Floats, order: Ints, cell_mass: Floats, cell_moment: Floats
) -> None:
    """Write what falls nearest to each code: the sums of weight and of weight * value, from running sums."""
    start, count = 0, len(values)
    for place in range(len(order)):
        stop = count
        if place < len(middles):
            stop, last = start, count
            while stop < last:
                centre = (stop + last) >> 1
                if values[centre] <= middles[place]:
                    stop = centre + 1
                else:
                    last = centre
        cell_mass[order[place]] = mass[stop] - mass[start]
        cell_moment[order[place]] = moment[stop] - moment[start]
        start = stop


@compiled
def cell_normal(cell_mass: Floats, cell_moment: Floats, design: Floats, normal: Floats, right: Floats) -> None:
    """Write the normal equations [S+1, S+1], [S+1] of weights that sit in their cells."""
    size = design.shape[1] + 1
    for i in range(size):
        fill(normal[i], 0.0)
    fill(right, 0.0)
    for code in range(design.shape[0]):
        m, b = cell_mass[code], cell_moment[code]
        normal[0, 0] += m
        right[0] += b
        for i in range(1, size):
            d = design[code, i - 1]
            normal[0, i] += m * d
            right[i] += b * d
            for j in range(1, i + 1):
                normal[j, i] += m * d * design[code, j - 1]
    for i in range(size):
        for j in range(i):
            normal[i, j] = normal[j, i]


@compiled
def _cell_loss(square: float, cell_mass: Floats, cell_moment: Floats, levels: Floats, order: Ints) -> float:
    total = square
    for place in range(len(levels)):
        code = order[place]
        total += (cell_mass[code] * levels[place] - 2.0 * cell_moment[code]) * levels[place]
    return total


@compiled
def _greedy(values: Floats, weight: Floats, total: float, unknowns: Floats) -> None:
    """Write the scales of residual greedy coding, each the mean of |residual|."""
    residual = np.empty(len(values))
    for i in range(len(values)):
        residual[i] = values[i] - unknowns[0]
    for s in range(1, len(unknowns)):
        step = 0.0
        for i in range(len(residual)):
            step += weight[i] * abs(residual[i])
        step /= total
        for i in range(len(residual)):
            residual[i] -= step if residual[i] >= 0.0 else -step
        unknowns[s] = step


@compiled
def _descending(unknowns: Floats) -> None:
    """Make the scales positive and sort them, largest first, which permutes the codes of the levels only."""
    for i in range(1, len(unknowns)):
        x, place = abs(unknowns[i]), i
        while place > 1 and unknowns[place - 1] < x:
            unknowns[place] = unknowns[place - 1]
            place -= 1
        unknowns[place] = x


@compiled
def _start(
    start: int,
    v: Floats,
    m: Floats,
    total: float,
    centre: float,
    spread: float,
    unknowns: Floats,
    limits: Ints,
    how: How,
) -> None:
    """Write one of the starts of a fit, rounded."""
    unknowns[0] = centre if start % 2 == 0 else 0.0
    if how.starts[start, 0] < 0.0:
        _greedy(v, m, total, unknowns)
    else:
        for s in range(len(unknowns) - 1):
            unknowns[s + 1] = spread * how.starts[start, s]
    for s in range(len(unknowns)):
        unknowns[s] = rounded(unknowns[s], s, limits, how)


@compiled
def fit_values(values: Floats, weight: Floats, limits: Ints, how: How, best: Floats) -> float:
    """Fit scales and an offset to weighted values [m] by alternating least squares and nearest levels; keep the best.

    best: [S+1] receives offset and scales. Returns the lowest weighted loss (ShiftAddLLM, 2406.05981, Alg. 1, with
    importance weights, exact solves and keep-best). Values are sorted once, so that what falls into a cell is a
    difference of two running sums.
    """
    scales, codes = how.design.shape[1], how.design.shape[0]
    place = np.argsort(values)
    v, m = values[place], weight[place]
    count = len(v)
    mass, moment = np.zeros(count + 1), np.zeros(count + 1)
    square = 0.0
    for i in range(count):
        mass[i + 1] = mass[i] + m[i]
        moment[i + 1] = moment[i] + m[i] * v[i]
        square += m[i] * v[i] * v[i]
    total = mass[count] + 1e-300
    centre = moment[count] / total if how.first == 0 else 0.0
    spread = 0.0
    for i in range(count):
        spread += m[i] * (v[i] - centre) ** 2
    spread = math.sqrt(spread / total)
    unknowns, normal, right = np.empty(scales + 1), np.empty((scales + 1, scales + 1)), np.empty(scales + 1)
    levels, order, middles = np.empty(codes), np.empty(codes, np.int64), np.empty(codes - 1)
    cell_mass, cell_moment, seen = np.empty(codes), np.empty(codes), np.empty(codes)
    lowest = _HUGE
    for start in range(how.starts.shape[0]):
        _start(start, v, m, total, centre, spread, unknowns, limits, how)
        fill(seen, -1.0)
        for turn in range(how.rounds + 1):
            set_levels(unknowns, how, levels, order, middles)
            _cells(v, mass, moment, middles, order, cell_mass, cell_moment)
            loss = _cell_loss(square, cell_mass, cell_moment, levels, order)
            if loss < lowest:
                lowest = loss
                copy(best, unknowns)
            if turn == how.rounds or not copy(seen, cell_mass):
                break
            cell_normal(cell_mass, cell_moment, how.design, normal, right)
            solve_rounded(normal, right, unknowns, limits, how)
            if how.sortable:
                _descending(unknowns)
    return lowest


@compiled
def fit_rows(
    start: int,
    stop: int,
    w: Floats,
    weight: Floats,
    limits: Ints,
    how: How,
    unknowns: Floats,
    codes: Codes,
    losses: Floats,
) -> None:
    """Fit some rows of [R, n] with importance [R, n], see `fit_values`; writes unknowns, codes and losses."""
    count = how.design.shape[0]
    levels, order, middles = np.empty(count), np.empty(count, np.int64), np.empty(count - 1)
    for r in range(start, stop):
        losses[r] = fit_values(w[r], weight[r], limits[r], how, unknowns[r])
        set_levels(unknowns[r], how, levels, order, middles)
        for k in range(w.shape[1]):
            codes[r, k] = order[nearest(middles, w[r, k])]
