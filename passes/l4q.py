"""`l4q`: weights with a low-rank addition, rounded in every step of training, so that the sum ends as codes (L4Q)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from torch import fx

from ir.analysis import LinearSite, blocks
from ir.errors import UnsupportedError
from ir.ops.tokens import CODING
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.coded_values import code_values
from passes.presets import FLOAT
from passes.sites import check_group, check_patterns, check_skip, choose_sites, outside_blocks
from passes.solved import put_solved
from passes.sparsify.masks import pattern_at
from passes.stream import Step, by_rows
from passes.training.begin import Start, base_of, begun_sites, planned_sites
from passes.training.blocks import BlockCourse, trained_block
from passes.training.events import report_outcome
from passes.training.loop import Problem, Recipe
from passes.training.low_rank import AddedWeight
from passes.training.problems import WholeLoss
from passes.training.sites import Rates, TrainedSites
from passes.training.staged import WholeCourse, figures_of, staged_problem, trained_stages
from passes.training.trained_codes import Grid, Offset, Place
from passes.widths import width_of

# Share of the learning rates at the end of each block's training.
_WARM_END = 0.05


@dataclass(frozen=True)
class L4q(Pass):
    """Train low-rank additions to weights and the scales that the sums are rounded by, end to end.

    Source: L4Q (2402.04902); `domain=code` as in LR-QAT (2406.06385), `domain=group` as in QA-LoRA
    (2309.14717) and with `rank=0` PEQA (2305.14152), `rank=0 whole` as in LSQ (1902.08153), and with
    values and outputs of attention frozen KD-QAT (2403.18159); without rounding it is LoRA (2106.09685).
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
    domain: Place = field(
        default="weight",
        metadata={
            "help": "what is added to: weights, their places among the levels (LR-QAT), or float offsets of groups, "
            "the codes staying (group: QA-LoRA; with rank=0 PEQA)"
        },
    )
    begin: Start = field(default="mse", metadata={"help": "the levels at the start; gptq: and the weights"})
    warm: int = field(default=0, metadata={"help": "epochs of whole weights before that, block by block as by blockap"})
    whole: bool = field(default=False, metadata={"help": "train whole weights end to end as well (rank=0 whole: LSQ)"})
    weight_rate: float = field(default=1e-4, metadata={"help": "learning rate of whole weights"})
    frozen: tuple[str, ...] = field(
        default=(), metadata={"help": "sites of which scales alone are trained end to end, `*` stands for any text"}
    )
    act: int = field(default=FLOAT, metadata={"help": "bits of what linears read, 2 to 8; 16 leaves it in float"})
    kv: int = field(default=FLOAT, metadata={"help": "bits of the key/value cache, likewise"})
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
        metadata={"help": "run blocks and round again on the way back: more work, memory for one block only"},
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "l4q"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    order_reason: ClassVar[str] = "it ends in codes, which later passes only tune"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    data: ClassVar[Calib | None] = Calib("both", gradients=True, original=True, tokens=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training or codes cannot have."""
        if self.bits not in (FLOAT, *range(2, 9)):
            raise OptionError(self.name, "bits", f"{self.bits} is neither 2..8 nor {FLOAT}")
        if self.bits == FLOAT and not self.rank:
            raise OptionError(self.name, "rank", "without rounding and addition there is nothing to train")
        for option in ("act", "kv"):
            if getattr(self, option) not in (FLOAT, *range(2, 9)):
                raise OptionError(self.name, option, f"{getattr(self, option)} is neither 2..8 nor {FLOAT}")
        for option in ("warm", "whole"):
            if self.bits == FLOAT and getattr(self, option):
                raise OptionError(self.name, option, "without rounding additions alone are trained")
        if self.domain == "group" and (self.whole or (self.rank and self.offset != "float")):
            why = "codes stay, and additions need offset=float" if self.rank else "codes stay, so weights do not move"
            raise OptionError(self.name, "domain", why, fix="give offset=float, and leave whole out")
        counts = [(name, 0, 10**6) for name in ("epochs", "warm", "rank")]
        shares = [(name, 0, 1) for name in ("rate", "weight_rate", "scale_rate", "last_rate", "warmup")]
        others = (("group", 1, 1 << 20), ("terms", 0, 3), ("batch", 1, 10**6))
        for option, low, high in (*counts, *shares, *others):
            if not low <= getattr(self, option) <= high:
                raise OptionError(self.name, option, f"{getattr(self, option)} is outside {low}..{high}")

    def inserts(self) -> frozenset[str]:
        """Return the operators that code tokens, where activations or caches are to be."""
        return CODING if min(self.act, self.kv) < FLOAT else frozenset()

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        sites = self._all_sites(program, Context())
        if self.bits == FLOAT:
            return [PlanRow(site.name, "train an addition of low rank, and merge it") for site in sites]
        grids = [self._grid(width_of(program, site, self.bits)) for site in sites]
        return planned_sites(program, sites, grids, self.name)

    def facts_after(self, facts: frozenset[str]) -> frozenset[str]:
        """Return the facts that hold after the pass."""
        return facts if self.bits == FLOAT else facts | {"quant-weights"}

    def run(self, program: Program, ctx: Context) -> None:
        """Train; the run is kept after every epoch in `ctx.work`, and taken from there on a resumed run."""
        check_skip(program, self.skip, self.name)
        if not self._all_sites(program, ctx):
            raise UnsupportedError("there is no linear to train", where=program.name)
        outside_blocks(program, _nodes(program), self.skip, ctx)
        rows, floats = by_rows(ctx, self.batch), program.clone()
        code_values(program, self.act, self.kv, self.skip, ctx)
        rows = replace(rows, original=rows.original or floats)
        parts, problem = self.problem(program, rows)
        outcome = trained_stages(problem, rows, self.name, self._course())
        report_outcome(ctx, program.name, outcome)
        ctx.log.report(site=program.name, **figures_of(outcome))
        for part in parts:
            if self.bits == FLOAT:
                part.merge(program, outcome.state, self.name, ctx)
                continue
            for row in part.solved(floats, outcome.state).values():
                put_solved(program, row, self.name, ctx)

    def problem(self, program: Program, ctx: Context) -> tuple[list[TrainedSites], Problem]:
        """Return the weights of all blocks as they are trained end to end, and that training.

        Blocks that are to be trained before are trained here, and the program's weights are then rounded ones.
        """
        both = self.bits != FLOAT and (self.warm > 0 or self.begin == "gptq")
        return staged_problem(program, ctx, self.name, partial(self._part, program), both, self._course())

    def _course(self) -> WholeCourse:
        rates = Rates(self.scale_rate, self.rate, self.weight_rate)
        recipe = Recipe(self.epochs, self.last_rate, warmup=self.warmup)
        return WholeCourse(self.loss, rates, recipe, self.recompute, self.frozen)

    def _part(self, program: Program, walked: Step, ctx: Context) -> TrainedSites:
        """Return a block's weights as they are trained end to end, after training them in their block where asked."""
        sites = choose_sites(program, walked.block.nodes, self.skip, Context())
        seed = ctx.seed + 1000 * walked.block.index
        if self.bits == FLOAT:
            bases = [base_of(program, site, self.name) for site in sites]
            added = (AddedWeight(b, self.rank, self.factor, seed + i) for i, b in enumerate(bases))
            return TrainedSites(tuple(sites), tuple(added))
        grids = [self._grid(width_of(program, site, self.bits)) for site in sites]
        addition = {"rank": self.rank, "factor": self.factor, "domain": self.domain}
        how: dict[str, Any] = {**addition, "whole": self.whole, "relative": self.relative, "seed": seed}
        how["keep"] = not self.recompute
        if not self.warm or not sites:
            found = begun_sites(program, walked, sites, grids, self.begin, self.name, **how)
            if self.begin == "gptq":
                found.round_in(program, found.start(), self.name)
            return found
        whole = begun_sites(
            program, walked, sites, grids, self.begin, self.name, whole=True, relative=self.relative, keep=True
        )
        course = BlockCourse(self.warm, Rates(self.scale_rate, whole=self.weight_rate), _WARM_END, "token")
        state = trained_block(whole, walked, course, ctx)
        whole.round_in(program, state, self.name)
        return whole.settled(state, **how)

    def _all_sites(self, program: Program, ctx: Context) -> list[LinearSite]:
        sites = choose_sites(program, _nodes(program), self.skip, ctx)
        check_patterns([site.name for site in sites], self.frozen, self.name)
        if self.bits != FLOAT:
            check_group(sites, self.group, self.name)
        for site in sites:
            if self.rank and pattern_at(program, site) is not None and (self.bits == FLOAT or self.domain == "group"):
                option, what = ("bits", "merged") if self.bits == FLOAT else ("domain", "to offsets")
                why = f"{site.name} has a mask, and an addition {what} would fill what it drops"
                raise OptionError(self.name, option, why, fix="round weights, in the domain weight or code")
            if self.rank > min(site.rows, site.inputs):
                why = f"{self.rank} is more than {site.name} with {site.rows} rows and {site.inputs} inputs can have"
                raise OptionError(self.name, "rank", why)
        return sites

    def _grid(self, bits: int) -> Grid:
        return Grid(bits, self.group, self.offset, self.terms)


def _nodes(program: Program) -> list[fx.Node]:
    return [node for block in blocks(program) for node in block.nodes]
