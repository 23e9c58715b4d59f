"""Searching scales of equivalence groups under which rounded weights lose least of their outputs, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ir.analysis import Block
from ir.program import Program, tensor_type_of
from passes.base import Context
from passes.equiv.groups import EquivGroup, TieMap
from passes.equiv.transfer import expand
from passes.quantize.hessian import Gram, empty_gram, update
from passes.quantize.salience import relative_loss, row_energy
from passes.quantize.uniform import rtn
from passes.sites import choose_sites
from passes.stream import Step

# No channel is taken to be weaker than this share of the strongest: a scale of its own size would undo the others.
_FLOOR = 1e-4


@dataclass(frozen=True)
class SearchSpec:
    """How weights are rounded in the search, `group` inputs sharing a range, and how many exponents are tried."""

    bits: int
    group: int
    symmetric: bool
    steps: int

    def group_of(self, inputs: int) -> int:
        """Return the inputs that share a range, whole rows with a group of 0."""
        return self.group or inputs


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


def search_block(
    program: Program, groups: Sequence[EquivGroup], step: Step, spec: SearchSpec, ctx: Context
) -> list[tuple[EquivGroup, Tensor]]:
    """Return the scales of groups whose consumers are in a block, found on the float stream.

    A group that only reads zeros, or whose linears will not be rounded, is recorded as left alone.
    """
    wanted = dict.fromkeys(x for group in groups for x in reads(group, step.original_block).values())
    seen = {x: _Inputs(empty_gram(width), torch.zeros(width, dtype=torch.float64)) for x, width in _widths(wanted)}
    step.observe_float({x.name: known.add for x, known in seen.items()})
    coded = {site.node.name for site in choose_sites(program, step.block.nodes, (), Context())}
    scales = []
    for group in groups:
        inputs = reads(group, step.original_block)
        sinks = [slot for slot in group.sinks if slot.node in coded and slot.node in inputs]
        known = [seen[inputs[slot.node]] for slot in sinks]
        if not any(bool(k.gram.matrix.diagonal().any()) for k in known):
            ctx.log.skip(group.site, "no linear that will be rounded reads anything but zeros there")
            continue
        weights = [program.params.get(slot.weight).flatten(0, -2).double() for slot in sinks]
        problem = [
            _Sink(w, slot.tie, k.gram, row_energy(w, k.gram)) for w, slot, k in zip(weights, sinks, known, strict=True)
        ]
        strength = tied_mean([(slot.tie, k.magnitude) for slot, k in zip(sinks, known, strict=True)], group.size)
        s, before, after = _search(problem, strength, group.size, spec)
        ctx.log.report(site=group.site, loss_before=before, loss_after=after, largest=float(s.max() / s.min()))
        scales.append((group, s))
    return scales


def reads(group: EquivGroup, block: Block) -> dict[str, fx.Node]:
    """Return what the group's consumers in a block read, by the consumer's name; block: before any change."""
    nodes: Mapping[str, fx.Node] = {node.name: node for node in block.nodes}
    sinks = [nodes[slot.node] for slot in group.sinks if slot.axis == "cols" and slot.node in nodes]
    return {node.name: node.args[0] for node in sinks if isinstance(node.args[0], fx.Node)}


def _search(sinks: Sequence[_Sink], strength: Tensor, size: int, spec: SearchSpec) -> tuple[Tensor, float, float]:
    """Return the best scales [size], and the loss without and with them."""
    typical = tied_mean([(sink.tie, _typical(sink.weight, spec)) for sink in sinks], size)
    ones = torch.ones(size, dtype=torch.float64)
    best, before = ones, _loss(sinks, ones, spec)
    least = before
    for s in candidates(strength, typical, spec.steps):
        loss = _loss(sinks, s, spec)
        if loss < least:
            best, least = s, loss
    return best, before, least


def _loss(sinks: Sequence[_Sink], s: Tensor, spec: SearchSpec) -> float:
    """Return the sum of the sinks' relative output errors with inputs divided and weights multiplied by s."""
    total = 0.0
    for sink in sinks:
        cols = expand(sink.tie, s)
        group = spec.group_of(len(cols))
        rounded = rtn(sink.weight * cols, spec.bits, group, spec.symmetric).dequantize().double() / cols
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


def _typical(weight: Tensor, spec: SearchSpec) -> Tensor:
    """Return each input's mean share of the largest weight in its row's group, [K]."""
    inputs = weight.shape[1]
    group, size = spec.group_of(inputs), weight.abs()
    padded = torch.nn.functional.pad(size, (0, -inputs % group)).unflatten(1, (-1, group))
    top = padded.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    shares: Tensor = (padded / top).flatten(1)[:, :inputs]
    return shares.mean(0)


def _widths(values: Mapping[fx.Node, None]) -> list[tuple[fx.Node, int]]:
    return [(value, int(tensor_type_of(value).dims[-1])) for value in values]
