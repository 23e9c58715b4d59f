"""The loop that every learning pass runs: Adam on a few tensors, the best state kept, divergence undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from passes.checkpoint import drop_block, last_block, load_block, save_block

State = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], int], Tensor]

# A state so much worse than the best counts as diverged.
_DIVERGED = 2.0
# Batches kept for judging, as a share of all, where there are enough to spare any.
_JUDGED, _SPARE = 8, 4
_MEMORY = 0.9
# What of a run is kept besides tensors, and what the optimiser knows of each tensor.
_KEPT = ("before", "least", "done", "slowed", "events")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Course(Protocol):
    """What a problem does besides following gradients: its optimiser, and tensors of the state that no gradient moves.

    held: their values at the start, by name; they are in the state that the loss sees, in the best state, and kept.
    """

    held: State

    def optimiser(self, leaves: State, held: State, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """Return a new optimiser with one parameter group a leaf, in order, at these learning rates."""

    def before(self, optimiser: torch.optim.Optimizer, done: float) -> None:
        """Prepare a step; done: the share of all steps that lie behind."""

    def after(self, leaves: State, held: State, step: int, done: float) -> None:
        """Change held tensors, in place, after step number `step`, counted from 1."""


class Plain:
    """AdamW without decay, and nothing held."""

    def __init__(self) -> None:
        self.held: State = {}

    def optimiser(self, leaves: State, held: State, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        """Return AdamW with torch's defaults and no decay."""
        groups = [{"params": [leaf], "lr": rates[name]} for name, leaf in leaves.items()]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def before(self, optimiser: torch.optim.Optimizer, done: float) -> None:
        """Do nothing."""

    def after(self, leaves: State, held: State, step: int, done: float) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Problem:
    """What is trained: tensors at their start, the learning rate of each, and a loss.

    loss: of a state on a batch, a scalar with gradients; batches: how many there are; release: lets go of what the loss
    holds on to; course: what happens besides following gradients.
    """

    start: State
    rates: Mapping[str, float]
    loss: Loss
    batches: int
    release: Callable[[], None] = lambda: None
    course: Course = field(default_factory=Plain)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    epochs: over the batches that are trained on; last_rate: the learning rates' share at the end of their cosine, 1
    keeps them as they are; clip: largest gradient norm, as a multiple of its running mean, 0 for any; rollbacks: how
    often a diverged state goes back to the best one, at half the rates, before training ends; warmup: share of all
    steps over which the rates rise from zero.
    """

    epochs: int
    last_rate: float = 0.05
    clip: float = 3.0
    rollbacks: int = 3
    warmup: float = 0.0


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
    """Where training stands: the tensors, their optimiser, the best state so far, and how often it went back.

    leaves follow gradients, held tensors the course; before, least: the judged loss at the start and the least so far;
    done: epochs.
    """

    leaves: State
    held: State
    course: Course
    rates: Mapping[str, float]
    best: State
    before: float
    least: float
    generator: torch.Generator
    done: int = 0
    slowed: float = 1.0
    events: list[str] = field(default_factory=list)
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew from the best state, with no memory of earlier gradients."""
        with torch.no_grad():
            for name, tensor in self.state.items():
                tensor.copy_(self.best[name])
        self.optimiser = self.course.optimiser(self.leaves, self.held, self.rates)

    @property
    def state(self) -> State:
        """All tensors as they are now."""
        return self.leaves | self.held

    def go_back(self, why: str) -> None:
        self.slowed /= 2
        self.events.append(f"{why}; back to the best state so far, at {self.slowed:g} of the learning rates")
        self.restart()

    def set_rates(self, share: float) -> None:
        for group, name in zip(self.optimiser.param_groups, self.leaves, strict=True):
            group["lr"] = self.rates[name] * share * self.slowed

    def save(self, work: Path) -> None:
        """Keep all that the next epoch depends on; of an earlier epoch it is then let go."""
        tensors = {f"leaf/{n}": t.detach() for n, t in self.state.items()} | {
            f"best/{n}": t for n, t in self.best.items()
        }
        for name, leaf in self.leaves.items():
            tensors |= {f"{part}/{name}": t for part, t in self.optimiser.state[leaf].items()}
        tensors["order"] = self.generator.get_state()
        facts = {name: getattr(self, name) for name in _KEPT}
        save_block(work, self.done, tensors, facts)
        drop_block(work, self.done - 1)

    def resume(self, work: Path) -> None:
        """Go on from where `save` kept the run last, if it did."""
        found = load_block(work, last_block(work))
        if found is None:
            return
        tensors, facts = found
        for name in _KEPT:
            setattr(self, name, facts[name])
        self.best = {name: tensors[f"best/{name}"] for name in self.state}
        self.restart()
        with torch.no_grad():
            for name, tensor in self.state.items():
                tensor.copy_(tensors[f"leaf/{name}"])
            for name, leaf in self.leaves.items():
                parts: dict[str, Any] = {p: tensors[f"{p}/{name}"] for p in _MOMENTS if f"{p}/{name}" in tensors}
                if parts:
                    self.optimiser.state[leaf] = parts
        self.generator.set_state(tensors["order"])


def train(
    problem: Problem, recipe: Recipe, seed: int, step: Callable[[], None] = lambda: None, work: Path | None = None
) -> Outcome:
    """Return the state that is best on batches kept for judging, the start among those compared.

    step: called after every step; work: a folder in which the run is kept after every epoch, and from which it goes on.
    The order of batches depends on `seed` alone. A loss or gradient that is not finite, and a judged loss twice the
    best one, send training back to the best state.
    """
    loss, batches = problem.loss, problem.batches
    trained, _ = split(batches)
    run = _begun(problem, seed)
    if work is not None:
        run.resume(work)
    if run.done == 0:
        run.before = judge(run.state, loss, batches)
        run.least = run.before if math.isfinite(run.before) else math.inf
    steps = max(1, recipe.epochs * len(trained))
    while run.done < recipe.epochs and len(run.events) <= recipe.rollbacks:
        order = [trained[i] for i in torch.randperm(len(trained), generator=run.generator).tolist()]
        why = _epoch(run, loss, order, recipe, run.done * len(trained), steps, step)
        after = judge(run.state, loss, batches) if not why else math.nan
        run.done += 1
        if not why and after < run.least:
            run.best, run.least = {n: t.detach().clone() for n, t in run.state.items()}, after
        elif why or not after <= _DIVERGED * run.least:
            if len(run.events) == recipe.rollbacks:
                run.events.append("training ended early, with the best state so far")
            else:
                run.go_back(f"epoch {run.done}: " + (why or f"the loss rose from {run.least:.4g} to {after:.4g}"))
        if work is not None:
            run.save(work)
    return Outcome(run.best, run.before, run.least, run.done, tuple(run.events))


def _begun(problem: Problem, seed: int) -> _Run:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.start.items()}
    held = {name: tensor.detach().clone() for name, tensor in problem.course.held.items()}
    best = {name: tensor.detach().clone() for name, tensor in (problem.start | held).items()}
    return _Run(
        leaves, held, problem.course, problem.rates, best, math.nan, math.inf, torch.Generator().manual_seed(seed)
    )


def split(batches: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return which batches are trained on and which are judged: the last eighth, or all where they are few."""
    spared = max(1, batches // _JUDGED) if batches >= _SPARE else 0
    return range(batches - spared), range(batches - spared if spared else 0, batches)


def _epoch(
    run: _Run, loss: Loss, order: Sequence[int], recipe: Recipe, begun: int, steps: int, step: Callable[[], None]
) -> str:
    """Train on each batch once, with `begun` of all steps done; return why the epoch was broken off, or nothing."""
    typical = 0.0
    for number, batch in enumerate(order, begun):
        run.set_rates(_rate(number / steps, (number + 1) / steps, recipe))
        run.course.before(run.optimiser, number / steps)
        run.optimiser.zero_grad()
        found = loss(run.state, batch)
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
        run.course.after(run.leaves, run.held, number + 1, (number + 1) / steps)
        step()
    return ""


def _rate(done: float, after: float, recipe: Recipe) -> float:
    """Return a cosine from 1 to the recipe's last rate at a share of the way, less while it warms up.

    after: the share of the way once this step is done, so that the first step is not lost.
    """
    rising = min(1.0, after / recipe.warmup) if recipe.warmup else 1.0
    return rising * (recipe.last_rate + (1 - recipe.last_rate) * (1 + math.cos(math.pi * done)) / 2)


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
