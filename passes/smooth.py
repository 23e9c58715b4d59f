"""`smooth`: scales that take outliers out of activations and into weights (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, fx

from ir.program import Program
from passes import stream
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, annotate
from passes.peaks import extremes, keeping, smoothing_scales

Site = Literal["norm->linears", "v->o", "up->down", "fc1->fc2"]


@dataclass(frozen=True)
class Smooth(Pass):
    """Leave scales for `fold` that balance the largest activations against the largest weights of each channel.

    Source: SmoothQuant (2211.10438, eq. 4).
    """

    alpha: float = field(default=0.5, metadata={"help": "share of the range that moves from activations to weights"})
    sites: tuple[Site, ...] = field(default=("norm->linears",), metadata={"help": "kinds of groups to scale"})

    name: ClassVar[str] = "smooth"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.TRANSFORM
    order_reason: ClassVar[str] = "smooth leaves scales that fold consumes"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"smoothed"})
    data: ClassVar[Calib | None] = Calib("float")
    exact: ClassVar[bool] = True

    def validate(self) -> None:
        """Raise OptionError for an alpha outside 0 to 1."""
        if not 0 <= self.alpha <= 1:
            raise OptionError(self.name, "alpha", f"{self.alpha} is not between 0 and 1", fix="use 0.5, the default")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return a row per group that would get scales."""
        return [PlanRow(g.site, f"smooth {g.kind}") for g in discover(program).of(*self.sites)]

    def run(self, program: Program, ctx: Context) -> None:
        """Observe the inputs of all sinks in one walk over the calibration set, then solve each group."""
        found = discover(program)
        groups = found.of(*self.sites)
        for absence in found.absences:
            if absence.kind in self.sites:
                ctx.log.skip(absence.site, absence.reason)
        nodes = {node.name: node for node in program.graph.nodes}
        inputs = dict.fromkeys(x for g in groups for x in _inputs(g, nodes))
        peaks = _observe_peaks(program, ctx, inputs)
        for group in groups:
            missing = [x.name for x in _inputs(group, nodes) if x not in peaks]
            if missing:
                ctx.log.skip(group.site, f"calibration never reaches {', '.join(missing)}")
                continue
            reads = {slot.node: nodes[slot.node].args[0] for slot in group.sinks}
            s = smoothing_scales(*extremes(program, group, reads, peaks), self.alpha)
            annotate(program, group, s, self.name)
            ctx.log.report(site=group.site, smallest=float(s.min()), largest=float(s.max()))


def _inputs(group: EquivGroup, nodes: Mapping[str, fx.Node]) -> list[fx.Node]:
    values = (nodes[slot.node].args[0] for slot in group.sinks if slot.axis == "cols")
    return list(dict.fromkeys(x for x in values if isinstance(x, fx.Node)))


def _observe_peaks(program: Program, ctx: Context, inputs: Mapping[fx.Node, None]) -> dict[fx.Node, Tensor]:
    """Return the largest magnitude per channel, over all tokens of the calibration set, of each value it reaches."""
    peaks: dict[fx.Node, Tensor] = {}
    if inputs:
        stream.observe(program, ctx, {node: keeping(node, peaks) for node in inputs}, "smooth")
    return peaks
