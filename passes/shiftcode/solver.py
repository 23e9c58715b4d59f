"""The layer-wise shift-add solver: GPTQ's column loop over all rows at once, with binary coding fitted inside the loop.

Rows are independent, so sites that share their input are solved faster concatenated, and all arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.shiftcode import ShiftCodes, dequantize, encode, group_count
from passes.quantize.hessian import PreparedHessian, prepare
from passes.shiftcode.bcq import (
    Codebook,
    Rounding,
    code_levels,
    code_planes,
    codebook,
    fit_bcq,
    nearest_place,
    pattern,
    row_window,
    solve_rounded,
)


@dataclass(frozen=True)
class ShiftSpec:
    """Options of the solver.

    bits: sign planes; group: inputs per scale set; terms: powers of two per scale; offset: store one offset a group;
    rounds, starts: of the binary-coding fit; damp: Hessian damping; polish: refits of a group's scales and codes inside
    the column loop; sweeps: passes over all groups after it; ordered: take groups and columns by falling Hessian
    diagonal; block: columns between lazy updates.
    """

    bits: int = 3
    group: int = 64
    terms: int = 2
    offset: bool = True
    rounds: int = 10
    starts: int = 4
    damp: float = 0.01
    polish: int = 2
    sweeps: int = 2
    ordered: bool = True
    block: int = 64

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= 8 and self.group >= 1 and 1 <= self.terms <= 3 and self.block >= 1):
            raise UsageError(
                "the solver needs 1 to 8 bits, a positive group and block and 1 to 3 terms",
                why=f"bits={self.bits} group={self.group} block={self.block} terms={self.terms}",
            )


@dataclass
class _State:
    """What the solver believes in: alpha [N, G, q], z [N, G], codes [N, K] in the processing order of the columns."""

    alpha: Tensor
    z: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Span:
    """One group in processing order: its index in storage and its columns [start, end)."""

    group: int
    start: int
    end: int


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
    columns, spans = _processing_order(hessian.diagonal(), spec)
    return Metric(columns, spans, prepare(hessian[columns][:, columns], spec.damp, tokens=tokens, site=site))


def solve(weight: Tensor, metric: Metric | None, spec: ShiftSpec, *, site: str = "") -> ShiftCodes:
    """Return the codes of a weight [N, K] that make tr(E H E^T) small, E = weight - decoded weight.

    metric: of the layer's inputs, or None for the identity (data-free: every group is fitted alone); site: for
    messages. GPTQ (Frantar et al. 2023, Alg. 1) with each group's scales fitted when the loop reaches it, on
    error-compensated weights (ShiftAddLLM section 4.2) weighted by 1/U_jj^2, the curvature a column has left once later
    ones compensate. Rows are independent: a slice of rows gets the codes it gets in the whole. Raises UsageError for a
    weight that is not a finite matrix or a metric of another size.
    """
    _check(weight, metric, site)
    w = weight.double()
    rounding = Rounding(spec.terms, row_window(w, spec.terms))
    if metric is None:
        return _solve_free(w, spec, rounding)
    w = w[:, metric.columns].masked_fill(metric.prepared.dead, 0.0)
    state = _column_loop(w, metric, spec, rounding)
    for _ in range(spec.sweeps):
        _sweep(w, metric, state, spec, rounding)
    back = torch.argsort(metric.columns)
    offset = state.z if spec.offset else None
    return encode(code_planes(state.codes[:, back], spec.bits), state.alpha, offset, spec.group, spec.terms)


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


def _check(weight: Tensor, metric: Metric | None, site: str) -> None:
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise UsageError("the weight must be a finite matrix", where=site, why=f"its shape is {list(weight.shape)}")
    if metric is not None and metric.columns.shape[0] != weight.shape[1]:
        raise UsageError(
            f"the metric of {weight.shape[1]} inputs is needed", where=site, why=f"it has {metric.columns.shape[0]}"
        )


def _solve_free(w: Tensor, spec: ShiftSpec, rounding: Rounding) -> ShiftCodes:
    """Fit every group alone with equal weights; a ragged tail is padded with columns of weight zero."""
    rows, inputs = w.shape
    groups = group_count(inputs, spec.group)
    width = min(spec.group, inputs)
    pad = groups * width - inputs
    flat = torch.nn.functional.pad(w, (0, pad)).reshape(rows * groups, width)
    mask = torch.nn.functional.pad(torch.ones_like(w), (0, pad)).reshape(rows * groups, width)
    each = rounding.take(torch.arange(rows, device=w.device).repeat_interleave(groups))
    fit = fit_bcq(flat, spec.bits, mask, offset=spec.offset, rounding=each, rounds=spec.rounds, starts=spec.starts)
    planes = code_planes(fit.codes.reshape(rows, -1)[:, :inputs], spec.bits)
    offset = fit.z.reshape(rows, groups) if spec.offset else None
    return encode(planes, fit.alpha.reshape(rows, groups, -1), offset, spec.group, spec.terms)


def _processing_order(diagonal: Tensor, spec: ShiftSpec) -> tuple[Tensor, tuple[Span, ...]]:
    """Return the processing order of the columns and the groups as spans of it, both by falling Hessian diagonal.

    Groups stay whole, so the order costs nothing in storage.
    """
    inputs = diagonal.shape[0]
    pieces = [torch.arange(s, min(s + spec.group, inputs)) for s in range(0, inputs, spec.group)]
    order = list(range(len(pieces)))
    diagonal = diagonal.cpu()
    if spec.ordered:
        means = torch.stack([diagonal[p].mean() for p in pieces])
        order = torch.argsort(means, descending=True, stable=True).tolist()
        pieces = [p[torch.argsort(diagonal[p], descending=True, stable=True)] for p in pieces]
    spans, start = [], 0
    for g in order:
        spans.append(Span(g, start, start + len(pieces[g])))
        start += len(pieces[g])
    return torch.cat([pieces[g] for g in order]), tuple(spans)


def _column_loop(w: Tensor, metric: Metric, spec: ShiftSpec, rounding: Rounding) -> _State:
    """Run GPTQ's loop with the fit inside; w [N, K] and upper [K, K] are in processing order."""
    upper, rows, groups = metric.prepared.upper, w.shape[0], len(metric.spans)
    state = _State(
        w.new_zeros(rows, groups, spec.bits),
        w.new_zeros(rows, groups),
        torch.zeros(w.shape, dtype=torch.int64, device=w.device),
    )
    w = w.clone()
    for span in metric.spans:
        s, e = span.start, span.end
        local = upper[s:e, s:e]
        fit = fit_bcq(
            w[:, s:e],
            spec.bits,
            1.0 / local.diagonal().square(),
            offset=spec.offset,
            rounding=rounding,
            rounds=spec.rounds,
            starts=spec.starts,
        )
        codes, scaled = _code_columns(w[:, s:e], local, codebook(fit.alpha, fit.z), spec.block)
        alpha, z = fit.alpha, fit.z
        if spec.polish:
            factor = torch.linalg.solve_triangular(local, torch.eye(e - s, dtype=w.dtype, device=w.device), upper=True)
            h = factor @ factor.T
            alpha, z, codes = polish_group(w[:, s:e], h, alpha, z, codes, rounding, spec.offset, spec.polish)
            error = w[:, s:e] - code_levels(alpha, z).gather(1, codes)
            scaled = error @ factor
        state.alpha[:, span.group], state.z[:, span.group], state.codes[:, s:e] = alpha, z, codes
        w[:, e:] -= scaled @ upper[s:e, e:]
    return state


def _code_columns(w: Tensor, upper: Tensor, book: Codebook, block: int) -> tuple[Tensor, Tensor]:
    """Code the columns of one group in turn, pushing its error into the later ones; returns codes, errors / U_jj."""
    # Transposed, so that the column at hand is contiguous.
    w = w.T.contiguous()
    middles, levels = book.middles.T.contiguous(), book.levels.T.contiguous()
    places = torch.empty(w.shape, dtype=torch.int64, device=w.device)
    scaled = torch.empty_like(w)
    pivots = upper.diagonal().tolist()
    for start in range(0, w.shape[0], block):
        end = min(start + block, w.shape[0])
        for j in range(start, end):
            nearest_place(middles, w[j], out=places[j])
            torch.sub(w[j], levels.gather(0, places[j, None])[0], out=scaled[j]).div_(pivots[j])
            w[j + 1 : end].addcmul_(upper[j, j + 1 : end, None], scaled[j, None], value=-1.0)
        w[end:] -= upper[start:end, end:].T @ scaled[start:end]
    return book.order.gather(1, places.T), scaled.T


def quadratic(error: Tensor, h: Tensor) -> Tensor:
    """Return e h e^T of every row, [N]."""
    return ((error @ h) * error).sum(1)


def polish_group(
    w: Tensor, h: Tensor, alpha: Tensor, z: Tensor, codes: Tensor, rounding: Rounding, offset: bool, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate a joint scale refit and one coordinate sweep over the codes under the group's full Hessian; keep best.

    w: [N, n] targets; h: [n, n], for a group inside the loop the Schur complement in which later columns are free;
    alpha [N, q], z [N], codes [N, n]. The refit is the least-squares solution in the Hessian's metric with codes fixed,
    the sweep minimises one code at a time.
    """
    best = [alpha.clone(), z.clone(), codes.clone()]
    lowest = quadratic(w - code_levels(alpha, z).gather(1, codes), h)
    for _ in range(rounds):
        z, alpha = solve_rounded(*_full_normal(w, h, codes, alpha.shape[1]), rounding, offset)
        codes, alpha = _positive(codes, alpha)
        codes = _descend(w, h, alpha, z, codes)
        value = quadratic(w - code_levels(alpha, z).gather(1, codes), h)
        better = value < lowest
        lowest = torch.where(better, value, lowest)
        for kept, new in zip(best, (alpha, z, codes), strict=True):
            kept[better] = new[better]
        if not bool(better.any()):
            break
    return best[0], best[1], best[2]


def _positive(codes: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Turn negative scales positive by flipping their plane in the row's codes; the weights stay the same."""
    flips = ((alpha < 0).long() << torch.arange(alpha.shape[1], device=alpha.device)).sum(1, keepdim=True)
    return codes ^ flips, alpha.abs()


def _full_normal(w: Tensor, h: Tensor, codes: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Return Z h Z^T [N, q+1, q+1] and Z h w [N, q+1] of every row, Z the row's ones and signs [q+1, n]."""
    design = pattern(planes, str(w.device))[codes].transpose(1, 2)
    weighted = design @ h
    return weighted @ design.transpose(1, 2), (weighted @ w[:, :, None])[:, :, 0]


def _descend(w: Tensor, h: Tensor, alpha: Tensor, z: Tensor, codes: Tensor) -> Tensor:
    """Set each column's code in turn to the minimiser of the row's quadratic, the others fixed; returns the codes."""
    # Columns are visited one by one, so everything is kept transposed to make them contiguous.
    book = codebook(alpha, z)
    middles, levels = book.middles.T.contiguous(), book.levels.T.contiguous()
    q = code_levels(alpha, z).gather(1, codes).T.contiguous()
    gradient = h @ (q - w.T)
    places = torch.empty_like(q, dtype=torch.int64)
    # Views are cut beforehand: at a thousand rows an indexing costs as much as the arithmetic.
    tails = [(gradient[j + 1 :], h[j + 1 :, j, None]) for j in range(q.shape[0])]
    curvature = h.diagonal().tolist()
    for level, slope, place, curve, (later, column) in zip(q, gradient, places, curvature, tails, strict=True):
        nearest_place(middles, torch.sub(level, slope, alpha=1 / curve), out=place)
        step = levels.gather(0, place[None]).sub_(level)
        later.addcmul_(column, step)
    return book.order.gather(1, places.T)


def _sweep(w: Tensor, metric: Metric, state: _State, spec: ShiftSpec, rounding: Rounding) -> None:
    """Polish every group once with all others fixed, in place; each row's tr(E H E^T) never rises."""
    h, q = metric.prepared.matrix, w.new_zeros(w.shape)
    for span in metric.spans:
        levels = code_levels(state.alpha[:, span.group], state.z[:, span.group])
        q[:, span.start : span.end] = levels.gather(1, state.codes[:, span.start : span.end])
    gradient = (q - w) @ h
    for span in metric.spans:
        s, e, g = span.start, span.end, span.group
        local = h[s:e, s:e]
        factor = torch.linalg.cholesky(local)
        target = q[:, s:e] - torch.cholesky_solve(gradient[:, s:e].T.contiguous(), factor).T
        alpha, z, codes = polish_group(
            target, local, state.alpha[:, g], state.z[:, g], state.codes[:, s:e], rounding, spec.offset, 1
        )
        fresh = code_levels(alpha, z).gather(1, codes)
        gradient[:, e:] += (fresh - q[:, s:e]) @ h[s:e, e:]
        state.alpha[:, g], state.z[:, g], state.codes[:, s:e] = alpha, z, codes
