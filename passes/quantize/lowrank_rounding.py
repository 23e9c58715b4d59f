"""Learnable rounding: which of the two nearest levels each weight takes, by a matrix of low rank.

AdaRound (2004.10568, eq. 16 and 23) with the low-rank variables of CBQ (2312.07950, section 3.3, "LoRA-Rounding").
Unlike there the variables start from each weight's own remainder, so that the start is rounding to nearest, and what is
computed is rounded to whole codes at every step, with the gradients of the soft rounding: nothing has to be annealed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.quantize.uniform import UniformCodes, best_shares, in_groups, ranges, steps_of

# The sigmoid is stretched beyond 0 and 1, so that it gets there.
_HIGH, _LOW = 1.1, -0.1


@dataclass(frozen=True, eq=False)
class LowRankRounding:
    """A weight [N, K] between levels: step (level + up), up in 0..1 from a variable that training moves.

    floors: float32 [N, G, group], the level below each weight, counted from the zero point; steps: float32 [N, G];
    zeros: [N, G]; variables: [N, K], those at the start.
    """

    floors: Tensor
    steps: Tensor
    zeros: Tensor
    variables: Tensor
    bits: int
    group: int

    def start(self, rank: int, seed: int) -> dict[str, Tensor]:
        """Return the state of rounding to nearest; `rank` columns and rows, none with 0."""
        rows, inputs = self.variables.shape
        left = torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)) / max(rank, 1) ** 0.5
        return {"steps": torch.zeros_like(self.steps), "left": left, "right": torch.zeros(rank, inputs)}

    def weight(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [N, K] as it would be stored, with the gradients of steps and of soft rounding."""
        soft = _soft(self.variables + state["left"] @ state["right"])
        up = in_groups(soft + (torch.round(soft) - soft).detach(), self.group)
        levels = (self.floors + up + self.zeros[..., None]).clamp(0, 2**self.bits - 1) - self.zeros[..., None]
        steps = self._steps(state)
        return (levels * (steps + (steps.half().float() - steps).detach())[..., None]).flatten(1)[
            :, : self.variables.shape[1]
        ]

    def codes(self, state: Mapping[str, Tensor]) -> UniformCodes:
        """Return what `weight` stands for as codes."""
        with torch.no_grad():
            up = in_groups(torch.round(_soft(self.variables + state["left"] @ state["right"])), self.group)
            levels = (self.floors + up + self.zeros[..., None]).clamp(0, 2**self.bits - 1)
            whole = levels.flatten(1)[:, : self.variables.shape[1]].to(torch.uint8).contiguous()
            return UniformCodes(whole, self._steps(state).half(), self.zeros.to(torch.uint8), self.bits, self.group)

    def _steps(self, state: Mapping[str, Tensor]) -> Tensor:
        return self.steps * state["steps"].exp()


def lowrank_rounding(
    weight: Tensor, bits: int, group: int, symmetric: bool = False, importance: Tensor | None = None
) -> LowRankRounding:
    """Return a weight [N, K] on the levels of its best ranges; arguments as `best_shares` takes them."""
    share = best_shares(weight, bits, group, symmetric, importance=importance)
    low, high = (share * end for end in ranges(weight.float(), group))
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    steps = steps_of(low, high, bits).half().float()
    zeros = torch.full_like(steps, 2.0 ** (bits - 1)) if symmetric else torch.round(-low / steps).clamp(0, 2**bits - 1)
    ratio = in_groups(weight.float(), group) / steps[..., None]
    floors = torch.floor(ratio)
    variables = _hard(ratio - floors).flatten(1)[:, : weight.shape[1]]
    return LowRankRounding(floors, steps, zeros, variables, bits, group)


def _soft(variables: Tensor) -> Tensor:
    """Return how far up each weight is rounded, 0 to 1 (AdaRound, eq. 23)."""
    return (torch.sigmoid(variables) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _hard(remainder: Tensor) -> Tensor:
    """Return the variables whose soft rounding is a remainder of 0 to 1."""
    return torch.logit((remainder - _LOW) / (_HIGH - _LOW))
