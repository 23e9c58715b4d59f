"""`osplus`: shifts and scales that take the outliers of few channels out of activations (Outlier Suppression+)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ir.ops.tokens import rounded
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, TieMap, annotate
from passes.equiv.transfer import expand
from passes.peaks import tied_maximum
from passes.quantize.uniform import rtn
from passes.scale_search import reads
from passes.smooth import Site
from passes.stream import Step, walk

# Tokens of every batch that the search compares outputs on.
_SAMPLED = 64


@dataclass
class _Inputs:
    """What a group's sinks read: the least and the greatest of each channel, and some tokens."""

    low: Tensor
    high: Tensor
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2)
        self.low, self.high = torch.minimum(self.low, flat.amin(0)), torch.maximum(self.high, flat.amax(0))
        self.tokens.append(flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].clone())


@dataclass(frozen=True, eq=False)
class _Sink:
    """A weight of a group [N, K], what its channels follow, some of its inputs [T, K], and the energy of its output."""

    weight: Tensor
    tie: TieMap
    inputs: Tensor
    energy: float


@dataclass(frozen=True)
class Osplus(Pass):
    """Leave shifts and scales for `fold` that centre channels and cut those beyond a searched bound down to it.

    Source: Outlier Suppression+ (2304.09145, section 3.2): the shift is the middle of a channel's range, eq. 2, and
    the scales follow from one bound for all channels, eq. 6, chosen by the error of the linears' outputs.
    """

    bits: int = field(default=8, metadata={"help": "width that weights are rounded to in the search, 2 to 8"})
    group: int = field(default=0, metadata={"help": "inputs that share a scale there, 0 for whole rows"})
    act: int = field(default=8, metadata={"help": "width that activations are rounded to in the search, 2 to 8"})
    shift: bool = field(default=True, metadata={"help": "centre channels where a shift is exact"})
    sites: tuple[Site, ...] = field(default=("norm->linears", "v->o", "up->down"), metadata={"help": "kinds of groups"})
    steps: int = field(default=20, metadata={"help": "bounds tried, from the largest activation down"})

    name: ClassVar[str] = "osplus"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.TRANSFORM
    order_reason: ClassVar[str] = "osplus leaves scales that fold consumes"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"smoothed"})
    data: ClassVar[Calib | None] = Calib("float")
    exact: ClassVar[bool] = True

    def validate(self) -> None:
        """Raise OptionError for values the search cannot use."""
        for option, low, high in (("bits", 2, 8), ("act", 2, 8), ("group", 0, 1 << 20), ("steps", 1, 1000)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return a row per group that would get scales."""
        return [PlanRow(g.site, f"osplus {g.kind}") for g in discover(program).of(*self.sites)]

    def run(self, program: Program, ctx: Context) -> None:
        """Search block by block on the float stream; scales are left once all blocks have been seen."""
        found = discover(program)
        for absence in found.absences:
            if absence.kind in self.sites:
                ctx.log.skip(absence.site, absence.reason)
        groups, done = found.of(*self.sites), set[str]()
        chosen: list[tuple[EquivGroup, Tensor, Tensor | None]] = []
        for step in walk(program, ctx, "float", self.name):
            own = [group for group in groups if reads(group, step.block)]
            done |= {group.site for group in own}
            chosen += self._block(program, own, step, ctx)
        for group in groups:
            if group.site not in done:
                ctx.log.skip(group.site, "its consumers are in no repeated block")
        for group, s, shift in chosen:
            annotate(program, group, s, self.name, shift)

    def _block(
        self, program: Program, groups: Sequence[EquivGroup], step: Step, ctx: Context
    ) -> list[tuple[EquivGroup, Tensor, Tensor | None]]:
        values = {x.name: x for group in groups for x in reads(group, step.block).values()}
        wide = {name: int(x.meta["type"].dims[-1]) for name, x in values.items()}
        seen = {n: _Inputs(torch.full((k,), torch.inf), torch.full((k,), -torch.inf)) for n, k in wide.items()}
        step.observe_float({name: known.add for name, known in seen.items()})
        chosen = []
        for group in groups:
            inputs = {node: seen[x.name] for node, x in reads(group, step.block).items()}
            low, high = _extremes(group, inputs)
            if not bool((low < high).any()):
                ctx.log.skip(group.site, "what its linears read never changes")
                continue
            shift = (low + high) / 2 if self.shift and "shift" in group.supports else None
            peak = torch.maximum(high, -low) if shift is None else (high - low) / 2
            s, before, after = self._search(_sinks(program, group, inputs), peak, shift)
            ctx.log.report(site=group.site, loss_before=before, loss_after=after, largest=float(s.max()))
            chosen.append((group, s, shift))
        return chosen

    def _search(self, sinks: Sequence[_Sink], peak: Tensor, shift: Tensor | None) -> tuple[Tensor, float, float]:
        """Return the best scales [size], and the loss without any change and with these."""
        ones, top = torch.ones_like(peak), float(peak.max())
        best, before = ones, self._loss(sinks, ones, None)
        least = self._loss(sinks, ones, shift)
        for i in range(1, self.steps):
            s = (peak / (top * (1 - i / self.steps))).clamp(min=1.0)
            loss = self._loss(sinks, s, shift)
            if loss < least:
                best, least = s, loss
        return best, before, least

    def _loss(self, sinks: Sequence[_Sink], s: Tensor, shift: Tensor | None) -> float:
        """Return the sum of the sinks' relative output errors with inputs and weights rounded."""
        total = 0.0
        for sink in sinks:
            scale = expand(sink.tie, s)
            moved = sink.inputs if shift is None else sink.inputs - expand(sink.tie, shift, 0.0)
            codes, zero, step = rounded(moved / scale, self.act, False)
            weight = rtn(sink.weight * scale, self.bits, self.group or len(scale)).dequantize()
            off = ((codes - zero) * step.to(codes.dtype)) @ weight.T - moved @ sink.weight.T
            total += float(off.square().sum()) / max(sink.energy, 1e-30)
        return total


def _extremes(group: EquivGroup, inputs: Mapping[str, _Inputs]) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest input of each free parameter's channels, 0 where nothing reads it."""
    low, high = torch.full((2, group.size), -torch.inf)
    for slot in group.sinks:
        if slot.node in inputs:
            known = inputs[slot.node]
            touched = torch.zeros(group.size).index_fill_(0, slot.tie.index[slot.tie.index >= 0], 1.0).bool()
            high = torch.where(touched, torch.maximum(high, _tied_top(slot.tie, known.high, group.size)), high)
            low = torch.where(touched, torch.maximum(low, _tied_top(slot.tie, -known.low, group.size)), low)
    return torch.where(low.isfinite(), -low, 0.0), torch.where(high.isfinite(), high, 0.0)


def _tied_top(tie: TieMap, channels: Tensor, size: int) -> Tensor:
    """Return the greatest of the tied channels per free parameter, negative ones included."""
    least = channels.min()
    return tied_maximum(tie, channels - least, size) + least


def _sinks(program: Program, group: EquivGroup, inputs: Mapping[str, _Inputs]) -> list[_Sink]:
    sinks = []
    for slot in group.sinks:
        weight = program.params.get(slot.weight).float()
        if slot.node in inputs and weight.dim() == 2:
            x = torch.cat(inputs[slot.node].tokens).float()
            sinks.append(_Sink(weight, slot.tie, x, float((x @ weight.T).square().sum())))
    return sinks
