"""The loop of Optimal Brain Surgeon over the inputs of a weight: what a column loses, later ones make up for.

Frantar et al. 2023 (GPTQ, 2210.17323, Algorithm 1; SparseGPT, 2301.00774, Algorithm 1); all arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from passes.quantize.hessian import PreparedHessian
from passes.quantize.order import Span, lazy_blocks

# Gives the inputs of a group that are kept, bool [n, N], from where it lies, its weights [n, N] and its part of the
# factor's diagonal [n].
Keep = Callable[[Span, Tensor, Tensor], Tensor]


class Laid(Protocol):
    """What a group's weights may become."""

    def __call__(self, j: int, column: Tensor) -> Tensor:
        """Return what input j of the group becomes, [N], of what it is by now, [N]."""


Lay = Callable[[Span, Tensor], Laid]


def sweep(
    rest: Tensor, prepared: PreparedHessian, spans: tuple[Span, ...], lay: Lay, keep: Keep | None = None
) -> Tensor:
    """Go through a weight's inputs, and leave in `rest` what each became; return which were kept, bool [K, N].

    rest: float64 [K, N], inputs in the order of the spans, changed in place; lay: called when a group is reached, with
    its compensated weights, those that are not kept set to zero. keep: called before; None keeps all.
    """
    upper, kept = prepared.upper, torch.ones(rest.shape, dtype=torch.bool)
    for block in lazy_blocks(spans):
        start, end = block[0].start, block[-1].end
        errors = torch.empty_like(rest[start:end])
        for span in block:
            s, e = span.start, span.end
            part = rest[s:e]
            if keep is not None:
                kept[s:e] = keep(span, part, upper.diagonal()[s:e])
                part = part * kept[s:e]
            become = lay(span, part)
            for j in range(s, e):
                new = become(j - s, rest[j])
                if keep is not None:
                    new = torch.where(kept[j], new, 0.0)
                errors[j - start] = error = (rest[j] - new) / upper[j, j]
                rest[j] = new
                rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1.0)
        rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1.0)
    return kept
