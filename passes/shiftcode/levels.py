"""Compiled parts that every fit of scales shares: vectors, rounded solutions, and the levels that codes stand for.

The unknowns of a tile are its offset and then its scales; a code selects the level z + design[code] @ alpha.
"""

from __future__ import annotations

from typing import NamedTuple

from passes.shiftcode.compiled import compiled
from passes.shiftcode.rounding import Floats, Ints, first_not_below, round_value

_RIDGE = 1e-10


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
    feedback: bool
    sortable: bool
    frozen: int


@compiled
def add_scaled(into: Floats, scale: float, line: Floats) -> None:
    """Add scale * line to a vector. Loops from 0 to a length are the ones that get vectorised."""
    for k in range(len(line)):
        into[k] += scale * line[k]


@compiled
def dot(a: Floats, b: Floats) -> float:
    """Return the inner product of two vectors."""
    total = 0.0
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@compiled
def fill(into: Floats, value: float) -> None:
    for k in range(len(into)):
        into[k] = value


@compiled
def copy(into: Floats, source: Floats) -> bool:
    """Copy a vector; return whether anything changed."""
    changed = False
    for k in range(len(into)):
        changed |= into[k] != source[k]
        into[k] = source[k]
    return changed


@compiled
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
        unknowns[t] = rounded(x, t % period, limits, how) if how.feedback else x
    if not how.feedback:
        for t in range(size):
            unknowns[t] = rounded(unknowns[t], t % period, limits, how)


@compiled
def rounded(x: float, unknown: int, limits: Ints, how: How) -> float:
    at = 0 if unknown == 0 else 2
    return round_value(x, how.values, how.middles, how.leads, limits[at], limits[at + 1])


@compiled
def level_of(code: int, unknowns: Floats, how: How) -> float:
    """Return the value of a code."""
    value = unknowns[0]
    for s in range(how.design.shape[1]):
        value += how.design[code, s] * unknowns[s + 1]
    return value


@compiled
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


@compiled
def nearest(middles: Floats, x: float) -> int:
    """Return the place of the sorted level nearest to x; ties go to the lower one."""
    if len(middles) > 15:
        return first_not_below(middles, x)
    place = 0
    for m in middles:
        place += x > m
    return place
