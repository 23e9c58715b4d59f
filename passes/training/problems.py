"""What is trained block by block or from end to end, as problems for the loop: parts against the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from ir.program import Program
from ir.weights import LinearWeight
from passes.base import Context
from passes.stream import Step, counted_in, token_batches
from passes.training.loop import Problem
from passes.training.loss import next_token_loss, plain_loss, teacher_loss, token_loss
from passes.training.whole import teacher_of, whole_function

BlockLoss = Literal["token", "plain"]
WholeLoss = Literal["kl", "ce"]


class TrainedPart(Protocol):
    """Parameters of a block that depend on a state."""

    @property
    def free(self) -> tuple[str, ...]:
        """Their names."""

    def start(self) -> dict[str, Tensor]:
        """Return the state under which all is as it was."""

    def params(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor | LinearWeight]:
        """Return their values under a state, with gradients."""


def block_problem(part: TrainedPart, walked: Step, rates: Mapping[str, float], loss: BlockLoss) -> Problem:
    """Return the training of a block, whose exit should come close to the float model's.

    rates: by name in the state.
    """
    measure = token_loss if loss == "token" else plain_loss
    block, targets = walked.function(part.free), walked.float_exits()

    def found(state: Mapping[str, Tensor], batch: int) -> Tensor:
        return measure(block(part.params(state), batch), targets[batch])

    return Problem(part.start(), rates, found, block.batches, block.release)


def whole_problem(
    program: Program,
    parts: Sequence[TrainedPart],
    last: Step,
    rates: Mapping[str, float],
    loss: WholeLoss,
    ctx: Context,
    recompute: bool = True,
) -> Problem:
    """Return the training of all blocks, `parts`, whose predictions should come close to the float model's or the text.

    last: the last block of a walk on the float model. Of that model only what this block gives is kept, and its head.
    rates: by name in the state; recompute: as `whole_function` has it.
    """
    rows = token_batches(ctx, program, "training end to end")
    model, teacher = whole_function(program, [part.free for part in parts], recompute), teacher_of(last)

    def found(state: Mapping[str, Tensor], batch: int) -> Tensor:
        ids = rows[batch]
        values = model.start(ids)
        logits = model.logits(model.exits([partial(part.params, state) for part in parts], values), values)
        counted = counted_in(ctx, batch)
        if loss == "ce":
            return next_token_loss(logits, ids, counted)
        return teacher_loss(logits, teacher.logits(ids, batch), counted)

    def release() -> None:
        model.release()
        teacher.release()

    start = {name: tensor for part in parts for name, tensor in part.start().items()}
    return Problem(start, rates, found, len(rows), release)
