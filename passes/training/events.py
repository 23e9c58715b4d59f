"""What is told of a block's training beside its figures."""

from __future__ import annotations

import math

from ir.analysis import Block
from passes.base import Context
from passes.training.loop import Outcome


def block_name(block: Block) -> str:
    """Return how a block is called in reports."""
    return block.path or f"block {block.index}"


def report_outcome(ctx: Context, name: str, outcome: Outcome) -> None:
    """Note what happened while a block was trained, and record one that is left as it was before training."""
    for event in outcome.events:
        ctx.log.note(f"{name}: {event}")
    if not math.isfinite(outcome.after):
        ctx.log.skip(
            name, "its loss is not finite on the calibration text, so that it keeps what training started from"
        )
    elif outcome.epochs and outcome.after == outcome.before:
        ctx.log.note(f"{name}: training found nothing better than its start")
