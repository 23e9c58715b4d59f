"""The Gram matrix of a layer's inputs, accumulated in a stream, and its factored, damped form for GPTQ-like solvers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import UnsupportedError, UsageError

_DEAD_SHARE = 0.01


@dataclass
class Gram:
    """Sum of x x^T over the tokens seen: matrix [K, K], tokens counted."""

    matrix: Tensor
    tokens: int = 0


@dataclass(frozen=True)
class PreparedHessian:
    """A damped Hessian and its factor.

    dead: bool [K], inputs that were always zero; matrix: float64 [K, K], damped; upper: float64 [K, K], the upper
    triangular U with H^-1 = U^T U; damp: the damping used, relative to the mean of the live diagonal.
    """

    dead: Tensor
    matrix: Tensor
    upper: Tensor
    damp: float


def empty_gram(inputs: int, dtype: torch.dtype = torch.float32) -> Gram:
    """Return a zero Gram matrix for `inputs` features."""
    return Gram(torch.zeros(inputs, inputs, dtype=dtype))


def update(gram: Gram, x: Tensor) -> None:
    """Add the tokens of x [..., K] to the Gram matrix in place; the product is taken in the matrix's dtype.

    Raises UsageError if the feature count differs.
    """
    if x.shape[-1] != gram.matrix.shape[0]:
        raise UsageError(f"inputs have {x.shape[-1]} features, the Gram matrix {gram.matrix.shape[0]}")
    flat = x.reshape(-1, x.shape[-1]).to(gram.matrix.dtype)
    gram.matrix.addmm_(flat.T, flat)
    gram.tokens += flat.shape[0]


def prepare(matrix: Tensor, damp: float = 0.01, *, tokens: int = 0, site: str = "") -> PreparedHessian:
    """Damp a Gram matrix and factor its inverse (GPTQ, Frantar et al. 2023, section 3.3, steps 2 and 3).

    matrix: [K, K], any positive scale; damp: added to the diagonal, relative to the mean of its live entries, and
    multiplied by 10 up to 1 when the factorisation fails; tokens, site: for the message. A dead input gets 0.01 of the
    mean, so it neither couples nor weighs in a fit. Raises UsageError for a matrix that is not finite or not square,
    UnsupportedError if no damping helps.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not torch.isfinite(matrix).all():
        raise UsageError(
            "the Hessian must be a finite square matrix", where=site, why="calibration gave NaN or infinity"
        )
    h = matrix.double()
    h = (h + h.T).div_(2)
    dead = h.diagonal() <= 0
    live = h.diagonal()[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    h[dead, :] = 0.0
    h[:, dead] = 0.0
    h.diagonal()[dead] = _DEAD_SHARE * mean
    diagonal = h.diagonal().clone()
    while True:
        h.diagonal().copy_(diagonal + damp * mean)
        upper = inverse_factor(h)
        if upper is not None:
            return PreparedHessian(dead, h, upper, damp)
        if damp >= 1.0:
            h.diagonal().copy_(diagonal)
            raise _singular(h, tokens, site)
        damp = min(1.0, max(damp * 10, 1e-4))


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """Return the upper triangular U with matrix^-1 = U^T U, or None if the matrix is not numerically positive definite.

    One Cholesky factor of the matrix with both dims reversed gives matrix = R R^T, R upper, hence U = R^-1: the inverse
    itself, whose rounding would be squared, is never formed.
    """
    factor, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info) != 0:
        return None
    factor = factor.flip(0, 1)
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(factor, eye, upper=True)
    return upper if bool(torch.isfinite(upper).all()) else None


def _singular(h: Tensor, tokens: int, site: str) -> UnsupportedError:
    lowest = float(torch.linalg.eigvalsh(h)[0])
    return UnsupportedError(
        "the Hessian cannot be factored even with damping 1.0",
        where=site,
        why=f"{tokens} tokens for {h.shape[0]} inputs; the smallest eigenvalue is {lowest:.3g}",
        fix="calibrate on more tokens, accumulate in float64, or quantise this site without data",
    )
