"""A float weight with a trained addition of low rank, as LoRA runs it: what rounded weights are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from passes.training.trained_codes import DOWN, UP, first_addition


@dataclass(frozen=True, eq=False)
class AddedWeight:
    """base + factor * up @ down, base [N, K] in float and as it is (LoRA, 2106.09685, section 4.1)."""

    base: Tensor
    rank: int
    factor: float
    seed: int

    def start(self) -> dict[str, Tensor]:
        """Return the state under which nothing is added."""
        rows, inputs = self.base.shape
        return first_addition(rows, inputs, self.rank, self.seed, self.base.dtype)

    def bound(self, state: Mapping[str, Tensor]) -> Added:
        """Return the weight under a state, to multiply by."""
        return Added(self, state[DOWN], state[UP])

    def merged(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight under a state."""
        with torch.no_grad():
            return torch.addmm(self.base, state[UP], state[DOWN], alpha=self.factor)


@dataclass(frozen=True, eq=False)
class Added:
    """Such a weight under a state."""

    weight: AddedWeight
    down: Tensor
    up: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias by two small products beside that of the base."""
        added = functional.linear(functional.linear(x, self.down), self.up)
        return functional.linear(x, self.weight.base, bias) + self.weight.factor * added
