"""Nested precision: planes shared by several precisions, each with its own scales (AnyBCQ, 2510.10467), Hessian-aware.

The lowest precision is solved as always. Each further one walks the column loop again with the planes so far frozen, so
that a weight has two candidates per new plane, and refits all its scales: the base's planes serve every precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.nested import NestedCodes, nest
from passes.quantize.order import Span
from passes.shiftcode.solver import (
    Given,
    Metric,
    State,
    check,
    column_loop,
    encoded,
    improved,
    in_storage_order,
    joined,
    metric_of,
    rows_at_once,
    seen_through,
    tile_losses,
    values_of,
)
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.tiles import Tiles, levels_of, tiles_of


def solve_nested(
    weight: Tensor, metric: Metric | None, spec: ShiftSpec, precisions: Sequence[int], *, site: str = ""
) -> NestedCodes:
    """Return codes of a weight [N, K] that can be run at each of several precisions; spec.bits is not read.

    metric: None takes the identity; precisions: planes, ascending. Raises UsageError for precisions that do not ascend,
    and what `solver.solve` raises.
    """
    check(weight, metric, site)
    if not precisions or any(b <= a for a, b in pairwise(precisions)):
        raise UsageError("nested precisions must ascend", where=site, why=f"they are {list(precisions)}")
    if spec.code != "planes":
        raise UsageError(f"codes of {spec.code} cannot be nested", where=site, fix="use code=planes")
    spec = spec.clipped(*weight.shape)
    if metric is None:
        metric = metric_of(torch.eye(weight.shape[1], dtype=torch.float64), spec)
    pieces = weight.split(rows_at_once(weight, spec))
    solved = [_solve_rows(part.double(), metric, spec, precisions) for part in pieces]
    levels = [joined([part[i] for part in solved]) for i in range(len(precisions))]
    return nest([encoded(s, replace(spec, bits=p)) for s, p in zip(levels, precisions, strict=True)])


def _solve_rows(w: Tensor, metric: Metric, spec: ShiftSpec, precisions: Sequence[int]) -> list[State]:
    w = seen_through(w, metric)
    states: list[State] = []
    for bits in precisions:
        frozen = precisions[len(states) - 1] if states else 0
        tiles = tiles_of(w, replace(spec, bits=bits), frozen)
        given = _expansion(states[-1], tiles_of(w, replace(spec, bits=frozen)), bits) if states else None
        state = column_loop(w, metric, tiles, given)
        if states:
            state = _better(w, metric, state, _widened(states[-1], bits), tiles)
        state = improved(w, metric, state, tiles)
        states.append(_canonical(state, metric, frozen, spec.row_group))
    return [in_storage_order(s, metric) for s in states]


def _widened(lower: State, bits: int) -> State:
    """Return the same weights with new planes of zero scale."""
    tiles, groups, size = lower.unknowns.shape
    fresh = lower.unknowns.new_zeros(tiles, groups, bits + 1 - size)
    return State(torch.cat([lower.unknowns, fresh], 2), lower.codes)


def _better(w: Tensor, metric: Metric, one: State, other: State, tiles: Tiles) -> State:
    """Return each tile as it is in the better of two states: keep-best by groups does not protect a whole row."""
    losses = [tile_losses(w - values_of(s, metric, tiles), metric, tiles) for s in (one, other)]
    worse = losses[0] > losses[1]
    rows = tiles.rows(worse, w.shape[0])
    unknowns = torch.where(worse[:, None, None], other.unknowns, one.unknowns)
    return State(unknowns, torch.where(rows[:, None], other.codes, one.codes))


def _expansion(lower: State, tiles: Tiles, bits: int) -> Given:
    """Return what makes the start of a group's fit at `bits` planes: the lower precision, new planes of zero scale.

    A new plane has the sign of what is left, so that its scale is found by the first refit, and a result that is no
    better than the lower precision's is never taken.
    """

    def start(span: Span, target: Tensor) -> tuple[Tensor, Tensor]:
        unknowns, codes = lower.unknowns[:, span.group], lower.codes[:, span.start : span.end].clone()
        residual = target - levels_of(unknowns, codes, tiles)
        for plane in range(tiles.spec.bits, bits):
            codes |= (residual >= 0).to(torch.uint8) << plane
            step = residual.abs().mean(1, keepdim=True)
            residual = residual - torch.where(residual >= 0, step, -step)
        fresh = unknowns.new_zeros(unknowns.shape[0], bits - tiles.spec.bits)
        return torch.cat([unknowns, fresh], 1), codes

    return start


def _canonical(state: State, metric: Metric, frozen: int, row_group: int) -> State:
    """Return the same weights with positive scales, the planes after the frozen ones sorted, largest scale first."""
    unknowns, codes = state.unknowns.clone(), state.codes.clone()
    bits, rows = unknowns.shape[2] - 1, codes.shape[0]
    for span in metric.spans:
        alpha = unknowns[:, span.group, 1 + frozen :]
        order = torch.argsort(alpha.abs(), dim=1, descending=True, stable=True)
        turned = (alpha < 0).gather(1, order)
        unknowns[:, span.group, 1 + frozen :] = alpha.abs().gather(1, order)
        part = codes[:, span.start : span.end]
        fresh = part & ((1 << frozen) - 1)
        for plane in range(bits - frozen):
            source, flip = (x[:, plane].repeat_interleave(row_group)[:rows, None] for x in (order, turned))
            bit = (part.long() >> (source + frozen) & 1) ^ flip
            fresh |= bit.to(torch.uint8) << (frozen + plane)
        codes[:, span.start : span.end] = fresh
    return State(unknowns, codes)
