"""Sign planes of weights that a mask keeps: GPTQ's loop over all inputs, scales fitted to what rows keep of a group."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ir.ops.nm import gather_kept
from ir.ops.shiftcode import ShiftCodes, encode, group_count
from passes.quantize.order import Span
from passes.quantize.sweep import Laid, sweep
from passes.shiftcode.bcq import BcqFit, fit_bcq
from passes.shiftcode.rounding import Ints, limits_of, rounding_table
from passes.shiftcode.solver import Metric, check
from passes.shiftcode.spec import ShiftSpec
from passes.sparsify.pattern import Pattern


@dataclass
class _Found:
    """What a weight became so far: codes uint8 [K, N] in processing order, and each group's offset and scales."""

    codes: Tensor
    fits: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def solve_masked(
    weight: Tensor, mask: Tensor, metric: Metric | None, spec: ShiftSpec, pattern: Pattern, *, site: str = ""
) -> ShiftCodes:
    """Return codes of the weights of [N, K] that a mask keeps, with those that go and the rounding made up for.

    mask: bool [N, K], of the pattern, which must divide the groups; metric: of the layer's inputs, or None to fit every
    group alone; spec: scales belong to groups of one row. The codes have the kept inputs of each row in order, and as
    many a group as it keeps of `spec.group` inputs. Raises UsageError as `passes.shiftcode.solver.solve`.
    """
    check(weight, metric, site)
    spec = spec.clipped(*weight.shape)
    limits = limits_of(torch.where(mask, weight.double(), 0.0), 1)
    rows, inputs = weight.shape
    found = _Found(torch.zeros(inputs, rows, dtype=torch.uint8))
    if metric is None:
        _fit_alone(found, weight.double(), mask, spec, limits)
        columns = torch.arange(inputs)
    else:
        columns = metric.columns
        _swept(found, weight.double(), mask[:, columns].T, metric, spec, limits)
    stored = torch.empty(rows, inputs, dtype=torch.uint8)
    stored[:, columns] = found.codes.T
    groups = range(group_count(inputs, spec.group))
    offset, alpha = (torch.stack([found.fits[g][i] for g in groups], 1) for i in (0, 1))
    digits = spec.design().digits(gather_kept(stored, mask))
    kept = spec.group // pattern.m * pattern.n
    return encode(digits, alpha, offset if spec.offset else None, kept, spec.terms, code=spec.code)


def _fit(part: Tensor, weigh: Tensor | None, spec: ShiftSpec, limits: Ints) -> BcqFit:
    """Fit the kept weights of a group, [N, kept], each row with scales of its own."""
    rounding = rounding_table(spec.terms)
    how = {"code": spec.code, "offset": spec.offset, "limits": limits, "rounds": spec.rounds, "starts": spec.starts}
    return fit_bcq(part, spec.bits, weigh, rounding=rounding, **how)  # type: ignore[arg-type]


def _fit_alone(found: _Found, weight: Tensor, mask: Tensor, spec: ShiftSpec, limits: Ints) -> None:
    for g, (part, kept) in enumerate(zip(weight.split(spec.group, 1), mask.split(spec.group, 1), strict=True)):
        fit = _fit(gather_kept(part, kept), None, spec, limits)
        codes = torch.zeros(kept.shape, dtype=torch.uint8)
        codes[kept] = fit.codes.flatten()
        found.codes[g * spec.group : g * spec.group + part.shape[1]] = codes.T
        found.fits[g] = fit.z, fit.alpha


def _swept(found: _Found, weight: Tensor, kept: Tensor, metric: Metric, spec: ShiftSpec, limits: Ints) -> None:
    """Fit group by group and round input by input; kept: bool [K, N] in processing order."""
    prepared = metric.prepared
    curvature = prepared.upper.diagonal().square().reciprocal()
    rest = weight[:, metric.columns].masked_fill(prepared.dead, 0.0).T.contiguous()
    matrix = torch.from_numpy(spec.design().matrix)

    def lay(span: Span, part: Tensor) -> Laid:
        s, own = span.start, kept[span.start : span.end].T
        weigh = curvature[s : span.end].expand(own.shape) if spec.weighted else torch.ones(own.shape)
        fit = _fit(gather_kept(part.T, own), gather_kept(weigh, own), spec, limits)
        found.fits[span.group] = fit.z, fit.alpha
        levels = fit.z[:, None] + fit.alpha @ matrix.T

        def become(j: int, column: Tensor) -> Tensor:
            codes = (levels - column[:, None]).abs_().argmin(1, keepdim=True)
            found.codes[s + j] = codes[:, 0].to(torch.uint8)
            return levels.gather(1, codes)[:, 0]

        return become

    sweep(rest, prepared, metric.spans, lay, lambda span, part, diagonal: kept[span.start : span.end])
