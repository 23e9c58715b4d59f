"""`l4q`: weights with a low-rank addition, rounded in every step of training, so that the sum ends as codes (L4Q)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ir.analysis import LinearSite, blocks
from ir.errors import UnsupportedError
from ir.products import products_in
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.quantize.first_levels import Begin, first_levels
from passes.sites import check_group, check_skip, choose_sites, outside_blocks, planned, weights_of
from passes.stream import Step, split_rows, walk
from passes.trained_sites import Rates, TrainedSites, Weight, all_rates
from passes.training.events import report_outcome
from passes.training.loop import Recipe, split, train
from passes.training.low_rank import AddedWeight
from passes.training.problems import WholeLoss, whole_problem
from passes.training.rounded import Domain
from passes.training.trained_codes import Grid, Offset, trained_codes
from passes.widths import width_of

# The width at which nothing is rounded.
FLOAT = 16


@dataclass(frozen=True)
class L4q(Pass):
    """Train low-rank additions to weights and the scales that the sums are rounded by, end to end.

    Source: L4Q (2402.04902); `domain=code` as in LR-QAT (2406.06385); without rounding it is LoRA (2106.09685).
    """

    bits: int = field(
        default=4,
        metadata={"help": "bits per code, 2 to 8, where the pass bits chose no other; 16: plain LoRA, merged"},
    )
    group: int = field(default=64, metadata={"help": "inputs that share a scale; must divide every input"})
    offset: Offset = field(
        default="zero", metadata={"help": "a group's whole zero point, float offset (as L4Q has it) or none"}
    )
    terms: int = field(
        default=0, metadata={"help": "powers of two a scale is a sum of, 1 to 3; 0 takes it as it is, in float16"}
    )
    rank: int = field(default=4, metadata={"help": "rank of the addition, 0 to train scales alone"})
    factor: float = field(default=2.0, metadata={"help": "of the addition: LoRA's alpha / rank"})
    domain: Domain = field(
        default="weight", metadata={"help": "what is added to: weights, or their places among the levels (LR-QAT)"}
    )
    begin: Begin = field(default="mse", metadata={"help": "the levels at the start"})
    loss: WholeLoss = field(default="kl", metadata={"help": "towards the float model's predictions, or the text"})
    epochs: int = field(default=1, metadata={"help": "times every sample is trained on"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=1e-3, metadata={"help": "learning rate of the addition"})
    scale_rate: float = field(default=1e-3, metadata={"help": "learning rate of scales, relative to their size"})
    relative: bool = field(default=True, metadata={"help": "scales move by factors; false: by differences"})
    last_rate: float = field(default=0.1, metadata={"help": "share of the rates at the end of their cosine"})
    warmup: float = field(default=0.1, metadata={"help": "share of all steps over which the rates rise from zero"})
    recompute: bool = field(
        default=True,
        metadata={"help": "run each block again on the way back: a quarter more work, and memory for one block only"},
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "l4q"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    order_reason: ClassVar[str] = "it ends in codes, which later passes only tune"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    data: ClassVar[Calib | None] = Calib("float", gradients=True, original=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training or codes cannot have."""
        if self.bits not in (FLOAT, *range(2, 9)):
            raise OptionError(self.name, "bits", f"{self.bits} is neither 2..8 nor {FLOAT}")
        if self.bits == FLOAT and not self.rank:
            raise OptionError(self.name, "rank", "without rounding and addition there is nothing to train")
        ranges = (("group", 1, 1 << 20), ("terms", 0, 3), ("rank", 0, 1 << 16), ("epochs", 0, 10**6))
        shares = (("rate", 0, 1), ("scale_rate", 0, 1), ("last_rate", 0, 1), ("warmup", 0, 1), ("batch", 1, 10**6))
        for option, low, high in (*ranges, *shares):
            if not low <= getattr(self, option) <= high:
                raise OptionError(self.name, option, f"{getattr(self, option)} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        sites = self._all_sites(program, Context())
        if self.bits == FLOAT:
            return [PlanRow(site.name, "train an addition of low rank, and merge it") for site in sites]
        return [PlanRow(s.name, self.name, planned(self, s, width_of(program, s, self.bits))) for s in sites]

    def stored_bytes(self, site: LinearSite, bits: int) -> int:
        """Return the bytes of a site's codes, scales and offsets at a width."""
        return self._grid(bits).stored_bytes(site.rows, site.inputs)

    def facts_after(self, facts: frozenset[str]) -> frozenset[str]:
        """Return the facts that hold after the pass."""
        return facts if self.bits == FLOAT else facts | {"quant-weights"}

    def run(self, program: Program, ctx: Context) -> None:
        """Train; the run is kept after every epoch in `ctx.work`, and taken from there on a resumed run."""
        check_skip(program, self.skip, self.name)
        sites = self._all_sites(program, ctx)
        if not sites:
            raise UnsupportedError("there is no linear to train", where=program.name)
        outside_blocks(program, [n for block in blocks(program) for n in block.nodes], self.skip, ctx)
        rows, parts = replace(ctx, calibration=split_rows(ctx, self.batch)), list[TrainedSites]()
        for walked in walk(program, rows, "float", f"{self.name}, float model", ctx.original):
            parts.append(self._part(program, walked, ctx))
            if walked.block.index == len(blocks(program)) - 1:
                rates = all_rates(parts, Rates(self.scale_rate, self.rate))
                problem = whole_problem(program, parts, walked, rates, self.loss, rows, self.recompute)
                step = ctx.log.progress(self.epochs * len(split(problem.batches)[0]), self.name)
                with products_in(ctx.precision):
                    recipe = Recipe(self.epochs, self.last_rate, warmup=self.warmup)
                    outcome = train(problem, recipe, ctx.seed, step, ctx.work)
                problem.release()
        report_outcome(ctx, program.name, outcome)
        trained = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
        ctx.log.report(site=program.name, **trained)
        for part in parts:
            part.put(program, outcome.state, self.name, ctx)

    def _all_sites(self, program: Program, ctx: Context) -> list[LinearSite]:
        nodes = [n for block in blocks(program) for n in block.nodes]
        sites = choose_sites(program, nodes, self.skip, ctx)
        if self.bits != FLOAT:
            check_group(sites, self.group, self.name)
        wide = [s for s in sites if self.rank > min(s.rows, s.inputs)]
        if wide:
            why = f"{wide[0].name} has {wide[0].rows} rows and {wide[0].inputs} inputs"
            raise OptionError(self.name, "rank", f"{self.rank} is more than any rank there: {why}")
        return sites

    def _grid(self, bits: int) -> Grid:
        return Grid(bits, self.group, self.offset, self.terms)

    def _part(self, program: Program, walked: Step, ctx: Context) -> TrainedSites:
        """Return a block's weights as they are trained."""
        sites = choose_sites(program, walked.block.nodes, self.skip, Context())
        energies = self._energies(walked, sites) if self.begin == "hessian" and self.bits != FLOAT else {}
        seeds = (ctx.seed + 1000 * walked.block.index + i for i in range(len(sites)))
        return TrainedSites(
            tuple(sites),
            tuple(self._weight(program, s, energies.get(s.name), seed) for s, seed in zip(sites, seeds, strict=True)),
        )

    def _weight(self, program: Program, site: LinearSite, energy: Tensor | None, seed: int) -> Weight:
        base = weights_of(program, [site], self.name).float()
        if self.bits == FLOAT:
            return AddedWeight(base, self.rank, self.factor, seed)
        grid = self._grid(width_of(program, site, self.bits))
        scales, offsets = first_levels(base, grid, self.begin, energy)
        how = (self.rank, self.factor, self.domain, False, self.relative, seed)
        return trained_codes(base, grid, scales, offsets, *how)

    def _energies(self, walked: Step, sites: Sequence[LinearSite]) -> dict[str, Tensor]:
        """Return the sum of squares of each input of the float model's linears, [K], by site."""
        inputs = {str(site.node.args[0]): torch.zeros(site.inputs) for site in sites}

        def add(total: Tensor, x: Tensor) -> None:
            total += x.flatten(0, -2).square().sum(0)

        walked.observe_float({name: partial(add, total) for name, total in inputs.items()})
        return {site.name: inputs[str(site.node.args[0])] for site in sites}
