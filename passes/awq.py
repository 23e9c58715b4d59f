"""`awq`: scales that let the weights of strong activations be rounded more finely (AWQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ir.analysis import Block
from ir.program import Program, tensor_type_of
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, TieMap, annotate
from passes.equiv.transfer import expand
from passes.quantize.hessian import Gram, empty_gram, update
from passes.quantize.salience import relative_loss, row_energy
from passes.quantize.uniform import rtn
from passes.sites import choose_sites
from passes.smooth import Site
from passes.stream import Step, walk

# No channel is taken to be weaker than this share of the strongest: a scale of its own size would undo the others.
_FLOOR = 1e-4


@dataclass
class _Inputs:
    """What a group's sinks read: its Gram matrix, and the sum of magnitudes of each channel."""

    gram: Gram
    magnitude: Tensor

    def add(self, x: Tensor) -> None:
        update(self.gram, x)
        self.magnitude += x.detach().abs().flatten(0, -2).sum(0, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class _Sink:
    """A weight of a group: float64 [N, K], what its channels follow, and the energy of its output by row."""

    weight: Tensor
    tie: TieMap
    gram: Gram
    energy: Tensor


@dataclass(frozen=True)
class Awq(Pass):
    """Leave scales for `fold`, found by search, under which rounded weights lose least of their outputs.

    Source: AWQ (2306.00978, section 3.2, eq. 4 and 5); with the ratio to the weights that later releases search too.
    """

    bits: int = field(default=4, metadata={"help": "width that weights are rounded to in the search, 2 to 8"})
    group: int = field(default=64, metadata={"help": "inputs that share a scale there"})
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
        for option, low, high in (("bits", 2, 8), ("group", 1, 1 << 20), ("steps", 1, 1000)):
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
        done: set[str] = set()
        scales: list[tuple[EquivGroup, Tensor]] = []
        for step in walk(program, ctx, "float", self.name):
            own = {group.site: group for group in groups if _inputs(group, step.block)}
            done |= own.keys()
            scales += self._search_block(program, list(own.values()), step, ctx)
        for group in groups:
            if group.site not in done:
                ctx.log.skip(group.site, "its consumers are in no repeated block")
        for group, s in scales:
            annotate(program, group, s, self.name)

    def _search_block(
        self, program: Program, groups: Sequence[EquivGroup], step: Step, ctx: Context
    ) -> list[tuple[EquivGroup, Tensor]]:
        """Return the scales of groups whose consumers are in a block."""
        wanted = dict.fromkeys(x for group in groups for x in _inputs(group, step.block).values())
        seen = {x: _Inputs(empty_gram(width), torch.zeros(width, dtype=torch.float64)) for x, width in _widths(wanted)}
        step.observe_float({x.name: known.add for x, known in seen.items()})
        coded = {site.node.name for site in choose_sites(program, step.block.nodes, (), Context())}
        scales = []
        for group in groups:
            reads = _inputs(group, step.block)
            sinks = [slot for slot in group.sinks if slot.node in coded and slot.node in reads]
            known = [seen[reads[slot.node]] for slot in sinks]
            if not any(bool(k.gram.matrix.diagonal().any()) for k in known):
                ctx.log.skip(group.site, "no linear that will be rounded reads anything but zeros there")
                continue
            weights = [program.params.get(slot.weight).flatten(0, -2).double() for slot in sinks]
            problem = [
                _Sink(w, slot.tie, k.gram, row_energy(w, k.gram))
                for w, slot, k in zip(weights, sinks, known, strict=True)
            ]
            strength = tied_mean([(slot.tie, k.magnitude) for slot, k in zip(sinks, known, strict=True)], group.size)
            s, before, after = self._search(problem, strength, group.size)
            ctx.log.report(site=group.site, loss_before=before, loss_after=after, largest=float(s.max() / s.min()))
            scales.append((group, s))
        return scales

    def _search(self, sinks: Sequence[_Sink], strength: Tensor, size: int) -> tuple[Tensor, float, float]:
        """Return the best scales [size], and the loss without and with them."""
        typical = tied_mean([(sink.tie, _typical(sink.weight, self.group)) for sink in sinks], size)
        ones = torch.ones(size, dtype=torch.float64)
        best, before = ones, self._loss(sinks, ones)
        least = before
        for s in candidates(strength, typical, self.steps):
            loss = self._loss(sinks, s)
            if loss < least:
                best, least = s, loss
        return best, before, least

    def _loss(self, sinks: Sequence[_Sink], s: Tensor) -> float:
        """Return the sum of the sinks' relative output errors with inputs divided and weights multiplied by s."""
        total = 0.0
        for sink in sinks:
            cols = expand(sink.tie, s)
            rounded = rtn(sink.weight * cols, self.bits, self.group, self.symmetric).dequantize().double() / cols
            total += relative_loss(row_energy(sink.weight - rounded, sink.gram), sink.energy)
        return total


def candidates(strength: Tensor, typical: Tensor, steps: int) -> list[Tensor]:
    """Return scales to try: a^r, and a^r / w^(1-r), for exponents r, each centred on 1 (AWQ eq. 5).

    strength: a, mean |x| per free parameter; typical: w, mean share of the largest weight of a group.
    """
    a = (strength / strength.max()).clamp(min=_FLOOR)
    w = typical.clamp(min=_FLOOR)
    tried = []
    for i in range(steps):
        r = i / steps
        tried += [a**r, a**r / w ** (1 - r)]
    return [s / (s.max() * s.min()).sqrt() for s in tried]


def tied_mean(channels: Sequence[tuple[TieMap, Tensor]], size: int) -> Tensor:
    """Return the mean over the tied channels of all the values given, per free parameter, 0 where there is none."""
    total, count = torch.zeros(2, size, dtype=torch.float64)
    for tie, values in channels:
        touched = tie.index >= 0
        total.index_add_(0, tie.index[touched], values[touched].double())
        count.index_add_(0, tie.index[touched], torch.ones(int(touched.sum()), dtype=torch.float64))
    mean: Tensor = total / count.clamp(min=1)
    return mean


def _typical(weight: Tensor, group: int) -> Tensor:
    """Return each input's mean share of the largest weight in its row's group, [K]."""
    inputs = weight.shape[1]
    size = weight.abs()
    padded = torch.nn.functional.pad(size, (0, -inputs % group)).unflatten(1, (-1, group))
    top = padded.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    shares: Tensor = (padded / top).flatten(1)[:, :inputs]
    return shares.mean(0)


def _inputs(group: EquivGroup, block: Block) -> dict[str, fx.Node]:
    """Return what the group's consumers in a block read, by the consumer's name."""
    nodes: Mapping[str, fx.Node] = {node.name: node for node in block.nodes}
    sinks = [nodes[slot.node] for slot in group.sinks if slot.axis == "cols" and slot.node in nodes]
    return {node.name: node.args[0] for node in sinks if isinstance(node.args[0], fx.Node)}


def _widths(values: Mapping[fx.Node, None]) -> list[tuple[fx.Node, int]]:
    return [(value, int(tensor_type_of(value).dims[-1])) for value in values]
