"""The solver's compiled inner loops: everything that happens to one tile, the weights that share a set of scales.

A tile is R rows by n columns. A code selects a level z + design[code] @ alpha; the unknowns of a tile are z and then
alpha. Tiles are independent, so their order does not matter. All arithmetic is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from passes.shiftcode.compiled import compiled
from passes.shiftcode.levels import (
    How,
    add_scaled,
    copy,
    dot,
    fill,
    level_of,
    nearest,
    set_levels,
    solve_rounded,
)
from passes.shiftcode.rounding import Codes, Floats, Ints
from passes.shiftcode.value_fit import fit_values

_HUGE = 1e300


class Frame(NamedTuple):
    """What the columns of a group make of errors: metric = factor @ factor.T, upper = factor^-1, all [n, n].

    factor_sum: the sum of the factor's rows; importance: [n], of the columns in the first fit.
    """

    upper: Floats
    factor: Floats
    factor_sum: Floats
    metric: Floats
    importance: Floats


@compiled
def _choose(
    x: float, middles: Floats, levels: Floats, order: Ints, prefix: int, unknowns: Floats, how: How
) -> tuple[int, float]:
    """Return the code nearest to x, and its level; with frozen planes only codes whose low bits are `prefix`."""
    if how.frozen == 0:
        place = nearest(middles, x)
        return order[place], levels[place]
    best, best_level, lowest = 0, 0.0, _HUGE
    for code in range(prefix, how.design.shape[0], 1 << how.frozen):
        level = level_of(code, unknowns, how)
        if abs(x - level) < lowest:
            best, best_level, lowest = code, level, abs(x - level)
    return best, best_level


@compiled
def _walk(
    w: Floats,
    frame: Frame,
    middles: Floats,
    levels: Floats,
    order: Ints,
    prefix: Codes,
    unknowns: Floats,
    how: How,
    codes: Codes,
    error: Floats,
) -> float:
    """Code the columns of one row in turn, pushing each error into the later ones; return the sum of error**2."""
    rest = np.empty(len(w))
    copy(rest, w)
    loss = 0.0
    for j in range(len(w)):
        code, level = _choose(rest[j], middles, levels, order, prefix[j], unknowns, how)
        codes[j] = code
        row = frame.upper[j]
        e = (rest[j] - level) / row[j]
        error[j] = e
        loss += e * e
        add_scaled(rest[j + 1 :], -e, row[j + 1 :])
    return loss


@compiled
def _through(row: Floats, factor: Floats, out: Floats) -> None:
    """Write row @ factor, factor upper triangular."""
    fill(out, 0.0)
    for j in range(len(row)):
        add_scaled(out[j:], row[j], factor[j, j:])


@compiled
def _designs_through(codes: Codes, frame: Frame, design: Floats, out: Floats) -> None:
    """Write the row's ones and design columns times the factor, [S+1, n]."""
    n = len(codes)
    copy(out[0], frame.factor_sum)
    for s in range(design.shape[1]):
        fill(out[s + 1], 0.0)
    for j in range(n):
        line = frame.factor[j, j:]
        for s in range(design.shape[1]):
            add_scaled(out[s + 1, j:], design[codes[j], s], line)


@compiled
def _descend(
    w: Floats,
    frame: Frame,
    error: Floats,
    codes: Codes,
    middles: Floats,
    levels: Floats,
    order: Ints,
    prefix: Codes,
    unknowns: Floats,
    how: How,
) -> None:
    """Set each column's code in turn to the minimiser of the row's quadratic form, the others fixed."""
    n = len(w)
    slope = np.empty(n)
    for j in range(n):
        slope[j] = -dot(error[j:], frame.factor[j, j:])
    for j in range(n):
        line, old = frame.metric[j], level_of(codes[j], unknowns, how)
        code, level = _choose(old - slope[j] / line[j], middles, levels, order, prefix[j], unknowns, how)
        if code != codes[j]:
            codes[j] = code
            add_scaled(slope[j + 1 :], level - old, line[j + 1 :])


@compiled
def _errors(w: Floats, codes: Codes, frame: Frame, unknowns: Floats, how: How, out: Floats) -> float:
    """Write (w - levels) @ factor of one row; return its sum of squares."""
    difference = np.empty(len(w))
    for j in range(len(w)):
        difference[j] = w[j] - level_of(codes[j], unknowns, how)
    _through(difference, frame.factor, out)
    return dot(out, out)


@compiled
def _refit(
    through: Floats,
    codes: Codes,
    frame: Frame,
    limits: Ints,
    how: How,
    unknowns: Floats,
    designs: Floats,
    error: Floats,
) -> float:
    """Solve scales and offset of a tile for fixed codes in its metric; return the loss.

    through: [R, n], the weights times the factor. With E = (W - Q) factor the loss is the sum of E**2, what the errors
    cost once all later columns have compensated them (BPDQ, 2602.04163: scale solve and delta correction).
    """
    rows, size = codes.shape[0], how.design.shape[1] + 1
    normal, right = np.zeros((size, size)), np.zeros(size)
    for r in range(rows):
        _designs_through(codes[r], frame, how.design, designs[r])
        for i in range(size):
            right[i] += dot(designs[r, i], through[r])
            for j in range(i + 1):
                normal[i, j] += dot(designs[r, i], designs[r, j])
    for i in range(size):
        for j in range(i):
            normal[j, i] = normal[i, j]
    solve_rounded(normal, right, unknowns, limits, how)
    loss = 0.0
    for r in range(rows):
        copy(error[r], through[r])
        for i in range(size):
            add_scaled(error[r], -unknowns[i], designs[r, i])
        loss += dot(error[r], error[r])
    return loss


@compiled
def copy_codes(into: Codes, source: Codes) -> None:
    """Copy codes [R, n]. A loop compiles in a fraction of the time that an assignment to a slice takes."""
    for r in range(into.shape[0]):
        for k in range(into.shape[1]):
            into[r, k] = source[r, k]


@compiled
def _keep(unknowns: Floats, codes: Codes, error: Floats, now: Floats, now_codes: Codes, now_error: Floats) -> None:
    """Copy one state over another."""
    for i in range(len(unknowns)):
        unknowns[i] = now[i]
    copy_codes(codes, now_codes)
    for r in range(error.shape[0]):
        for k in range(error.shape[1]):
            error[r, k] = now_error[r, k]


@compiled
def _same(a: Codes, b: Codes) -> bool:
    for r in range(a.shape[0]):
        for k in range(a.shape[1]):
            if a[r, k] != b[r, k]:
                return False
    return True


@compiled
def solve_tile(
    w: Floats,
    frame: Frame,
    prefix: Codes,
    limits: Ints,
    how: How,
    given: bool,
    unknowns: Floats,
    codes: Codes,
    error: Floats,
) -> float:
    """Fit one tile; returns its loss, the sum of error**2 with error = (w - levels) @ factor.

    w: [R, n] targets; prefix: u8 [R, n], low bits of the codes that stay; given: unknowns and codes hold a start
    already and are improved; unknowns [S+1], codes u8 [R, n], error [R, n] receive the best found. After the first fit,
    `iterations` of walk and scale solve alternate (BPDQ, 2602.04163), then `polish` rounds of scale solve and
    coordinate descent on the codes; the best state is kept throughout.
    """
    rows, n = w.shape
    size, count = how.design.shape[1] + 1, how.design.shape[0]
    levels, order, middles = np.empty(count), np.empty(count, np.int64), np.empty(count - 1)
    best = 0.0
    if given:
        for r in range(rows):
            best += _errors(w[r], codes[r], frame, unknowns, how, error[r])
    else:
        pooled, importance = np.empty(rows * n), np.empty(rows * n)
        for r in range(rows):
            for k in range(n):
                pooled[r * n + k], importance[r * n + k] = w[r, k], frame.importance[k]
        fit_values(pooled, importance, limits, how, unknowns)
        set_levels(unknowns, how, levels, order, middles)
        for r in range(rows):
            best += _walk(w[r], frame, middles, levels, order, prefix[r], unknowns, how, codes[r], error[r])
    if how.iterations + how.polish == 0:
        return best
    now, now_codes, now_error = np.empty(size), np.empty((rows, n), np.uint8), np.empty((rows, n))
    _keep(now, now_codes, now_error, unknowns, codes, error)
    last = np.empty((rows, n), np.uint8)
    through, designs = np.empty((rows, n)), np.empty((rows, size, n))
    for r in range(rows):
        _through(w[r], frame.factor, through[r])
    for _ in range(how.iterations):
        loss = _refit(through, now_codes, frame, limits, how, now, designs, now_error)
        if loss < best:
            best = loss
            _keep(unknowns, codes, error, now, now_codes, now_error)
        set_levels(now, how, levels, order, middles)
        copy_codes(last, now_codes)
        loss = 0.0
        for r in range(rows):
            loss += _walk(w[r], frame, middles, levels, order, prefix[r], now, how, now_codes[r], now_error[r])
        if loss < best:
            best = loss
            _keep(unknowns, codes, error, now, now_codes, now_error)
        if _same(last, now_codes):
            break
    for _ in range(how.polish):
        copy_codes(now_codes, codes)
        loss = _refit(through, now_codes, frame, limits, how, now, designs, now_error)
        if loss >= best:
            _keep(now, now_codes, now_error, unknowns, codes, error)
        set_levels(now, how, levels, order, middles)
        loss = 0.0
        for r in range(rows):
            _descend(w[r], frame, now_error[r], now_codes[r], middles, levels, order, prefix[r], now, how)
            loss += _errors(w[r], now_codes[r], frame, now, how, now_error[r])
        if loss >= best * (1.0 - 1e-12):
            break
        best = loss
        _keep(unknowns, codes, error, now, now_codes, now_error)
    return best


@compiled
def solve_tiles(
    start: int,
    stop: int,
    w: Floats,
    tile_rows: int,
    frame: Frame,
    prefix: Codes,
    limits: Ints,
    how: How,
    given: bool,
    unknowns: Floats,
    codes: Codes,
    error: Floats,
) -> None:
    """Fit some tiles of a column group, see `solve_tile`; w [N, n], limits [T, 4], unknowns [T, S+1] of all T tiles."""
    for t in range(start, stop):
        a, b = t * tile_rows, min((t + 1) * tile_rows, w.shape[0])
        solve_tile(w[a:b], frame, prefix[a:b], limits[t], how, given, unknowns[t], codes[a:b], error[a:b])
