"""`rabit`: whole weights trained as planes of signs, each of what the planes before it leave (RaBiT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor, fx

from ir.analysis import LinearSite, blocks
from ir.errors import UnsupportedError
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.quantize.planes import fitted_scales
from passes.sites import check_group, check_skip, choose_sites, outside_blocks
from passes.solved import put_solved
from passes.stream import Step, by_rows
from passes.training.begin import base_of, input_energies
from passes.training.blocks import BlockCourse, trained_block
from passes.training.events import report_outcome
from passes.training.loop import Recipe
from passes.training.problems import WholeLoss
from passes.training.sites import Rates, TrainedSites
from passes.training.staged import WholeCourse, figures_of, staged_problem, trained_stages
from passes.training.trained_planes import Planes, TrainedPlanes

# Share of the learning rates at the end of each block's training.
_WARM_END = 0.05


@dataclass(frozen=True)
class Rabit(Pass):
    """Train weights and the scales of their planes of signs, block by block and then end to end.

    One weight makes all its planes, the next always the signs of what is left, so that planes cannot grow alike.
    Source: RaBiT (2602.05367), whose column factors are what the pass `svid` leaves for `fold`.
    """

    planes: int = field(default=2, metadata={"help": "planes of signs, 1 to 4"})
    group: int = field(
        default=0, metadata={"help": "inputs that share the scales of a row; must divide every input; 0: whole rows"}
    )
    terms: int = field(
        default=0, metadata={"help": "powers of two a scale is a sum of, 1 to 3; 0 takes it as it is, in float16"}
    )
    warm: int = field(default=2, metadata={"help": "epochs block by block, before all blocks are trained together"})
    epochs: int = field(default=1, metadata={"help": "epochs end to end"})
    loss: WholeLoss = field(default="kl", metadata={"help": "towards the float model's predictions, or the text"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=1e-4, metadata={"help": "learning rate of weights"})
    scale_rate: float = field(default=1e-3, metadata={"help": "learning rate of scales, relative to their size"})
    last_rate: float = field(default=0.1, metadata={"help": "share of the rates at the end of their cosine"})
    warmup: float = field(default=0.1, metadata={"help": "share of all steps over which the rates rise from zero"})
    recompute: bool = field(
        default=True, metadata={"help": "run blocks again on the way back: more work, memory for one block only"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "rabit"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    order_reason: ClassVar[str] = "it ends in planes of signs, which later passes only tune"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset({"masks"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True, original=True, tokens=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training or planes cannot have."""
        counts = (("planes", 1, 4), ("group", 0, 1 << 20), ("terms", 0, 3), ("batch", 1, 10**6))
        more = tuple((name, 0, 10**6) for name in ("warm", "epochs"))
        shares = tuple((name, 0, 1) for name in ("rate", "scale_rate", "last_rate", "warmup"))
        for option, low, high in (*counts, *more, *shares):
            if not low <= getattr(self, option) <= high:
                raise OptionError(self.name, option, f"{getattr(self, option)} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their planes will take."""
        rows = []
        for site in self._all_sites(program, Context()):
            weights, size = site.rows * site.inputs, self._form(site).stored_bytes(site.rows, site.inputs)
            figures = {"bits": 8 * size / weights, "bytes": float(size), "weights": float(weights)}
            rows.append(PlanRow(site.name, self.name, figures))
        return rows

    def run(self, program: Program, ctx: Context) -> None:
        """Train; finished blocks and epochs are kept in `ctx.work`, and taken from there on a resumed run."""
        check_skip(program, self.skip, self.name)
        if not self._all_sites(program, ctx):
            raise UnsupportedError("there is no linear to train", where=program.name)
        outside_blocks(program, _nodes(program), self.skip, ctx)
        rows, floats = by_rows(ctx, self.batch), program.clone()
        recipe = Recipe(self.epochs, self.last_rate, warmup=self.warmup)
        course = WholeCourse(self.loss, Rates(self.scale_rate, whole=self.rate), recipe, self.recompute)
        parts, problem = staged_problem(program, rows, self.name, partial(self._part, program), self.warm > 0, course)
        outcome = trained_stages(problem, rows, self.name, course)
        report_outcome(ctx, program.name, outcome)
        ctx.log.report(site=program.name, **figures_of(outcome))
        for part in parts:
            for row in part.solved(floats, outcome.state).values():
                put_solved(program, row, self.name, ctx)

    def _part(self, program: Program, walked: Step, ctx: Context) -> TrainedSites:
        """Return a block's weights as they are trained end to end, after training them in their block where asked."""
        sites = choose_sites(program, walked.block.nodes, self.skip, Context())
        if not sites:
            return TrainedSites((), ())
        energies = input_energies(walked, sites)
        weights = [self._begun(base_of(program, site, self.name), site, energies[site.name]) for site in sites]
        found = TrainedSites(tuple(sites), tuple(weights))
        if not self.warm:
            return found
        course = BlockCourse(self.warm, Rates(self.scale_rate, whole=self.rate), _WARM_END, "token")
        state = trained_block(found, walked, course, ctx)
        found.round_in(program, state, self.name)
        return found.settled(state)

    def _begun(self, base: Tensor, site: LinearSite, energy: Tensor) -> TrainedPlanes:
        form = self._form(site)
        scales = fitted_scales(base.unflatten(1, (-1, form.group)), form.planes, energy.view(-1, form.group))
        return TrainedPlanes(base, form, scales)

    def _form(self, site: LinearSite) -> Planes:
        return Planes(self.planes, self.group or site.inputs, self.terms)

    def _all_sites(self, program: Program, ctx: Context) -> list[LinearSite]:
        sites: Sequence[LinearSite] = choose_sites(program, _nodes(program), self.skip, ctx)
        if self.group:
            check_group(sites, self.group, self.name)
        return list(sites)


def _nodes(program: Program) -> list[fx.Node]:
    return [node for block in blocks(program) for node in block.nodes]
