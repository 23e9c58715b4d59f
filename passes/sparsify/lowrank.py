"""What a mask drops, by a few numbers: sums of neighbours, or a low-rank matrix fitted where nothing is kept."""

from __future__ import annotations

import torch
from torch import Tensor

# Inputs weaker than this share of the mean energy count as that strong: a fit must not blow up along the others.
_WEAKEST = 1e-4


def group_means(weight: Tensor, mask: Tensor, k: int, dropped_only: bool) -> Tensor:
    """Return S [N, K/k], by which x W'^T = x (mask W)^T + (sums of k neighbours of x) S^T stands in for x W^T.

    weight: [N, K]; mask: bool, what is kept. The mean of what is dropped in each k neighbours of a row, over all k
    (AST, 2407.20584, section 3.4, the best fit beside kept weights that stay), or over those dropped only (the best fit
    where kept weights give way, see `beside`).
    """
    parts = torch.where(mask, 0.0, weight).unflatten(1, (-1, k))
    count = (~mask).unflatten(1, (-1, k)).sum(-1).clamp(min=1) if dropped_only else k
    found: Tensor = parts.sum(-1) / count
    return found


def spread_sums(up: Tensor, k: int) -> Tensor:
    """Return the weight [N, K] that sums of k neighbours and S [N, K/k] make."""
    return up.repeat_interleave(k, 1)


def beside(weight: Tensor, mask: Tensor, branch: Tensor) -> Tensor:
    """Return what kept weights must be beside a branch, so that both together are the weight where it keeps any."""
    return torch.where(mask, weight - branch, 0.0)


def completed(weight: Tensor, mask: Tensor, rank: int, energy: Tensor | None, rounds: int) -> tuple[Tensor, Tensor]:
    """Return factors up [N, r] and down [r, K] whose product is close to a weight [N, K] where a mask keeps none.

    mask: bool; energy: [K], the inputs' sums of squares, by which errors count, None for all alike. Entries that are
    kept are free, so they are filled with the product so far and the best product of that rank is taken again, `rounds`
    times (matrix completion by soft imputation without shrinkage, Mazumder et al. 2010). All in float64.
    """
    strength = _strength(weight.shape[1], energy)
    target = weight.double() * strength
    filled = torch.where(mask, 0.0, target)
    up, down = truncated(filled, rank)
    for _ in range(rounds):
        up, down = truncated(torch.where(mask, up @ down, target), rank)
    return up, down / strength


def weighed_error(error: Tensor, energy: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors up [N, r] and down [r, K] closest to an error [N, K], inputs counting by their energy [K].

    SLiM (2410.09615, section 3.2): the truncated decomposition of E diag(sqrt(s)), unscaled afterwards.
    """
    strength = _strength(error.shape[1], energy)
    up, down = truncated(error.double() * strength, rank)
    return up, down / strength


def whitened(matrix: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors up [N, r] and down [r, K] whose outputs come closest to a matrix's, [N, K], on inputs seen.

    gram: sum of x x^T over the inputs, [K, K]; zeros where none were seen, and all count alike then. The truncated
    decomposition of M H^(1/2), times H^(-1/2) (SVD-LLM, 2403.07378, section 3.1). All in float64.
    """
    if not bool(gram.any()):
        return truncated(matrix.double(), rank)
    values, basis = torch.linalg.eigh(gram.double())
    strength = values.clamp_min(_WEAKEST * float(values.mean())).sqrt()
    up, down = truncated((matrix.double() @ basis) * strength, rank)
    return up, (down / strength) @ basis.T


def _strength(inputs: int, energy: Tensor | None) -> Tensor:
    """Return the square roots of the inputs' energies, none too small to divide by; ones where none is known."""
    if energy is None or not bool(energy.any()):
        return torch.ones(inputs, dtype=torch.float64)
    known = energy.double()
    return known.clamp_min(_WEAKEST * float(known.mean())).sqrt()


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors [N, r] and [r, K] of the closest matrix of a rank, by the eigenvectors of its smaller square."""
    if matrix.shape[0] <= matrix.shape[1]:
        basis = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
        return basis, basis.T @ matrix
    basis = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:]
    return matrix @ basis, basis.T
