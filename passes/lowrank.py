"""`lowrank`: a low-rank branch beside coded linears, the best there is for their outputs on calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from passes.quantize.hessian import Gram
from passes.slim import Slim
from passes.sparsify.lowrank import whitened


@dataclass(frozen=True)
class Lowrank(Slim):
    """Add a branch beside every coded linear, fitted to the error of its outputs with all correlations of its inputs.

    Source: the activation-weighted decomposition of SVD-LLM (2403.07378), of errors as in LQER (2402.02446).
    """

    name: ClassVar[str] = "lowrank"

    def factors(self, error: Tensor, gram: Gram, rank: int) -> tuple[Tensor, Tensor]:
        """Return factors up [N, r] and down [r, K] for what coding took, [N, K]."""
        return whitened(error, gram.matrix, rank)
