"""GPTQ: rounding one input after another, each error made up for by the inputs that are still to come.

Frantar et al. 2023 (2210.17323), Algorithm 1; all arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ir.errors import UsageError
from passes.quantize.hessian import PreparedHessian, prepare
from passes.quantize.order import Span, group_order, lazy_blocks
from passes.quantize.uniform import UniformCodes, ranges, rtn, searched, within

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
class _Loop:
    """A weight on its way, inputs in processing order along the first dim: the rest to round, levels, codes.

    rest, steps, zeros: float64 [K, N]; codes: uint8 [K, N].
    """

    rest: Tensor
    steps: Tensor
    zeros: Tensor
    codes: Tensor

    def lay(self, start: int, levels: UniformCodes, columns: Tensor) -> None:
        """Take the levels of inputs from `start` on; columns: which of the levels' inputs these are."""
        groups = columns // levels.group
        self.steps[start : start + len(columns)] = levels.scales.double().T[groups]
        self.zeros[start : start + len(columns)] = levels.zeros.double().T[groups]


def gptq(
    weight: Tensor,
    hessian: Tensor | None,
    spec: GptqSpec,
    *,
    shares: Tensor | None = None,
    tokens: int = 0,
    site: str = "",
) -> UniformCodes:
    """Return codes of a weight [N, K] that make tr(E H E^T) small, E = weight - decoded weight.

    hessian: Gram matrix [K, K] of the inputs, of any positive scale, or None for rounding without data; an input that
    was always zero is rounded as a weight of zero. shares: [2, N, G], of the greatest and the least weight of each
    group, within which its levels lie, in place of a search. tokens, site: for messages. Rows are independent.
    Raises UsageError for a weight that is not a finite matrix or a Hessian of another size, UnsupportedError for one
    that cannot be factored.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise UsageError("the weight must be a finite matrix", where=site, why=f"its shape is {list(weight.shape)}")
    inputs = weight.shape[1]
    if hessian is None:
        return spec.levels(weight, min(spec.group, inputs), None, shares)
    if hessian.shape != (inputs, inputs):
        raise UsageError(f"a Hessian of {inputs} inputs is needed", where=site, why=f"it is {list(hessian.shape)}")
    group = min(spec.group, inputs)
    columns, spans = _order(hessian.diagonal(), group, spec.order)
    prepared = prepare(hessian[columns][:, columns], spec.damp, tokens=tokens, site=site)
    rest = weight.double()[:, columns].masked_fill(prepared.dead, 0.0).T.contiguous()
    loop = _Loop(rest, torch.empty_like(rest), torch.empty_like(rest), torch.empty(rest.shape, dtype=torch.uint8))
    levels = list(_round(loop, weight, columns, spans, prepared, spec, shares))
    stored = torch.empty_like(loop.codes.T)
    stored[:, columns] = loop.codes.T
    if spec.order == "inputs":
        return UniformCodes(stored, levels[0].scales, levels[0].zeros, spec.bits, group)
    by_group = sorted(zip(spans, levels, strict=True), key=lambda pair: pair[0].group)
    scales, zeros = (torch.cat([getattr(found, name) for _, found in by_group], 1) for name in ("scales", "zeros"))
    return UniformCodes(stored.contiguous(), scales, zeros, spec.bits, group)


def _order(diagonal: Tensor, group: int, order: Order) -> tuple[Tensor, tuple[Span, ...]]:
    if order != "inputs":
        return group_order(diagonal, group, order == "groups")
    columns = torch.argsort(diagonal, descending=True, stable=True).cpu()
    return columns, group_order(diagonal, group, False)[1]


def _round(
    loop: _Loop,
    weight: Tensor,
    columns: Tensor,
    spans: tuple[Span, ...],
    prepared: PreparedHessian,
    spec: GptqSpec,
    shares: Tensor | None,
) -> Iterator[UniformCodes]:
    """Round all inputs, and yield the levels as they are laid: once for all groups, or group by group."""
    upper, curvature = prepared.upper, prepared.matrix.diagonal()
    if spec.order == "inputs":
        stored = torch.empty_like(curvature)
        stored[columns] = curvature
        levels = spec.levels(weight, spans[0].end, stored, shares)
        loop.lay(0, levels, columns)
        yield levels
    for block in lazy_blocks(spans):
        start, end = block[0].start, block[-1].end
        errors = torch.empty_like(loop.rest[start:end])
        for span in block:
            s, e = span.start, span.end
            if spec.order != "inputs":
                own = None if shares is None else shares[:, :, span.group, None]
                levels = spec.levels(loop.rest[s:e].T, e - s, curvature[s:e], own)
                loop.lay(s, levels, torch.arange(e - s))
                yield levels
            for j in range(s, e):
                errors[j - start] = error = _round_one(loop, j, 2**spec.bits - 1) / upper[j, j]
                loop.rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1.0)
        loop.rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1.0)


def _round_one(loop: _Loop, j: int, top: int) -> Tensor:
    """Round one input of all rows; return what its codes leave, [N]."""
    step, zero = loop.steps[j], loop.zeros[j]
    codes = (torch.round(loop.rest[j] / step) + zero).clamp_(0, top)
    loop.codes[j] = codes.to(torch.uint8)
    return loop.rest[j] - (codes - zero) * step
