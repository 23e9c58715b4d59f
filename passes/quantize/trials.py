"""A site rounded at several widths, for passes whose training starts from the best ranges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from passes.base import Trial
from passes.quantize.hessian import Gram
from passes.quantize.salience import row_energy
from passes.quantize.uniform import packed_bytes, searched


def searched_trials(
    weight: Tensor, gram: Gram | None, choices: Sequence[int], group: int, symmetric: bool
) -> list[Trial]:
    """Return a weight [N, K] rounded to nearest at each width, in the ranges that lose least."""
    importance, found = None if gram is None else gram.matrix.diagonal(), []
    for bits in choices:
        lost = weight - searched(weight, bits, group, symmetric, importance=importance).dequantize()
        size = packed_bytes(weight.shape[0], weight.shape[1], bits, group, symmetric)
        found.append(Trial(bits, size, row_energy(lost, gram)))
    return found
