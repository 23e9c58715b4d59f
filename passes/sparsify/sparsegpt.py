"""SparseGPT: inputs dropped one group after another, the rest of a row making up for them (2301.00774)."""

from __future__ import annotations

from torch import Tensor

from passes.quantize.hessian import prepare
from passes.quantize.order import Span, group_order
from passes.quantize.sweep import Keep, Laid, sweep
from passes.sparsify.pattern import Pattern, nm_mask


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, damp: float = 0.01, *, tokens: int = 0, site: str = ""
) -> tuple[Tensor, Tensor]:
    """Return a weight [N, K] with n of every m inputs of a row left, float64, and its mask, bool [N, K].

    hessian: Gram matrix [K, K] of the inputs, of any positive scale; an input that was always zero is dropped first.
    tokens, site: for messages. Raises UnsupportedError for a Hessian that cannot be factored.
    """
    spans = group_order(hessian.diagonal(), pattern.m, False)[1]
    prepared = prepare(hessian, damp, tokens=tokens, site=site)
    rest = weight.double().masked_fill(prepared.dead, 0.0).T.contiguous()
    kept = sweep(rest, prepared, spans, _as_they_are, choosing(pattern))
    return rest.T.contiguous(), kept.T.contiguous()


def under_mask(
    weight: Tensor, hessian: Tensor, mask: Tensor, damp: float = 0.01, *, tokens: int = 0, site: str = ""
) -> Tensor:
    """Return a weight [N, K] whose kept entries make up for those that a mask drops, float64; arguments as above."""
    columns, spans = group_order(hessian.diagonal(), weight.shape[1], False)
    prepared = prepare(hessian, damp, tokens=tokens, site=site)
    rest = weight.double().masked_fill(prepared.dead, 0.0).T.contiguous()
    ordered = mask[:, columns].T
    sweep(rest, prepared, spans, _as_they_are, lambda span, part, diagonal: ordered[span.start : span.end])
    return rest.T.contiguous()


def choosing(pattern: Pattern) -> Keep:
    """Return what keeps the weights of a group whose loss, w^2 / [H^-1]_jj given the inputs before, is greatest."""

    def keep(span: Span, part: Tensor, diagonal: Tensor) -> Tensor:
        del span
        return nm_mask((part / diagonal[:, None]).square().T, pattern).T

    return keep


def _as_they_are(span: Span, part: Tensor) -> Laid:
    del span, part
    return lambda j, column: column
