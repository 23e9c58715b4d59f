"""The solver's compiled inner loops: everything that happens to one tile, the weights that share a set of scales.

A tile is R rows by n columns. A code selects a level z + design[code] @ alpha; the unknowns of a tile are z and then
alpha. Tiles are independent, so their order does not matter. All arithmetic is float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from passes.shiftcode.rounding import Codes, Floats, Ints, round_value

_RIDGE = 1e-10
_HUGE = 1e300
INNER = {"cache": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}


class How(NamedTuple):
    """How tiles are fitted, in a form that compiled code takes.

    design: float64 [codes, S]; starts: [count, S], see `passes.shiftcode.design.Design`; values, middles, leads: the
    rounding table; first: the first unknown, 0 with an offset and 1 without; feedback: whether later unknowns make up
    for the rounding of earlier ones; sortable: scales may be permuted and negated; frozen: planes whose codes stay.
    """

    design: Floats
    starts: Floats
    values: Floats
    middles: Floats
    leads: Ints
    first: int
    rounds: int
    iterations: int
    polish: int
    feedback: bool
    sortable: bool
    frozen: int


class Frame(NamedTuple):
    """What the columns of a group make of errors: metric = factor @ factor.T, upper = factor^-1, all [n, n].

    factor_sum: the sum of the factor's rows; importance: [n], of the columns in the first fit.
    """

    upper: Floats
    factor: Floats
    factor_sum: Floats
    metric: Floats
    importance: Floats


@njit(**INNER)
def add_scaled(into: Floats, scale: float, line: Floats) -> None:
    """Add scale * line to a vector. Loops from 0 to a length are the ones that get vectorised."""
    for k in range(len(line)):
        into[k] += scale * line[k]


@njit(**INNER)
def dot(a: Floats, b: Floats) -> float:
    """Return the inner product of two vectors."""
    total = 0.0
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@njit(**INNER)
def _fill(into: Floats, value: float) -> None:
    for k in range(len(into)):
        into[k] = value


@njit(**INNER)
def _copy(into: Floats, source: Floats) -> bool:
    """Copy a vector; return whether anything changed."""
    changed = False
    for k in range(len(into)):
        changed |= into[k] != source[k]
        into[k] = source[k]
    return changed


@njit(**INNER)
def solve_rounded(normal: Floats, right: Floats, unknowns: Floats, limits: Ints, how: How) -> None:
    """Solve normal @ unknowns = right, rounding each unknown before the ones after it are solved; ruins its inputs.

    The unknowns are those of one or of several groups in turn, each with its offset first. Elimination runs from the
    last unknown up, so each is the optimum given those already rounded and free later ones: GPTQ's error feedback
    (Frantar et al. 2023) on the vector of scales. Scales of frozen planes stay positive: their signs are shared.
    limits: int64 [4], lowest and highest leading exponent of offsets, then of scales.
    """
    size, period = len(right), how.design.shape[1] + 1
    largest = 0.0
    for i in range(size):
        if i % period < how.first:
            right[i] = 0.0
            for j in range(size):
                normal[i, j], normal[j, i] = 0.0, 0.0
        largest = max(largest, normal[i, i])
    for i in range(size):
        normal[i, i] += _RIDGE * largest + 1e-300
    for p in range(size - 1, 0, -1):
        for i in range(p):
            factor = normal[i, p] / normal[p, p]
            right[i] -= factor * right[p]
            for j in range(p):
                normal[i, j] -= factor * normal[p, j]
    for t in range(size):
        x = right[t]
        for s in range(t):
            x -= normal[t, s] * unknowns[s]
        x /= normal[t, t]
        if 0 < t % period <= how.frozen and x < 0.0:
            x = 0.0
        unknowns[t] = _rounded(x, t % period, limits, how) if how.feedback else x
    if not how.feedback:
        for t in range(size):
            unknowns[t] = _rounded(unknowns[t], t % period, limits, how)


@njit(**INNER)
def _rounded(x: float, unknown: int, limits: Ints, how: How) -> float:
    at = 0 if unknown == 0 else 2
    return round_value(x, how.values, how.middles, how.leads, limits[at], limits[at + 1])


@njit(**INNER)
def level_of(code: int, unknowns: Floats, how: How) -> float:
    """Return the value of a code."""
    value = unknowns[0]
    for s in range(how.design.shape[1]):
        value += how.design[code, s] * unknowns[s + 1]
    return value


@njit(**INNER)
def set_levels(unknowns: Floats, how: How, levels: Floats, order: Ints, middles: Floats) -> None:
    """Write the levels of every code in ascending order, the code of each, and the middles between them."""
    for code in range(how.design.shape[0]):
        value, place = level_of(code, unknowns, how), code
        while place > 0 and levels[place - 1] > value:
            levels[place], order[place] = levels[place - 1], order[place - 1]
            place -= 1
        levels[place], order[place] = value, code
    for i in range(len(middles)):
        middles[i] = (levels[i] + levels[i + 1]) / 2.0


@njit(**INNER)
def nearest(middles: Floats, x: float) -> int:
    """Return the place of the sorted level nearest to x; ties go to the lower one."""
    if len(middles) > 15:
        first, last = 0, len(middles)
        while first < last:
            centre = (first + last) >> 1
            if middles[centre] < x:
                first = centre + 1
            else:
                last = centre
        return first
    place = 0
    for m in middles:
        place += x > m
    return place


@njit(**INNER)
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


@njit(**INNER)
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


@njit(**INNER)
def cell_normal(cell_mass: Floats, cell_moment: Floats, design: Floats, normal: Floats, right: Floats) -> None:
    """Write the normal equations [S+1, S+1], [S+1] of weights that sit in their cells."""
    size = design.shape[1] + 1
    for i in range(size):
        _fill(normal[i], 0.0)
    _fill(right, 0.0)
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


@njit(**INNER)
def _cell_loss(square: float, cell_mass: Floats, cell_moment: Floats, levels: Floats, order: Ints) -> float:
    total = square
    for place in range(len(levels)):
        code = order[place]
        total += (cell_mass[code] * levels[place] - 2.0 * cell_moment[code]) * levels[place]
    return total


@njit(**INNER)
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


@njit(**INNER)
def _descending(unknowns: Floats) -> None:
    """Make the scales positive and sort them, largest first, which permutes the codes of the levels only."""
    for i in range(1, len(unknowns)):
        x, place = abs(unknowns[i]), i
        while place > 1 and unknowns[place - 1] < x:
            unknowns[place] = unknowns[place - 1]
            place -= 1
        unknowns[place] = x


@njit(**INNER)
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
        unknowns[s] = _rounded(unknowns[s], s, limits, how)


@njit(**INNER)
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
        _fill(seen, -1.0)
        for turn in range(how.rounds + 1):
            set_levels(unknowns, how, levels, order, middles)
            _cells(v, mass, moment, middles, order, cell_mass, cell_moment)
            loss = _cell_loss(square, cell_mass, cell_moment, levels, order)
            if loss < lowest:
                lowest = loss
                _copy(best, unknowns)
            if turn == how.rounds or not _copy(seen, cell_mass):
                break
            cell_normal(cell_mass, cell_moment, how.design, normal, right)
            solve_rounded(normal, right, unknowns, limits, how)
            if how.sortable:
                _descending(unknowns)
    return lowest


@njit(**INNER)
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
    _copy(rest, w)
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


@njit(**INNER)
def _through(row: Floats, factor: Floats, out: Floats) -> None:
    """Write row @ factor, factor upper triangular."""
    _fill(out, 0.0)
    for j in range(len(row)):
        add_scaled(out[j:], row[j], factor[j, j:])


@njit(**INNER)
def _designs_through(codes: Codes, frame: Frame, design: Floats, out: Floats) -> None:
    """Write the row's ones and design columns times the factor, [S+1, n]."""
    n = len(codes)
    _copy(out[0], frame.factor_sum)
    for s in range(design.shape[1]):
        _fill(out[s + 1], 0.0)
    for j in range(n):
        line = frame.factor[j, j:]
        for s in range(design.shape[1]):
            add_scaled(out[s + 1, j:], design[codes[j], s], line)


@njit(**INNER)
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


@njit(**INNER)
def _errors(w: Floats, codes: Codes, frame: Frame, unknowns: Floats, how: How, out: Floats) -> float:
    """Write (w - levels) @ factor of one row; return its sum of squares."""
    difference = np.empty(len(w))
    for j in range(len(w)):
        difference[j] = w[j] - level_of(codes[j], unknowns, how)
    _through(difference, frame.factor, out)
    return dot(out, out)


@njit(**INNER)
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
        _copy(error[r], through[r])
        for i in range(size):
            add_scaled(error[r], -unknowns[i], designs[r, i])
        loss += dot(error[r], error[r])
    return loss


@njit(**INNER)
def copy_codes(into: Codes, source: Codes) -> None:
    """Copy codes [R, n]. A loop compiles in a fraction of the time that an assignment to a slice takes."""
    for r in range(into.shape[0]):
        for k in range(into.shape[1]):
            into[r, k] = source[r, k]


@njit(**INNER)
def _keep(unknowns: Floats, codes: Codes, error: Floats, now: Floats, now_codes: Codes, now_error: Floats) -> None:
    """Copy one state over another."""
    for i in range(len(unknowns)):
        unknowns[i] = now[i]
    copy_codes(codes, now_codes)
    for r in range(error.shape[0]):
        for k in range(error.shape[1]):
            error[r, k] = now_error[r, k]


@njit(**INNER)
def _same(a: Codes, b: Codes) -> bool:
    for r in range(a.shape[0]):
        for k in range(a.shape[1]):
            if a[r, k] != b[r, k]:
                return False
    return True


@njit(**INNER)
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


@njit(nogil=True, **INNER)
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


@njit(nogil=True, **INNER)
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
