"""`blockap`: whole weights trained block by block through rounding, with their scales (EfficientQAT's Block-AP)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from ir.analysis import blocks
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.sites import check_group, check_skip, choose_sites, outside_blocks
from passes.solved import put_solved
from passes.stream import by_rows, walk
from passes.training.begin import Start, begun_sites, planned_sites
from passes.training.blocks import BlockCourse, trained_block
from passes.training.problems import BlockLoss
from passes.training.sites import Rates
from passes.training.trained_codes import Grid, Offset
from passes.widths import width_of


@dataclass(frozen=True)
class BlockAp(Pass):
    """Train the weights of each block with their scales and zero points, so that its rounded output comes close.

    Source: EfficientQAT (2407.11062, section 3.2); `tune-scales{loss=kl}` after it is its end-to-end part.
    """

    bits: int = field(default=4, metadata={"help": "bits per code, 2 to 8, where the pass bits chose no other"})
    group: int = field(default=64, metadata={"help": "inputs that share a scale; must divide every input"})
    offset: Offset = field(default="zero", metadata={"help": "a group's whole zero point, float offset or none"})
    terms: int = field(
        default=0, metadata={"help": "powers of two a scale is a sum of, 1 to 3; 0 takes it as it is, in float16"}
    )
    begin: Start = field(default="mse", metadata={"help": "the levels at the start; gptq: and the weights"})
    loss: BlockLoss = field(default="token", metadata={"help": "count tokens alike, or by their energy (plain)"})
    epochs: int = field(default=2, metadata={"help": "times every sample is trained on, for each block"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=1e-4, metadata={"help": "learning rate of weights"})
    scale_rate: float = field(default=1e-3, metadata={"help": "learning rate of scales, relative to their size"})
    last_rate: float = field(default=0.05, metadata={"help": "share of the rates at the end of their cosine"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "blockap"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    order_reason: ClassVar[str] = "it ends in codes, which later passes only tune"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    data: ClassVar[Calib | None] = Calib("both", gradients=True, original=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training or codes cannot have."""
        ranges = (("bits", 2, 8), ("group", 1, 1 << 20), ("terms", 0, 3), ("epochs", 0, 10**6), ("batch", 1, 10**6))
        for option, low, high in (*ranges, ("rate", 0, 1), ("scale_rate", 0, 1), ("last_rate", 0, 1)):
            if not low <= getattr(self, option) <= high:
                raise OptionError(self.name, option, f"{getattr(self, option)} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        sites = choose_sites(program, _nodes(program), self.skip, Context())
        check_group(sites, self.group, self.name)
        grids = [self._grid(width_of(program, site, self.bits)) for site in sites]
        return planned_sites(program, sites, grids, self.name)

    def run(self, program: Program, ctx: Context) -> None:
        """Train block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        check_skip(program, self.skip, self.name)
        check_group(choose_sites(program, _nodes(program), self.skip, ctx), self.group, self.name)
        outside_blocks(program, _nodes(program), self.skip, ctx)
        course = BlockCourse(self.epochs, Rates(self.scale_rate, whole=self.rate), self.last_rate, self.loss)
        rows = by_rows(ctx, self.batch)
        floats = program.clone()
        for walked in walk(program, rows, "both", self.name, ctx.original):
            sites = choose_sites(program, walked.block.nodes, self.skip, Context())
            if not sites:
                continue
            grids = [self._grid(width_of(program, site, self.bits)) for site in sites]
            part = begun_sites(program, walked, sites, grids, self.begin, self.name, whole=True, keep=True)
            state = trained_block(part, walked, course, ctx)
            for row in part.solved(floats, state).values():
                put_solved(program, row, self.name, ctx)

    def _grid(self, bits: int) -> Grid:
        return Grid(bits, self.group, self.offset, self.terms)


def _nodes(program: Program) -> list[fx.Node]:
    return [node for block in blocks(program) for node in block.nodes]
