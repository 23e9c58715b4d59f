"""The largest magnitudes of channels and of their weights, and scales that balance them (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from ir.program import Program
from passes.equiv.groups import EquivGroup, TieMap

FLOOR = 1e-5

Callback = Callable[[Tensor], None]


def smoothing_scales(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return s = max|X|^alpha / max|W|^(1-alpha) per free parameter, all three floored at 1e-5 (2211.10438, eq. 4).

    activations, weights: [size], the largest magnitudes of a parameter's channels over tokens and over all consumers.
    """
    a, w = activations.clamp(min=FLOOR), weights.clamp(min=FLOOR)
    return (a**alpha / w ** (1 - alpha)).clamp(min=FLOOR)


def tied_maximum(tie: TieMap, channels: Tensor, size: int) -> Tensor:
    """Return the largest of the tied channels per free parameter, 0 where there is none; channels: [K]."""
    touched = tie.index >= 0
    result = channels.new_zeros(size)
    return result.scatter_reduce(0, tie.index[touched], channels[touched], "amax")


def keeping(node: fx.Node, peaks: dict[fx.Node, Tensor]) -> Callback:
    """Return a callback that keeps the largest magnitude per channel of a node's values, float64 [K]."""

    def see(value: Tensor) -> None:
        if value.numel():
            peak = value.detach().reshape(-1, value.shape[-1]).abs().amax(0).double()
            peaks[node] = torch.maximum(peaks[node], peak) if node in peaks else peak

    return see


def extremes(
    program: Program,
    group: EquivGroup,
    reads: Mapping[str, fx.Node],
    peaks: Mapping[fx.Node, Tensor],
    weights_of_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the largest activations and weights of a group per free parameter, over all its consumers.

    reads: what each consumer reads, by its name; peaks: the largest magnitudes of each. weights_of_first: look at the
    weights of the first consumer only.
    """
    activations, weights = torch.zeros(2, group.size, dtype=torch.float64)
    for i, slot in enumerate(group.sinks):
        peak = peaks[reads[slot.node]]
        activations = torch.maximum(activations, tied_maximum(slot.tie, peak, group.size))
        if i == 0 or not weights_of_first:
            columns = program.params.get(slot.weight).abs().flatten(0, -2).amax(0).double()
            weights = torch.maximum(weights, tied_maximum(slot.tie, columns, group.size))
    return activations, weights
