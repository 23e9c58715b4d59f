"""What a layer should give on the inputs it will really get: targets corrected for what earlier layers did to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passes.quantize.hessian import Gram, empty_gram, update


@dataclass
class Moments:
    """Second moments of a layer's inputs: gram, on the compressed stream, and drift [K, K] = sum (x_float - x) x^T.

    The difference is taken per token, where it is exact enough for products of any precision.
    """

    gram: Gram
    drift: Tensor | None

    def add_alone(self, x: Tensor) -> None:
        """Add tokens as the compressed stream sees them, [..., K]."""
        update(self.gram, x)

    def add(self, x: Tensor, original: Tensor) -> None:
        """Add the same tokens as both streams see them, [..., K] each."""
        update(self.gram, x)
        assert self.drift is not None
        left, right = (v.reshape(-1, v.shape[-1]).to(self.drift.dtype) for v in (original - x, x))
        self.drift.addmm_(left.T, right)


def empty_moments(inputs: int, both: bool) -> Moments:
    """Return zero moments for `inputs` features; both: with the drift."""
    return Moments(empty_gram(inputs), torch.zeros(inputs, inputs) if both else None)


def corrected(weight: Tensor, moments: Moments, damp: float, share: float = 1.0) -> Tensor:
    """Return the weight whose outputs on compressed inputs come closest to the given one's on the float inputs.

    weight: float64 [N, K]. With D = sum (x_float - x) x^T and H = sum x x^T the minimiser of the squared difference is
    W + W D H^-1, here with H damped by `damp` of its mean diagonal (GPTAQ, 2504.02692, section 3.2; QEP, 2504.09629).
    share: how much of the correction is taken.
    """
    if moments.drift is None or share == 0:
        return weight
    h = moments.gram.matrix.double()
    damped = h + damp * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype)
    step: Tensor = torch.linalg.solve(damped, moments.drift.double().T @ weight.T).T
    return weight + share * step
