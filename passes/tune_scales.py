"""`tune-scales`: scales and offsets of coded weights trained against the float model, block by block; codes stay.

Sources: ELUTQ (2510.19482, section 3.3) and AnyBCQ (2510.10467, section 3.2) tune the scales of binary codes so, PEQA
(2305.14152) those of uniform ones; here inputs come from the compressed blocks before, and offsets learn too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor, fx

from ir.analysis import Block, blocks, matches, site_name
from ir.decode import is_coded
from ir.edit import Editor
from ir.errors import UsageError
from ir.program import Program, is_call
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.equiv.operands import own_gain
from passes.equiv.rules import NORMS
from passes.sites import check_patterns
from passes.stream import split_rows, walk
from passes.training.events import block_name
from passes.tuned_block import TunedBlock


@dataclass(frozen=True)
class TuneScales(Pass):
    """Train scales and offsets of coded weights so that each block comes close to the float model's."""

    epochs: int = field(default=5, metadata={"help": "times every sample is trained on"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=5e-3, metadata={"help": "learning rate, of scales relative to their size"})
    last_rate: float = field(default=0.05, metadata={"help": "share of the rate at the end of its cosine"})
    gains: bool = field(default=False, metadata={"help": "train the gains of norms as well"})
    loss: Literal["token", "plain"] = field(
        default="token", metadata={"help": "count tokens alike, or by their energy"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave as they are, `*` stands for any text"})

    name: ClassVar[str] = "tune-scales"
    level: ClassVar[tuple[str, str]] = ("compressed", "compressed")
    stage: ClassVar[Stage] = Stage.TUNE
    order_reason: ClassVar[str] = "it trains the scales of codes that are there"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True, original=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training cannot have."""
        for option, low, high in (("epochs", 0, 10**6), ("batch", 1, 10**6), ("last_rate", 0, 1), ("rate", 0, 1)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the coded sites whose scales are trained; none are known before weights are coded."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        return [PlanRow(site_name(n), self.name) for n in nodes if is_coded(n) and not self._skipped(n)]

    def run(self, program: Program, ctx: Context) -> None:
        """Train block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        if ctx.original is None:
            raise UsageError(
                f"pass {self.name} needs the float model to come close to",
                why="the weights were already coded when this run began",
                fix=f"put {self.name} into the pipeline that codes the weights, after the pass that does",
            )
        nodes = [n for block in blocks(program) for n in block.nodes]
        check_patterns([site_name(n) for n in nodes if is_coded(n)], self.skip, self.name)
        rows = replace(ctx, calibration=split_rows(ctx, self.batch))
        for walked in walk(program, rows, "both", self.name, ctx.original):
            chosen = self._chosen(program, walked.block, ctx)
            gains = self._own_gains(program, walked.block) if self.gains else []
            found = load_block(ctx.work, walked.block.index)
            if found is not None:
                tensors, facts = found
                _put(program, tensors, self.name)
                ctx.log.report(**facts)  # type: ignore[arg-type]
                continue
            if chosen:
                block = TunedBlock(self, program, walked, chosen, gains, ctx)
                tensors, figures = block.solve()
                _put(program, tensors, self.name)
                ctx.log.report(**figures)  # type: ignore[arg-type]
                save_block(ctx.work, walked.block.index, tensors, figures)

    def _chosen(self, program: Program, block: Block, ctx: Context) -> list[fx.Node]:
        """Return a block's coded linears that are trained; the others are recorded with the reason."""
        chosen = []
        for node in (program.node(n.name) for n in block.nodes if is_coded(n)):
            if self._skipped(node):
                ctx.log.skip(site_name(node), "the option skip names it", asked=True)
            else:
                chosen.append(node)
        if not chosen:
            ctx.log.skip(block_name(block), "none of its linears is coded")
        return chosen

    def _skipped(self, node: fx.Node) -> bool:
        return any(matches(pattern, site_name(node)) for pattern in self.skip)

    def _own_gains(self, program: Program, block: Block) -> list[str]:
        editor = Editor(program, self.name)
        return [own_gain(editor, node) for node in block.nodes if is_call(node, *NORMS)]


def _put(program: Program, tensors: Mapping[str, Tensor], by: str) -> None:
    editor = Editor(program, by)
    for name, tensor in tensors.items():
        editor.param(name, tensor)
