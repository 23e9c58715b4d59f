"""Planes of signs, each of what the planes before it leave of a weight, and the scales that leave least."""

from __future__ import annotations

import torch
from torch import Tensor

# Of scales that float16 holds.
_TINY, _MOST = 2.0**-24, 65504.0
# Rounds in which signs and scales are fitted to each other.
_ROUNDS = 8


def residual_signs(parts: Tensor, scales: Tensor) -> list[Tensor]:
    """Return for each plane where what the planes before leave is positive, bool [N, G, group] each.

    parts: weights by groups; scales: [N, G, planes]. Zero counts as positive, so that no sign is without a value.
    """
    left, found = parts.clone(), []
    for scale in scales.unbind(-1):
        found.append(left >= 0)
        left -= signed(found[-1], scale)
    return found


def fitted_scales(parts: Tensor, planes: int, energy: Tensor | None) -> Tensor:
    """Return scales [N, G, planes] that leave little of weights by groups [N, G, group], each at least float16's least.

    energy: how much each input counts, [G, group]; None for alike. Signs by `residual_signs` and least squares take
    turns, from scales that are found plane by plane; the best of all rounds is kept for each group.
    """
    weight = torch.ones_like(parts[0]) if energy is None or not bool(energy.any()) else energy.to(parts.dtype)
    total, left, first = weight.sum(-1).clamp(min=1e-30), parts.clone(), []
    for _ in range(planes):
        first.append(((left.abs() * weight).sum(-1) / total).clamp(_TINY, _MOST))
        left -= signed(left >= 0, first[-1])
    scales = best = torch.stack(first, -1)
    least = torch.full_like(scales[..., 0], torch.inf)
    for _ in range(_ROUNDS):
        signs = torch.stack([2.0 * s - 1.0 for s in residual_signs(parts, scales)], -1).to(parts.dtype)
        error = ((parts - (signs * scales[:, :, None]).sum(-1)).square() * weight).sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better[..., None], scales, best)
        gram = torch.einsum("ngkp,gk,ngkq->ngpq", signs, weight, signs)
        gram += 1e-6 * total[..., None, None] * torch.eye(planes, dtype=parts.dtype)
        right = torch.einsum("ngkp,gk,ngk->ngp", signs, weight, parts)
        scales = torch.linalg.solve(gram, right).clamp(_TINY, _MOST)
    return best


def signed(positive: Tensor, scale: Tensor) -> Tensor:
    """Return a scale [...] with the signs of a plane [..., group]."""
    return torch.where(positive, scale[..., None], -scale[..., None])
