"""`tune-scales`: scales and offsets of coded weights trained against the float model; codes stay as they are.

Sources: ELUTQ (2510.19482, section 3.3) and AnyBCQ (2510.10467, section 3.2) tune the scales of binary codes block by
block, EfficientQAT (2407.11062, section 3.3) and PEQA (2305.14152) those of uniform ones end to end; here inputs come
from the compressed blocks before, and offsets learn too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, fx

from ir.analysis import Block, blocks, matches, site_name
from ir.decode import has_scales, is_coded
from ir.edit import Editor
from ir.errors import UsageError
from ir.products import products_in
from ir.program import Program, is_call
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.equiv.operands import own_gain
from passes.equiv.rules import NORMS
from passes.sites import check_patterns
from passes.stream import by_rows, walk
from passes.training.events import block_name, report_outcome
from passes.training.loop import Problem, Recipe, split, train
from passes.training.problems import BlockLoss, WholeLoss, block_problem, whole_problem
from passes.tuned_weights import TunedWeights, tuned_weights


@dataclass(frozen=True)
class TuneScales(Pass):
    """Train scales and offsets of coded weights so that blocks, or the whole model, come close to the float model's."""

    epochs: int = field(default=5, metadata={"help": "times every sample is trained on"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=5e-3, metadata={"help": "learning rate, of scales relative to their size"})
    last_rate: float = field(default=0.05, metadata={"help": "share of the rate at the end of its cosine"})
    gains: bool = field(default=False, metadata={"help": "train the gains of norms as well"})
    loss: BlockLoss | WholeLoss = field(
        default="token",
        metadata={
            "help": "block by block, with tokens counted alike (token) or by their energy (plain); or all together, "
            "towards the float model's predictions (kl) or the text (ce)"
        },
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave as they are, `*` stands for any text"})

    name: ClassVar[str] = "tune-scales"
    level: ClassVar[tuple[str, str]] = ("compressed", "compressed")
    stage: ClassVar[Stage] = Stage.TUNE
    order_reason: ClassVar[str] = "it trains the scales of codes that are there"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    data: ClassVar[Calib] = Calib("both", gradients=True, original=True)
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False

    def needs(self) -> Calib | None:
        """Return both streams, with predictions of tokens for the losses that are taken over the whole model."""
        return replace(self.data, tokens=self.loss in ("kl", "ce"))

    def validate(self) -> None:
        """Raise OptionError for values training cannot have."""
        for option, low, high in (("epochs", 0, 10**6), ("batch", 1, 10**6), ("last_rate", 0, 1), ("rate", 0, 1)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the coded sites whose scales are trained; none are known before weights are coded."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        return [
            PlanRow(site_name(n), self.name) for n in nodes if is_coded(n) and has_scales(n) and not self._skipped(n)
        ]

    def run(self, program: Program, ctx: Context) -> None:
        """Train; what is finished is kept in `ctx.work` and taken from there on a resumed run."""
        if ctx.original is None:
            raise UsageError(
                f"pass {self.name} needs the float model to come close to",
                why="the weights were already coded when this run began",
                fix=f"put {self.name} into the pipeline that codes the weights, after the pass that does",
            )
        nodes = [n for block in blocks(program) for n in block.nodes]
        check_patterns([site_name(n) for n in nodes if is_coded(n)], self.skip, self.name)
        rows = by_rows(ctx, self.batch)
        if self.loss == "kl" or self.loss == "ce":
            self._train_whole(program, self.loss, rows)
        else:
            self._train_blocks(program, self.loss, rows)

    def _train_blocks(self, program: Program, loss: BlockLoss, ctx: Context) -> None:
        for walked in walk(program, ctx, "both", self.name, ctx.original):
            index, weights = walked.block.index, self._weights(program, walked.block, ctx)
            found = load_block(ctx.work, index)
            if found is None and weights.nodes:
                problem = block_problem(weights, walked, dict.fromkeys(weights.start(), self.rate), loss)
                found = self._trained(problem, [weights], block_name(walked.block), ctx.seed + index, ctx)
                save_block(ctx.work, index, *found)
            if found is not None:
                self._put(program, *found, ctx)

    def _train_whole(self, program: Program, loss: WholeLoss, ctx: Context) -> None:
        parts = [self._weights(program, block, ctx) for block in blocks(program)]
        if not any(weights.nodes for weights in parts):
            return
        for walked in walk(program, ctx, "float", f"{self.name}, float model", ctx.original):
            if walked.block.index == len(parts) - 1:
                rates = dict.fromkeys([name for part in parts for name in part.start()], self.rate)
                problem = whole_problem(program, parts, walked, rates, loss, ctx)
                step = ctx.log.progress(self.epochs * len(split(problem.batches)[0]), self.name)
                found = self._trained(problem, parts, program.name, ctx.seed, ctx, step=step, work=ctx.work)
                self._put(program, *found, ctx)

    def _trained(
        self, problem: Problem, weights: Sequence[TunedWeights], name: str, seed: int, ctx: Context, **kept: Any
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the parameters that training changed, by name, and the figures to report."""
        with products_in(ctx.precision):
            outcome = train(problem, Recipe(self.epochs, self.last_rate), seed, **kept)
        problem.release()
        report_outcome(ctx, name, outcome)
        changed = {name: t for part in weights for name, t in part.changed(outcome.state).items()}
        figures = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
        return changed, {"site": name, **figures}

    def _weights(self, program: Program, block: Block, ctx: Context) -> TunedWeights:
        gains = self._own_gains(program, block) if self.gains else []
        return tuned_weights(program, self._chosen(program, block, ctx), gains)

    def _chosen(self, program: Program, block: Block, ctx: Context) -> list[fx.Node]:
        """Return a block's coded linears that are trained; the others are recorded with the reason."""
        chosen = []
        for node in (program.node(n.name) for n in block.nodes if is_coded(n)):
            if self._skipped(node):
                ctx.log.skip(site_name(node), "the option skip names it", asked=True)
            elif not has_scales(node):
                ctx.log.skip(site_name(node), "its weights are floats without scales")
            else:
                chosen.append(node)
        if not any(is_coded(n) for n in block.nodes):
            ctx.log.skip(block_name(block), "none of its linears is coded")
        return chosen

    def _skipped(self, node: fx.Node) -> bool:
        return any(matches(pattern, site_name(node)) for pattern in self.skip)

    def _own_gains(self, program: Program, block: Block) -> list[str]:
        editor = Editor(program, self.name)
        return [own_gain(editor, node) for node in block.nodes if is_call(node, *NORMS)]

    def _put(self, program: Program, tensors: Mapping[str, Tensor], figures: Mapping[str, Any], ctx: Context) -> None:
        editor = Editor(program, self.name)
        for name, tensor in tensors.items():
            editor.param(name, tensor)
        ctx.log.report(**figures)
