"""`affine`: learned matrices between the values of attention heads and what reads them, folded away (AffineQuant)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ir.analysis import Block, blocks, linear_sites, site_name
from ir.edit import Editor
from ir.products import products_in
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import as_json, load_block, replay, save_block
from passes.equiv.heads import HeadChannels, ValueHeads, value_heads
from passes.equiv.operands import write_operand
from passes.equiv.producers import bias_of
from passes.quantize.clipping import clipped
from passes.stream import Step, by_rows, walk
from passes.training.events import block_name, report_outcome
from passes.training.loop import Outcome, Problem, Recipe, train
from passes.training.loss import token_loss

# A strength of clipping at which nothing is cut.
_OPEN = 40.0


@dataclass(frozen=True)
class Affine(Pass):
    """Put the values of each attention head into a learned basis in which the weights around them round better.

    Rows that make a head's values are multiplied by A, columns that read them by its inverse, which is exact because
    attention mixes no channels. Source: AffineQuant (2403.12544), its head-local part, without its gradual mask:
    the state kept is the one that is judged best, the start among them.
    """

    bits: int = field(default=4, metadata={"help": "width that weights are rounded to while A is learned, 2 to 8"})
    group: int = field(default=64, metadata={"help": "inputs that share a range there, 0 for whole rows"})
    epochs: int = field(default=5, metadata={"help": "times every sample is trained on"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=1e-3, metadata={"help": "learning rate of the matrices' entries"})

    name: ClassVar[str] = "affine"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.TRANSFORM
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True)
    exact: ClassVar[bool] = True

    def validate(self) -> None:
        """Raise OptionError for values training cannot have."""
        ranges = (("bits", 2, 8), ("group", 0, 1 << 20), ("epochs", 0, 10**6), ("batch", 1, 10**6))
        for option, low, high in (*ranges, ("rate", 0, 1)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the linears that read values whose basis is learned."""
        found = value_heads(program, _own(program))[0]
        return [PlanRow(site_name(sink.node), "affine") for heads in found for sink in heads.sinks]

    def run(self, program: Program, ctx: Context) -> None:
        """Learn block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        found, left = value_heads(program, _own(program))
        for name, reason in left:
            ctx.log.skip(name, reason)
        inside = {node for block in blocks(program) for node in block.nodes}
        for heads in found:
            if heads.sinks[0].node not in inside:
                ctx.log.skip(site_name(heads.sinks[0].node), "it is in no repeated block")
        rows = by_rows(ctx, self.batch)
        for walked in walk(program, rows, "both", self.name):
            own = [heads for heads in found if _lies_in(heads, walked.block)]
            mark, known = ctx.log.mark(), load_block(ctx.work, walked.block.index)
            if known is not None:
                tensors, facts = known
                replay(ctx.log, facts["said"])
            elif own:
                tensors = self._learned(program, own, walked, ctx)
                save_block(ctx.work, walked.block.index, tensors, {"said": as_json(ctx.log.since(mark))})
            else:
                continue
            matrices = [tensors[str(i)].double() for i in range(len(own))]
            for heads, matrix in zip(own, matrices, strict=True):
                fold_heads(program, heads, matrix, self.name)

    def _learned(self, program: Program, found: Sequence[ValueHeads], walked: Step, ctx: Context) -> dict[str, Tensor]:
        """Return the matrices of a block's attentions, float32 [heads, d, d], by their number."""
        problem = self._problem(program, found, walked)
        with products_in(ctx.precision):
            outcome: Outcome = train(problem, Recipe(self.epochs), ctx.seed + walked.block.index)
        problem.release()
        name = block_name(walked.block)
        report_outcome(ctx, name, outcome)
        figures = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
        ctx.log.report(site=name, **figures)
        return {number: _matrix(entries) for number, entries in outcome.state.items()}

    def _problem(self, program: Program, found: Sequence[ValueHeads], walked: Step) -> Problem:
        slots = [slot for heads in found for slot in (*heads.sources, *heads.sinks)]
        weights = {str(slot.node.args[1].target): slot for slot in slots}  # type: ignore[union-attr]
        biases = {str(b.target) for slot in slots if (b := bias_of(slot.node)) is not None}
        originals = {name: program.params.get(name) for name in (*weights, *biases)}
        block, targets = walked.function(tuple(originals)), walked.float_exits()

        def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
            changed = dict(originals)
            for number, heads in enumerate(found):
                changed |= moved(heads, _matrix(state[str(number)]), changed)
            for name in weights:
                group = self.group or changed[name].shape[1]
                strengths = changed[name].new_full((2, len(changed[name]), -(-changed[name].shape[1] // group)), _OPEN)
                changed[name] = clipped(changed[name], strengths, self.bits, group)
            return token_loss(block(changed, batch), targets[batch])

        start = {str(i): torch.zeros(heads.count, heads.width, heads.width) for i, heads in enumerate(found)}
        return Problem(start, dict.fromkeys(start, self.rate), loss, block.batches, block.release)


def moved(heads: ValueHeads, matrix: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights and biases of the linears around values that are multiplied by a matrix a head.

    matrix: [heads, d, d]; params: by name, of the matrix's dtype. Pure and differentiable; training and folding share
    it.
    """
    changed: dict[str, Tensor] = {}
    # A singular matrix gives a loss that is not finite, which training undoes, and no error.
    inverse = torch.linalg.inv_ex(matrix).inverse
    for slot in heads.sources:
        weight, bias = _names(slot.node)
        changed[weight] = _rows(changed.get(weight, params[weight]), slot, matrix)
        if bias:
            changed[bias] = _rows(changed.get(bias, params[bias])[:, None], slot, matrix)[:, 0]
    for slot in heads.sinks:
        weight, _ = _names(slot.node)
        turned = _rows(changed.get(weight, params[weight]).T, slot, inverse.transpose(1, 2))
        changed[weight] = turned.T
    return changed


def fold_heads(program: Program, heads: ValueHeads, matrix: Tensor, by: str) -> None:
    """Write the weights and biases around values that are multiplied by a float64 matrix a head, rounded once."""
    names = {name for slot in (*heads.sources, *heads.sinks) for name in _names(slot.node) if name}
    params = {name: program.params.get(name) for name in names}
    editor = Editor(program, by)
    found = moved(heads, matrix, {name: tensor.double() for name, tensor in params.items()})
    for slot in (*heads.sources, *heads.sinks):
        for operand in (slot.node.args[1], bias_of(slot.node)):
            if isinstance(operand, fx.Node) and str(operand.target) in found:
                name = str(operand.target)
                write_operand(editor, slot.node, operand, found[name].to(params[name].dtype).contiguous())


def _matrix(entries: Tensor) -> Tensor:
    return torch.eye(entries.shape[-1], dtype=entries.dtype) + entries


def _rows(weight: Tensor, slot: HeadChannels, matrix: Tensor) -> Tensor:
    """Return a weight [N, K] whose rows of each head are multiplied by the head's matrix."""
    parts = torch.einsum("hij,hjk->hik", matrix[slot.heads], weight[slot.channels])
    return weight.index_copy(0, slot.channels.flatten(), parts.flatten(0, 1))


def _names(node: fx.Node) -> tuple[str, str]:
    bias = bias_of(node)
    return str(node.args[1].target), "" if bias is None else str(bias.target)  # type: ignore[union-attr]


def _own(program: Program) -> set[fx.Node]:
    return {site.node for site in linear_sites(program, program.graph.nodes)[0]}


def _lies_in(heads: ValueHeads, block: Block) -> bool:
    return all(slot.node in block.nodes for slot in (*heads.sources, *heads.sinks))
