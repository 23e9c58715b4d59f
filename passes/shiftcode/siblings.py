"""Fitting the linears that read one input: stacked where they can be, on data where there is some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ir.analysis import LinearSite
from ir.errors import UnsupportedError
from ir.ops.nested import NestedCodes, take_nested_rows
from ir.ops.nm import pack_mask
from ir.ops.shiftcode import ShiftCodes, take_rows
from ir.ops.sparse import SparseCodes
from passes.quantize.targets import Moments, corrected
from passes.shiftcode.masked import solve_masked
from passes.shiftcode.nested import solve_nested
from passes.shiftcode.solver import Metric, metric_of, relative_loss, solve
from passes.shiftcode.spec import ShiftSpec
from passes.sites import figures
from passes.solved import Solved
from passes.sparsify.masks import Mask

Codes = ShiftCodes | NestedCodes


@dataclass(frozen=True, eq=False)
class Fitting:
    """How sites are fitted: the solver's options by site, nested precisions, the share of the target's correction."""

    spec: Callable[[LinearSite], ShiftSpec]
    nested: tuple[int, ...] = ()
    share: float = 0.0


def fit_siblings(weight: Tensor, sites: Sequence[LinearSite], moments: Moments | None, how: Fitting) -> list[Solved]:
    """Fit sites that share their input; weight: their weights stacked along the rows, float64.

    Sites of equal options are solved stacked, unless their rows share scales, which must not cross from one into the
    next. A site whose Hessian cannot be factored, or that saw no token, is fitted to its weights alone.
    """
    starts = [sum(s.rows for s in sites[:i]) for i in range(len(sites))]
    rest, solved = list(range(len(sites))), []
    while rest:
        spec = how.spec(sites[rest[0]])
        batch = [i for i in rest if how.spec(sites[i]) == spec] if spec.row_group == 1 else rest[:1]
        rest = [i for i in rest if i not in batch]
        rows = torch.cat([weight[starts[i] : starts[i] + sites[i].rows] for i in batch])
        solved.extend(_fit(rows, [sites[i] for i in batch], moments, spec, how))
    return solved


def fit_masked(weight: Tensor, site: LinearSite, mask: Mask, moments: Moments | None, how: Fitting) -> Solved:
    """Fit a site of whose weight, float64 [N, K], a mask keeps some; it is to come close to all of the weight."""
    spec = how.spec(site)
    metric, fallback = (None, "") if moments is None else _metric(moments, spec, site.name)
    hessian = moments.gram.matrix if metric is not None and moments is not None else None
    target = weight
    if metric is not None and moments is not None:
        target = corrected(weight, moments, metric.prepared.damp, how.share)
    kept = solve_masked(target, mask.kept, metric, spec, mask.pattern, site=site.name)
    n, m = mask.pattern.n, mask.pattern.m
    codes = SparseCodes(kept, pack_mask(mask.kept, n, m), n, m, site.inputs)
    loss = relative_loss(target, codes.dequantize(torch.float64), hessian)
    return Solved(site, codes, figures(codes.stored_bits, site.rows, site.inputs, loss), fallback)


def _fit(
    weight: Tensor, sites: Sequence[LinearSite], moments: Moments | None, spec: ShiftSpec, how: Fitting
) -> list[Solved]:
    name = sites[0].name
    metric, fallback = (None, "") if moments is None else _metric(moments, spec, name)
    hessian = moments.gram.matrix if metric is not None and moments is not None else None
    target = weight
    if metric is not None and moments is not None:
        target = corrected(weight, moments, metric.prepared.damp, how.share)
    codes: Codes
    if how.nested:
        codes = solve_nested(target, metric, spec, how.nested, site=name)
    else:
        codes = solve(target, metric, spec, site=name)
    solved, row = [], 0
    for site in sites:
        part = _rows(codes, row, row + site.rows)
        decoded = _whole(part).dequantize(torch.float64)
        loss = relative_loss(target[row : row + site.rows], decoded, hessian)
        solved.append(Solved(site, part, figures(part.stored_bits, site.rows, site.inputs, loss), fallback))
        row += site.rows
    return solved


def _metric(moments: Moments, spec: ShiftSpec, site: str) -> tuple[Metric | None, str]:
    """Return the metric of a layer's inputs, or why there is none."""
    gram = moments.gram
    if not bool(gram.matrix.diagonal().any()):
        return None, f"its inputs were zero for all {gram.tokens} tokens, so it is fitted to its weights alone"
    try:
        return metric_of(gram.matrix, spec, tokens=gram.tokens, site=site), ""
    except UnsupportedError as error:
        return None, f"{error.what} ({error.why}), so it is fitted to its weights alone"


def _rows(codes: Codes, start: int, stop: int) -> Codes:
    if isinstance(codes, NestedCodes):
        return take_nested_rows(codes, start, stop)
    return take_rows(codes, start, stop)


def _whole(codes: Codes) -> ShiftCodes:
    return codes.at(codes.precisions[-1]) if isinstance(codes, NestedCodes) else codes


def quick(spec: ShiftSpec) -> ShiftSpec:
    """Return options that fit in a fraction of the time, for comparing widths."""
    return replace(spec, starts=1, rounds=5, iterations=0, polish=0, refit=False, sweeps=0)
