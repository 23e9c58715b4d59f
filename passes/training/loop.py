"""The loop that every learning pass runs: Adam on a few tensors, the best state kept, divergence undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], int], Tensor]

# A state so much worse than the best counts as diverged.
_DIVERGED = 2.0
# Batches kept for judging, as a share of all, where there are enough to spare any.
_JUDGED, _SPARE = 8, 4
_MEMORY = 0.9


@dataclass(frozen=True)
class Problem:
    """What is trained: tensors at their start, the learning rate of each, and a loss.

    loss: of a state on a batch, a scalar with gradients; batches: how many there are; release: lets go of what the loss
    holds on to.
    """

    start: State
    rates: Mapping[str, float]
    loss: Loss
    batches: int
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    epochs: over the batches that are trained on; last_rate: the learning rates' share at the end of their cosine, 1
    keeps them as they are; clip: largest gradient norm, as a multiple of its running mean, 0 for any; rollbacks: how
    often a diverged state goes back to the best one, at half the rates, before training ends.
    """

    epochs: int
    last_rate: float = 0.05
    clip: float = 3.0
    rollbacks: int = 3


@dataclass(frozen=True)
class Outcome:
    """The best state, the judged loss at the start and of that state, and what happened on the way.

    before is NaN or infinite where not even the start could be judged; events: lines for the user, empty as a rule.
    """

    state: State
    before: float
    after: float
    epochs: int
    events: tuple[str, ...] = ()


@dataclass
class _Run:
    """Where training stands: the tensors, their optimiser, the best state so far, and how often it went back."""

    leaves: State
    rates: Mapping[str, float]
    best: State
    least: float
    slowed: float = 1.0
    events: list[str] = field(default_factory=list)
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew from the best state, with no memory of earlier gradients."""
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(self.best[name])
        groups = [{"params": [leaf], "lr": self.rates[name]} for name, leaf in self.leaves.items()]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)

    def go_back(self, why: str) -> None:
        self.slowed /= 2
        self.events.append(f"{why}; back to the best state so far, at {self.slowed:g} of the learning rates")
        self.restart()

    def set_rates(self, share: float) -> None:
        for group, name in zip(self.optimiser.param_groups, self.leaves, strict=True):
            group["lr"] = self.rates[name] * share * self.slowed


def train(problem: Problem, recipe: Recipe, seed: int, step: Callable[[], None] = lambda: None) -> Outcome:
    """Return the state that is best on batches kept for judging, the start among those compared.

    step: called after every epoch. The order of batches depends on `seed` alone. A loss or gradient that is not finite,
    and a judged loss twice the best one, send training back to the best state.
    """
    start, loss, batches = problem.start, problem.loss, problem.batches
    trained, _ = split(batches)
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
    before = judge(leaves, loss, batches)
    least = before if math.isfinite(before) else math.inf
    run = _Run(leaves, problem.rates, {n: t.detach().clone() for n, t in start.items()}, least)
    generator = torch.Generator().manual_seed(seed)
    done, steps = 0, max(1, recipe.epochs * len(trained))
    for epoch in range(recipe.epochs):
        order = [trained[i] for i in torch.randperm(len(trained), generator=generator).tolist()]
        why = _epoch(run, loss, order, recipe, epoch * len(trained) / steps, steps)
        after = judge(leaves, loss, batches) if not why else math.nan
        done += 1
        step()
        if not why and after < run.least:
            run.best, run.least = {n: t.detach().clone() for n, t in leaves.items()}, after
        elif why or not after <= _DIVERGED * run.least:
            if len(run.events) == recipe.rollbacks:
                run.events.append("training ended early, with the best state so far")
                break
            run.go_back(f"epoch {epoch + 1}: " + (why or f"the loss rose from {run.least:.4g} to {after:.4g}"))
    return Outcome(run.best, before, run.least, done, tuple(run.events))


def split(batches: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return which batches are trained on and which are judged: the last eighth, or all where they are few."""
    spared = max(1, batches // _JUDGED) if batches >= _SPARE else 0
    return range(batches - spared), range(batches - spared if spared else 0, batches)


def _epoch(run: _Run, loss: Loss, order: Sequence[int], recipe: Recipe, begun: float, steps: int) -> str:
    """Train on each batch once; return why the epoch was broken off, or nothing."""
    typical = 0.0
    for index, batch in enumerate(order):
        run.set_rates(_rate(begun + index / steps, recipe.last_rate))
        run.optimiser.zero_grad()
        found = loss(run.leaves, batch)
        found.backward()
        norm = _gradient_norm(run.leaves)
        if not math.isfinite(float(found.detach())) or not math.isfinite(norm):
            return "the loss or its gradient is not finite"
        limit = recipe.clip * typical
        if recipe.clip and typical and norm > limit:
            _scale_gradients(run.leaves, limit / norm)
            norm = limit
        typical = norm if not typical else _MEMORY * typical + (1 - _MEMORY) * norm
        run.optimiser.step()
    return ""


def _rate(done: float, last: float) -> float:
    """Return a cosine from 1 to `last` at a share of the way."""
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


def judge(state: Mapping[str, Tensor], loss: Loss, batches: int) -> float:
    """Return the mean loss of a state on the batches kept for judging, of `batches` in all."""
    judged = split(batches)[1]
    with torch.no_grad():
        return sum(float(loss(state, batch)) for batch in judged) / max(1, len(judged))


def _gradient_norm(leaves: Mapping[str, Tensor]) -> float:
    squares = [leaf.grad.square().sum() for leaf in leaves.values() if leaf.grad is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _scale_gradients(leaves: Mapping[str, Tensor], factor: float) -> None:
    for leaf in leaves.values():
        if leaf.grad is not None:
            leaf.grad.mul_(factor)
