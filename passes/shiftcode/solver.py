"""The layer-wise shift-add solver: GPTQ's column loop over all rows at once, with binary coding fitted inside the loop.

Columns are taken group by group; what happens inside a group is `passes.shiftcode.group_fit`.
All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.shiftcode import ShiftCodes, dequantize, encode, group_count
from passes.quantize.hessian import PreparedHessian, inverse_factor, prepare
from passes.quantize.order import Span, group_order, lazy_blocks
from passes.shiftcode.group_fit import fit_tiles
from passes.shiftcode.joint import refit_scales
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.tiles import Tiles, levels_of, tiles_of

# Rows worked on at once: 2**24 weights are 128 MiB in float64.
_WEIGHTS_AT_ONCE = 1 << 24
# Rows of a product that replaces its left factor: large enough for the product's speed, small beside a layer.
_ROWS_IN_PLACE = 512


@dataclass
class State:
    """What the solver believes in: unknowns float64 [T, G, S+1], offset first; codes u8 [N, K], processing order."""

    unknowns: Tensor
    codes: Tensor


Given = Callable[[Span, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Metric:
    """What a layer's inputs make of errors: the damped Hessian in processing order.

    columns: int64 [K], the inputs in processing order; spans: the groups along it.
    """

    columns: Tensor
    spans: tuple[Span, ...]
    prepared: PreparedHessian


def metric_of(hessian: Tensor, spec: ShiftSpec, *, tokens: int = 0, site: str = "") -> Metric:
    """Order, damp and factor a Gram matrix [K, K] of any positive scale; tokens, site: for messages."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise UsageError("the Hessian must be square", where=site, why=f"its shape is {list(hessian.shape)}")
    columns, spans = group_order(hessian.diagonal(), spec.group, spec.ordered)
    return Metric(columns, spans, prepare(hessian[columns][:, columns], spec.damp, tokens=tokens, site=site))


def solve(weight: Tensor, metric: Metric | None, spec: ShiftSpec, *, site: str = "") -> ShiftCodes:
    """Return the codes of a weight [N, K] that make tr(E H E^T) small, E = weight - decoded weight.

    metric: of the layer's inputs, or None for the identity (data-free: every tile is fitted alone); site: for messages.
    GPTQ (Frantar et al. 2023, Alg. 1) with each group's scales fitted when the loop reaches it, on error-compensated
    weights (ShiftAddLLM section 4.2). Tile rows are independent: a slice of them gets the codes it gets in the whole.
    Raises UsageError for a weight that is not a finite matrix or a metric of another size.
    """
    check(weight, metric, site)
    spec = spec.clipped(*weight.shape)
    parts = [_solve_rows(part.double(), metric, spec) for part in weight.split(rows_at_once(weight, spec))]
    return encoded(joined(parts), spec)


def rows_at_once(weight: Tensor, spec: ShiftSpec) -> int:
    """Return how many rows of a weight are solved at once, whole tiles."""
    return max(1, _WEIGHTS_AT_ONCE // weight.shape[1] // spec.row_group) * spec.row_group


def joined(parts: Sequence[State]) -> State:
    """Return the states of consecutive rows as one."""
    return State(torch.cat([p.unknowns for p in parts]), torch.cat([p.codes for p in parts]))


def encoded(state: State, spec: ShiftSpec) -> ShiftCodes:
    """Return the stored form of a state whose codes are in storage order."""
    offset = state.unknowns[..., 0] if spec.offset else None
    digits, scales = spec.design().digits(state.codes), state.unknowns[..., 1:]
    return encode(digits, scales, offset, spec.group, spec.terms, row_group=spec.row_group, code=spec.code)


def relative_loss(weight: Tensor, coded: Tensor, hessian: Tensor | None) -> float:
    """Return tr(E H E^T) / tr(W H W^T) with E = weight - coded, H the identity when None; 0 for a zero weight."""
    w, error = weight.double(), weight.double() - coded.double()
    if hessian is None:
        top, bottom = error.square().sum(), w.square().sum()
    else:
        h = hessian.double()
        top, bottom = ((error @ h) * error).sum(), ((w @ h) * w).sum()
    return float(top / bottom) if float(bottom) > 0 else 0.0


def loss(weight: Tensor, codes: ShiftCodes, hessian: Tensor | None) -> float:
    """Return the relative loss of stored codes, see `relative_loss`."""
    return relative_loss(weight, dequantize(codes, torch.float64), hessian)


def check(weight: Tensor, metric: Metric | None, site: str) -> None:
    """Raise UsageError for a weight that is not a finite matrix, or a metric that is not for it."""
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise UsageError("the weight must be a finite matrix", where=site, why=f"its shape is {list(weight.shape)}")
    if metric is not None and metric.columns.shape[0] != weight.shape[1]:
        raise UsageError(
            f"the metric of {weight.shape[1]} inputs is needed", where=site, why=f"it has {metric.columns.shape[0]}"
        )


def _solve_rows(w: Tensor, metric: Metric | None, spec: ShiftSpec) -> State:
    """Solve rows [N, K] that make whole tiles."""
    if metric is None:
        return _solve_free(w, tiles_of(w, spec))
    w = seen_through(w, metric)
    tiles = tiles_of(w, spec)
    return in_storage_order(improved(w, metric, column_loop(w, metric, tiles), tiles), metric)


def seen_through(w: Tensor, metric: Metric) -> Tensor:
    """Return a weight [N, K] with its inputs in processing order, and zeros where an input was always zero."""
    return w[:, metric.columns].masked_fill(metric.prepared.dead, 0.0)


def in_storage_order(state: State, metric: Metric) -> State:
    """Return a state with its codes in the order of the inputs."""
    return State(state.unknowns, state.codes[:, torch.argsort(metric.columns)])


def improved(w: Tensor, metric: Metric, state: State, tiles: Tiles) -> State:
    """Return a state after the joint refit and the sweeps that the options ask for; no tile's tr(E H E^T) rises."""
    unknowns, codes = state.unknowns.clone(), state.codes.clone()
    if tiles.spec.refit:
        groups = torch.cat([torch.full((span.end - span.start,), span.group) for span in metric.spans])
        unknowns = refit_scales(w, metric.prepared.matrix, groups, unknowns, codes, tiles)
    state = State(unknowns, codes)
    for _ in range(tiles.spec.sweeps):
        _sweep(w, metric, state, tiles)
    return state


def empty_state(w: Tensor, tiles: Tiles) -> State:
    """Return zero scales and codes for a weight [N, K]."""
    rows, inputs = w.shape
    groups = group_count(inputs, tiles.spec.group)
    unknowns = torch.zeros(tiles.limits.shape[0], groups, tiles.scales + 1, dtype=torch.float64)
    return State(unknowns, torch.zeros(rows, inputs, dtype=torch.uint8))


def _solve_free(w: Tensor, tiles: Tiles) -> State:
    """Fit every tile alone with equal weights."""
    state, group = empty_state(w, tiles), tiles.spec.group
    tiles = replace(tiles, spec=replace(tiles.spec, iterations=0, polish=0))
    for g, part in enumerate(w.split(group, 1)):
        eye = torch.eye(part.shape[1], dtype=w.dtype)
        fit = fit_tiles(part, eye, eye, tiles)
        state.unknowns[:, g], state.codes[:, g * group : g * group + part.shape[1]] = fit.unknowns, fit.codes
    return state


def column_loop(w: Tensor, metric: Metric, tiles: Tiles, given: Given | None = None) -> State:
    """Run GPTQ's loop with the fit inside; w [N, K] and the factors are in processing order.

    given: makes, from a group's index and its compensated targets, the unknowns and codes its fit starts from.
    """
    upper, state = metric.prepared.upper, empty_state(w, tiles)
    w = w.clone()
    for block in lazy_blocks(metric.spans):
        start, end = block[0].start, block[-1].end
        errors = torch.empty(w.shape[0], end - start, dtype=w.dtype)
        for span in block:
            s, e = span.start, span.end
            local = upper[s:e, s:e].contiguous()
            factor = torch.linalg.solve_triangular(local, torch.eye(e - s, dtype=w.dtype), upper=True)
            start_from = None if given is None else given(span, w[:, s:e])
            fit = fit_tiles(w[:, s:e], local, factor, tiles, start_from)
            state.unknowns[:, span.group], state.codes[:, s:e] = fit.unknowns, fit.codes
            errors[:, s - start : e - start] = fit.error
            w[:, e:end] -= fit.error @ upper[s:e, e:end]
        w[:, end:] -= errors @ upper[start:end, end:]
    return state


def values_of(state: State, metric: Metric, tiles: Tiles) -> Tensor:
    """Return the weights [N, K] that a state stands for, in processing order."""
    q = torch.empty(state.codes.shape, dtype=torch.float64)
    for span in metric.spans:
        codes = state.codes[:, span.start : span.end]
        q[:, span.start : span.end] = levels_of(state.unknowns[:, span.group], codes, tiles)
    return q


def tile_losses(error: Tensor, metric: Metric, tiles: Tiles) -> Tensor:
    """Return e H e^T summed over the rows of each tile, [T], for errors [N, K] in processing order."""
    return tiles.sums(((error @ metric.prepared.matrix) * error).sum(1))


def _sweep(w: Tensor, metric: Metric, state: State, tiles: Tiles) -> None:
    """Improve every group once with all others fixed, in place; tr(E H E^T) of a tile never rises."""
    h, q = metric.prepared.matrix, values_of(state, metric, tiles)
    gradient = q - w
    for rows in gradient.split(_ROWS_IN_PLACE):
        rows.copy_(rows @ h)
    one = replace(tiles, spec=replace(tiles.spec, iterations=0, polish=1))
    for span in metric.spans:
        s, e, g = span.start, span.end, span.group
        local = h[s:e, s:e].contiguous()
        upper = inverse_factor(local)
        assert upper is not None, "a diagonal block of a positive definite matrix"
        factor = torch.linalg.solve_triangular(upper, torch.eye(e - s, dtype=w.dtype), upper=True)
        target = q[:, s:e] - torch.cholesky_solve(gradient[:, s:e].T.contiguous(), torch.linalg.cholesky(local)).T
        fit = fit_tiles(target, upper, factor, one, (state.unknowns[:, g], state.codes[:, s:e]))
        fresh = levels_of(fit.unknowns, fit.codes, tiles)
        gradient[:, e:].addmm_(fresh - q[:, s:e], h[s:e, e:])
        state.unknowns[:, g], state.codes[:, s:e] = fit.unknowns, fit.codes
