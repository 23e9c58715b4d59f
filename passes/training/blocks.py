"""Whole weights of a block trained through rounding, towards the float model's block (Block-AP of EfficientQAT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ir.analysis import Block
from ir.products import products_in
from passes.base import Context
from passes.checkpoint import load_block, save_block
from passes.stream import Step
from passes.training.events import block_name, report_outcome
from passes.training.loop import Recipe, train
from passes.training.problems import BlockLoss, block_problem
from passes.training.sites import Rates, TrainedSites


@dataclass(frozen=True)
class BlockCourse:
    """How a block is trained: epochs, learning rates and their share at the end, and what is compared at its exit."""

    epochs: int
    rates: Rates
    last_rate: float
    loss: BlockLoss


def trained_block(part: TrainedSites, walked: Step, course: BlockCourse, ctx: Context) -> dict[str, Tensor]:
    """Return the state under which a block's weights come closest to the float model, and report its losses.

    A finished block is kept in `ctx.work`, and taken from there on a resumed run. Source: EfficientQAT (2407.11062,
    section 3.2), whose inputs come from the rounded blocks before as well.
    """
    index, name = walked.block.index, block_name(walked.block)
    kept = load_block(ctx.work, index)
    if kept is not None:
        _tell(ctx, walked.block, kept[1])
        return kept[0]
    problem = block_problem(part, walked, part.rates(course.rates), course.loss)
    with products_in(ctx.precision):
        outcome = train(problem, Recipe(course.epochs, course.last_rate), ctx.seed + index)
    problem.release()
    report_outcome(ctx, name, outcome)
    facts: dict[str, object] = {"loss_before": outcome.before, "loss_after": outcome.after}
    save_block(ctx.work, index, outcome.state, facts)
    _tell(ctx, walked.block, facts)
    return outcome.state


def _tell(ctx: Context, block: Block, facts: Mapping[str, object]) -> None:
    ctx.log.report(site=block_name(block), **{name: float(str(value)) for name, value in facts.items()})
