"""Weights that are trained dense and run masked: gradients for all of them, and masks that follow their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from passes.quantize.uniform import rtn
from passes.sparsify.pattern import Pattern, nm_mask
from passes.sparsify.scores import magnitude, mask_change
from passes.training.loop import State
from passes.training.sparse_adam import SparseAdamW

# Before the names of weights, of masks and of what is trained without one, in a state.
WEIGHT, MASK, FREE = "weight/", "mask/", "free/"
# What masks changed at each renewal, and since the start: [renewals, 2].
CHANGES = "changes"

Norm = Literal["l2", "l1"]


class _Straight(Function):
    """A weight under its mask, whose gradient goes to kept and dropped entries alike."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a weight times its mask, with straight-through gradients (SR-STE, 2102.04010, section 3)."""
    found: Tensor = _Straight.apply(weight, mask)
    return found


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return a weight [N, K] rounded to nearest around zero, as `rtn` stores it, with the gradients of what it was.

    What is zero stays zero, so that codes of kept weights alone decode to the same.
    """
    with torch.no_grad():
        near = rtn(weight, bits, group, symmetric=True).dequantize().to(weight.dtype)
    return weight + (near - weight).detach()


@dataclass(frozen=True)
class MaskedWeights:
    """Parameters of a block that are trained: masked weights and others, such as gains, by name.

    bits: the width that masked weights are rounded to in every step, `group` inputs sharing a scale; 0 for floats.
    """

    masked: tuple[str, ...]
    others: tuple[str, ...]
    bits: int = 0
    group: int = 0

    @property
    def free(self) -> tuple[str, ...]:
        """Names of all of them."""
        return (*self.masked, *self.others)

    def params(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return their values under a state, masked weights masked."""
        found = {name: straight(state[WEIGHT + name], state[MASK + name]) for name in self.masked}
        if self.bits:
            found = {name: rounded(weight, self.bits, self.group) for name, weight in found.items()}
        return found | {name: state[FREE + name] for name in self.others}


@dataclass(frozen=True)
class Annealing:
    """How masks follow their weights.

    decay: of dropped weights, after the ramp; norm: `l2` pulls by their size, `l1` by a constant; ramp: the share of
    all steps over which the decay rises from zero, 0 for a constant one; every: steps between renewals of the masks, 0
    for never; freeze: the share of all steps at the end in which masks stay.
    """

    decay: float
    norm: Norm
    ramp: float
    every: int
    freeze: float

    def decay_at(self, done: float) -> float:
        """Return the decay with a share of all steps done (AST, 2407.20584, section 3.2)."""
        return self.decay if done >= self.ramp else self.decay * done / self.ramp

    def renews(self, step: int, done: float) -> bool:
        """Return whether masks are chosen anew after a step, counted from 1."""
        return self.every > 0 and step % self.every == 0 and done <= 1 - self.freeze


@dataclass(eq=False)
class MaskCourse:
    """Training in which dropped weights decay and masks are chosen anew by the sizes of all weights.

    masks: at the start, by name of the weight; patterns likewise; steps: in all.
    """

    masks: Mapping[str, Tensor]
    patterns: Mapping[str, Pattern]
    how: Annealing
    steps: int
    held: State = field(init=False)

    def __post_init__(self) -> None:
        renewals = self.steps // self.how.every if self.how.every else 0
        self.held = {MASK + name: mask for name, mask in self.masks.items()}
        self.held[CHANGES] = torch.full((renewals, 2), torch.nan)

    def optimiser(self, leaves: State, held: State, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """Return AdamW that decays what masks drop."""
        groups: list[dict[str, Any]] = []
        for name, leaf in leaves.items():
            mask = held.get(MASK + name.removeprefix(WEIGHT)) if name.startswith(WEIGHT) else None
            groups.append({"params": [leaf], "lr": rates[name], "mask": mask, "norm": self.how.norm})
        return SparseAdamW(groups)

    def before(self, optimiser: torch.optim.Optimizer, done: float) -> None:
        """Set the decay."""
        for group in optimiser.param_groups:
            group["decay"] = self.how.decay_at(done)

    def after(self, leaves: State, held: State, step: int, done: float) -> None:
        """Choose masks anew where it is time, and note what share of them changed."""
        if not self.how.renews(step, done):
            return
        since_last = since_start = 0.0
        whole = sum(mask.numel() for mask in self.masks.values())
        for name, first in self.masks.items():
            now, mask = held[MASK + name], nm_mask(magnitude(leaves[WEIGHT + name].detach()), self.patterns[name])
            since_last += mask_change(now, mask) * mask.numel() / whole
            since_start += mask_change(first, mask) * mask.numel() / whole
            now.copy_(mask)
        held[CHANGES][step // self.how.every - 1] = torch.tensor([since_last, since_start])
