"""The solver's compiled inner loops: what goes column by column or tile by tile and is no matrix product.

A tile is the weights that share a set of scales: R rows by the columns of a group. Tiles and rows are independent, so
every loop takes a range of them. Where columns are taken in turn they come first in the arrays, so that a step of a
loop is one instruction on several rows. All arithmetic is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from passes.shiftcode.compiled import compiled
from passes.shiftcode.levels import How, add_scaled, solve_rounded
from passes.shiftcode.rounding import Codes, Floats, Ints, first_not_below
from passes.shiftcode.value_fit import fit_values

# Rows taken at once: those of 128 columns are 64 KiB, which stay in a core's cache.
_ROWS = 64
# More levels than this are searched by halving, one row after another.
_MANY = 16


class Book(NamedTuple):
    """The values of all codes for each of N rows.

    levels: [codes, N], ascending; order: u8 [codes, N], the codes of these; middles: [codes-1, N], between them; plain:
    [codes, N], by code; prefix: u8 [n, N], the low bits that codes keep; frozen: how many.
    """

    levels: Floats
    order: Codes
    middles: Floats
    plain: Floats
    prefix: Codes
    frozen: int


@compiled
def fit_scales(
    start: int, stop: int, w: Floats, tile_rows: int, importance: Floats, limits: Ints, how: How, unknowns: Floats
) -> None:
    """Fit the scales and offsets of tiles to their targets w [N, n] alone, columns weighed by importance [n]."""
    n = w.shape[1]
    for t in range(start, stop):
        a, b = t * tile_rows, min((t + 1) * tile_rows, w.shape[0])
        pooled, weight = np.empty((b - a) * n), np.empty((b - a) * n)
        for r in range(a, b):
            for k in range(n):
                pooled[(r - a) * n + k], weight[(r - a) * n + k] = w[r, k], importance[k]
        fit_values(pooled, weight, limits[t], how, unknowns[t])


@compiled
def solve_scales(
    start: int, stop: int, normal: Floats, right: Floats, limits: Ints, how: How, unknowns: Floats
) -> None:
    """Solve the normal equations [T, S+1, S+1], [T, S+1] of tiles, rounded, see `solve_rounded`; ruins them."""
    for t in range(start, stop):
        solve_rounded(normal[t], right[t], unknowns[t], limits[t], how)


@compiled
def _nearest(x: Floats, book: Book, a: int, b: int, codes: Codes, levels: Floats) -> None:
    """Write the code nearest to each x [b - a], of rows a up to b, and its level; ties go to the lower level."""
    codes[:] = book.order[0, a:b]
    levels[:] = book.levels[0, a:b]
    for i in range(1, len(book.levels)):
        middle, level, code = book.middles[i - 1, a:b], book.levels[i, a:b], book.order[i, a:b]
        for r in range(len(x)):
            above = x[r] > middle[r]
            levels[r] = level[r] if above else levels[r]
            codes[r] = code[r] if above else codes[r]


@compiled
def _searched(x: Floats, book: Book, a: int, b: int, codes: Codes, levels: Floats) -> None:
    """Write the same as `_nearest`, by halving."""
    for r in range(b - a):
        place = first_not_below(book.middles[:, a + r], x[r])
        codes[r], levels[r] = book.order[place, a + r], book.levels[place, a + r]


@compiled
def _nearest_extension(x: Floats, prefix: Codes, book: Book, a: int, b: int, codes: Codes, levels: Floats) -> None:
    """Write the nearest of the codes whose low bits are the prefix, and its level."""
    for r in range(b - a):
        lowest = np.inf
        for code in range(prefix[r], len(book.plain), 1 << book.frozen):
            level = book.plain[code, a + r]
            if abs(x[r] - level) < lowest:
                codes[r], levels[r], lowest = code, level, abs(x[r] - level)


@compiled
def _choose(x: Floats, j: int, book: Book, a: int, b: int, codes: Codes, levels: Floats) -> None:
    """Write the best codes and their levels for x [b - a], values wanted in column j of rows a up to b."""
    if book.frozen > 0:
        _nearest_extension(x, book.prefix[j, a:b], book, a, b, codes, levels)
    elif len(book.levels) > _MANY:
        _searched(x, book, a, b, codes, levels)
    else:
        _nearest(x, book, a, b, codes, levels)


@compiled
def _walk_rows(a: int, b: int, rest: Floats, upper: Floats, book: Book, codes: Codes, error: Floats) -> None:
    level = np.empty(b - a)
    for j in range(len(rest)):
        x, e = rest[j, a:b], error[j, a:b]
        _choose(x, j, book, a, b, codes[j, a:b], level)
        inverse = 1.0 / upper[j, j]
        for r in range(len(x)):
            e[r] = (x[r] - level[r]) * inverse
        for k in range(j + 1, len(rest)):
            add_scaled(rest[k, a:b], -upper[j, k], e)


@compiled
def walk(start: int, stop: int, rest: Floats, upper: Floats, book: Book, codes: Codes, error: Floats) -> None:
    """Code columns in turn for some rows, pushing each error into the later ones (GPTQ, 2210.17323, Alg. 1).

    rest: [n, N] targets less what earlier columns pushed, used up; upper: [n, n]; codes, error: [n, N] receive codes
    and errors.
    """
    for a in range(start, stop, _ROWS):
        _walk_rows(a, min(a + _ROWS, stop), rest, upper, book, codes, error)


@compiled
def _descend_rows(a: int, b: int, slope: Floats, metric: Floats, book: Book, codes: Codes, values: Floats) -> None:
    x, level = np.empty(b - a), np.empty(b - a)
    for j in range(len(slope)):
        now, change, inverse = slope[j, a:b], values[j, a:b], 1.0 / metric[j, j]
        for r in range(len(x)):
            x[r] = change[r] - now[r] * inverse
        _choose(x, j, book, a, b, codes[j, a:b], level)
        moved = 0.0
        for r in range(len(x)):
            change[r] = level[r] - change[r]
            moved += abs(change[r])
        if moved > 0.0:
            for k in range(j + 1, len(slope)):
                add_scaled(slope[k, a:b], metric[j, k], change)


@compiled
def descend(start: int, stop: int, slope: Floats, metric: Floats, book: Book, codes: Codes, values: Floats) -> None:
    """Set each column's codes in turn, for some rows, to the minimisers of the rows' quadratic forms.

    slope: [n, N], half the forms' derivatives by the columns' values, used up; metric: [n, n]; values: [n, N] those of
    the codes, which are replaced by what they changed by.
    """
    for a in range(start, stop, _ROWS):
        _descend_rows(a, min(a + _ROWS, stop), slope, metric, book, codes, values)
