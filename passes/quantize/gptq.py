"""GPTQ: rounding one input after another, each error made up for by the inputs that are still to come.

Frantar et al. 2023 (2210.17323), Algorithm 1; all arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ir.errors import InvariantError, UsageError
from passes.quantize.hessian import PreparedHessian, prepare
from passes.quantize.order import Span, group_order
from passes.quantize.sweep import Keep, Laid, Lay, sweep
from passes.quantize.uniform import UniformCodes, ranges, rtn, searched, within
from passes.sparsify.pattern import Pattern, nm_mask
from passes.sparsify.sparsegpt import choosing

Order = Literal["groups", "inputs", "stored"]


@dataclass(frozen=True)
class GptqSpec:
    """How a weight is rounded.

    order: `groups` by falling curvature, inputs within a group likewise, and a group's levels laid when it is reached;
    `inputs` by falling curvature across groups, levels laid beforehand (act-order with static groups); `stored`.
    search: cut a group's range where that leaves less error, each input weighed by its curvature.
    """

    bits: int
    group: int
    symmetric: bool
    terms: int
    order: Order
    search: bool
    damp: float

    def levels(
        self, weight: Tensor, group: int, curvature: Tensor | None, shares: Tensor | None = None
    ) -> UniformCodes:
        """Return a weight rounded by itself, for the levels of its groups; curvature: [K], or None for all alike."""
        if shares is not None:
            low, high = ranges(weight.float(), group)
            return within(weight, shares[1] * low, shares[0] * high, self.bits, group, self.symmetric, self.terms)
        if self.search:
            return searched(weight, self.bits, group, self.symmetric, self.terms, curvature)
        return rtn(weight, self.bits, group, self.symmetric, self.terms)


@dataclass
class _Codes:
    """Codes and levels of a weight on its way; codes: uint8 [K, N], inputs in processing order.

    met: float64 [K, N], what each weight had become when it was rounded, or None where nobody asks.
    """

    codes: Tensor
    levels: list[UniformCodes]
    met: Tensor | None = None

    def laid(self, levels: UniformCodes, columns: Tensor, start: int) -> Laid:
        """Return what rounds inputs from `start` on to levels; columns: which of the levels' inputs these are."""
        groups, top = columns // levels.group, 2**levels.bits - 1
        steps, zeros = levels.scales.double().T[groups], levels.zeros.double().T[groups]

        def become(j: int, column: Tensor) -> Tensor:
            codes = (torch.round(column / steps[j]) + zeros[j]).clamp_(0, top)
            self.codes[start + j] = codes.to(torch.uint8)
            if self.met is not None:
                self.met[start + j] = column
            return (codes - zeros[j]) * steps[j]

        return become


def gptq(
    weight: Tensor,
    hessian: Tensor | None,
    spec: GptqSpec,
    *,
    shares: Tensor | None = None,
    met: Tensor | None = None,
    tokens: int = 0,
    site: str = "",
) -> UniformCodes:
    """Return codes of a weight [N, K] that make tr(E H E^T) small, E = weight - decoded weight.

    hessian: Gram matrix [K, K] of the inputs, of any positive scale, or None for rounding without data; an input that
    was always zero is rounded as a weight of zero. shares: [2, N, G], of the greatest and the least weight of each
    group, within which its levels lie, in place of a search. met: float64 [N, K], filled with what each weight had
    become when it was rounded: its nearest code is the one returned. tokens, site: for messages. Rows are independent.
    Raises UsageError for a weight that is not a finite matrix or a Hessian of another size, UnsupportedError for one
    that cannot be factored.
    """
    _check(weight, hessian, site)
    if hessian is None:
        if met is not None:
            met.copy_(weight)
        return spec.levels(weight, min(spec.group, weight.shape[1]), None, shares)
    return _swept(weight, hessian, spec, shares, None, tokens, site, met)[0]


def sparse_gptq(
    weight: Tensor,
    hessian: Tensor | None,
    spec: GptqSpec,
    kept: Tensor | Pattern,
    *,
    tokens: int = 0,
    site: str = "",
) -> tuple[UniformCodes, Tensor]:
    """Return codes of a weight of which a row keeps some inputs, and which these are, bool [N, K].

    kept: the mask, or a pattern under which it is chosen in the same loop (SparseGPT, 2301.00774, section 3.5), group
    by group as each is reached. What is not kept has the code of zero. The rest as for `gptq`; the specification must
    be symmetric.
    """
    _check(weight, hessian, site)
    if not spec.symmetric:
        raise InvariantError("codes of a sparse weight lie around zero", where=site, fix="ask for symmetric ones")
    if hessian is None:
        mask = nm_mask(weight.abs(), kept) if isinstance(kept, Pattern) else kept
        return spec.levels(torch.where(mask, weight, 0.0), min(spec.group, weight.shape[1]), None), mask
    return _swept(weight, hessian, spec, None, kept, tokens, site)


def _check(weight: Tensor, hessian: Tensor | None, site: str) -> None:
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise UsageError("the weight must be a finite matrix", where=site, why=f"its shape is {list(weight.shape)}")
    inputs = weight.shape[1]
    if hessian is not None and hessian.shape != (inputs, inputs):
        raise UsageError(f"a Hessian of {inputs} inputs is needed", where=site, why=f"it is {list(hessian.shape)}")


def _swept(
    weight: Tensor,
    hessian: Tensor,
    spec: GptqSpec,
    shares: Tensor | None,
    kept: Tensor | Pattern | None,
    tokens: int,
    site: str,
    met: Tensor | None = None,
) -> tuple[UniformCodes, Tensor]:
    group = min(spec.group, weight.shape[1])
    columns, spans = _order(hessian.diagonal(), group, spec.order, kept.m if isinstance(kept, Pattern) else 1)
    prepared = prepare(hessian[columns][:, columns], spec.damp, tokens=tokens, site=site)
    rest = weight.double()[:, columns].masked_fill(prepared.dead, 0.0).T.contiguous()
    found = _Codes(torch.empty(rest.shape, dtype=torch.uint8), [], None if met is None else torch.empty_like(rest))
    seen = torch.where(kept, weight, 0.0) if isinstance(kept, Tensor) else weight
    lay = _laying(found, seen, columns, spans, prepared, spec, shares)
    mask = sweep(rest, prepared, spans, lay, _keeping(kept, columns))
    found.codes.masked_fill_(~mask, 2 ** (spec.bits - 1))
    stored, stored_mask = torch.empty_like(found.codes.T), torch.empty_like(mask.T)
    stored[:, columns], stored_mask[:, columns] = found.codes.T, mask.T
    if met is not None and found.met is not None:
        met[:, columns] = found.met.T
    stored, levels = stored.contiguous(), found.levels
    if spec.order != "inputs":
        levels = [one for _, one in sorted(zip(spans, levels, strict=True), key=lambda pair: pair[0].group)]
    scales, zeros = (torch.cat([getattr(one, name) for one in levels], 1) for name in ("scales", "zeros"))
    return UniformCodes(stored, scales, zeros, spec.bits, group), stored_mask.contiguous()


def _order(diagonal: Tensor, group: int, order: Order, unit: int) -> tuple[Tensor, tuple[Span, ...]]:
    if order != "inputs":
        return group_order(diagonal, group, order == "groups", unit)
    if unit > 1:
        raise UsageError("a mask is chosen group by group", why="order=inputs mixes them", fix="use order=groups")
    columns = torch.argsort(diagonal, descending=True, stable=True).cpu()
    return columns, group_order(diagonal, group, False)[1]


def _keeping(kept: Tensor | Pattern | None, columns: Tensor) -> Keep | None:
    if kept is None or isinstance(kept, Pattern):
        return None if kept is None else choosing(kept)
    ordered = kept[:, columns].T
    return lambda span, part, diagonal: ordered[span.start : span.end]


def _laying(
    found: _Codes,
    weight: Tensor,
    columns: Tensor,
    spans: tuple[Span, ...],
    prepared: PreparedHessian,
    spec: GptqSpec,
    shares: Tensor | None,
) -> Lay:
    """Return what lays the levels of a group when it is reached, or of all groups at once before the first."""
    curvature = prepared.matrix.diagonal()
    if spec.order == "inputs":
        stored = torch.empty_like(curvature)
        stored[columns] = curvature
        levels = spec.levels(weight, spans[0].end, stored, shares)
        found.levels.append(levels)
        return lambda span, part: found.laid(levels, columns[span.start : span.end], span.start)

    def lay(span: Span, part: Tensor) -> Laid:
        s, e = span.start, span.end
        own = None if shares is None else shares[:, :, span.group, None]
        levels = spec.levels(part.T, e - s, curvature[s:e], own)
        found.levels.append(levels)
        return found.laid(levels, torch.arange(e - s), s)

    return lay
