"""`awq`: scales that let the weights of strong activations be rounded more finely (AWQ)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, annotate
from passes.scale_search import SearchSpec, reads, search_block
from passes.smooth import Site
from passes.stream import walk


@dataclass(frozen=True)
class Awq(Pass):
    """Leave scales for `fold`, found by search, under which rounded weights lose least of their outputs.

    Source: AWQ (2306.00978, section 3.2, eq. 4 and 5); with the ratio to the weights that later releases search too.
    """

    bits: int = field(default=4, metadata={"help": "width that weights are rounded to in the search, 2 to 8"})
    group: int = field(default=64, metadata={"help": "inputs that share a scale there, 0 for whole rows"})
    symmetric: bool = field(default=False, metadata={"help": "a range around zero there"})
    sites: tuple[Site, ...] = field(
        default=("norm->linears", "v->o", "up->down"), metadata={"help": "kinds of groups to scale"}
    )
    steps: int = field(default=20, metadata={"help": "exponents tried, from 0 up to 1"})

    name: ClassVar[str] = "awq"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.TRANSFORM
    order_reason: ClassVar[str] = "awq leaves scales that fold consumes"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"smoothed"})
    data: ClassVar[Calib | None] = Calib("float")
    exact: ClassVar[bool] = True

    def validate(self) -> None:
        """Raise OptionError for values the search cannot use."""
        for option, low, high in (("bits", 2, 8), ("group", 0, 1 << 20), ("steps", 1, 1000)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return a row per group that would get scales."""
        return [PlanRow(g.site, f"awq {g.kind}") for g in discover(program).of(*self.sites)]

    def run(self, program: Program, ctx: Context) -> None:
        """Search block by block on the float stream; scales are left once all blocks have been seen."""
        found = discover(program)
        for absence in found.absences:
            if absence.kind in self.sites:
                ctx.log.skip(absence.site, absence.reason)
        groups = found.of(*self.sites)
        spec, done = SearchSpec(self.bits, self.group, self.symmetric, self.steps), set[str]()
        scales: list[tuple[EquivGroup, Tensor]] = []
        for step in walk(program, ctx, "float", self.name):
            own = {group.site: group for group in groups if reads(group, step.block)}
            done |= own.keys()
            scales += search_block(program, list(own.values()), step, spec, ctx)
        for group in groups:
            if group.site not in done:
                ctx.log.skip(group.site, "its consumers are in no repeated block")
        for group, s in scales:
            annotate(program, group, s, self.name)
