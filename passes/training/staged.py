"""Weights trained in two stages: each block by itself where that is asked for, and then all of them end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ir.analysis import blocks
from ir.products import products_in
from ir.program import Program
from passes.base import Context
from passes.stream import Step, walk
from passes.training.loop import Outcome, Problem, Recipe, split, train
from passes.training.problems import WholeLoss, whole_problem
from passes.training.sites import Rates, TrainedSites, all_rates

Begun = Callable[[Step, Context], TrainedSites]


@dataclass(frozen=True)
class WholeCourse:
    """How all blocks are trained together: what for, how fast, and whether blocks are run again on the way back.

    frozen: patterns of sites of which scales alone are trained.
    """

    loss: WholeLoss
    rates: Rates
    recipe: Recipe
    recompute: bool
    frozen: tuple[str, ...] = ()


def staged_problem(
    program: Program, ctx: Context, name: str, begun: Begun, both: bool, course: WholeCourse
) -> tuple[list[TrainedSites], Problem]:
    """Return the weights of all blocks as they are trained end to end, and that training.

    begun: gives a block's weights, after training them in their block where that is asked for; it may then leave them
    rounded in the program, for what the next block reads (`both`: that stream is needed beside the float model's).
    """
    parts, label = list[TrainedSites](), f"{name}, {'block by block' if both else 'float model'}"
    inside = replace(ctx, work=_within(ctx.work, "blocks"))
    for walked in walk(program, ctx, "both" if both else "float", label, ctx.original):
        parts.append(begun(walked, inside))
        if walked.block.index == len(blocks(program)) - 1:
            rates = all_rates(parts, course.rates, course.frozen)
            problem = whole_problem(program, parts, walked, rates, course.loss, ctx, course.recompute)
    return parts, problem


def trained_stages(problem: Problem, ctx: Context, name: str, course: WholeCourse) -> Outcome:
    """Train end to end; the run is kept after every epoch in `ctx.work`, and taken from there on a resumed run."""
    step = ctx.log.progress(course.recipe.epochs * len(split(problem.batches)[0]), name)
    with products_in(ctx.precision):
        outcome = train(problem, course.recipe, ctx.seed, step, _within(ctx.work, "whole"))
    problem.release()
    return outcome


def figures_of(outcome: Outcome) -> dict[str, float]:
    """Return what is reported of a training end to end."""
    return {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}


def _within(work: Path | None, name: str) -> Path | None:
    return None if work is None else work / name
