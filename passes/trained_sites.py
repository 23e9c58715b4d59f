"""The linears of a block as training rounds them, and how what it found is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.analysis import LinearSite
from ir.ops.quant import QuantCodes
from ir.program import Program
from passes.base import Context
from passes.sites import figures, put_quant_codes, put_shift_codes
from passes.training.low_rank import Added, AddedWeight
from passes.training.trained_codes import BASE, DOWN, OFFSETS, SCALES, UP, Bound, TrainedCodes, flipped

Weight = TrainedCodes | AddedWeight


@dataclass(frozen=True)
class Rates:
    """Learning rates: of scales and offsets relative to the scales at the start, of additions, and of whole weights."""

    scales: float
    added: float = 0.0
    whole: float = 0.0

    def of(self, part: str) -> float:
        """Return the rate of a part of a weight's state."""
        return {SCALES: self.scales, OFFSETS: self.scales, DOWN: self.added, UP: self.added, BASE: self.whole}[part]


@dataclass(frozen=True, eq=False)
class TrainedSites:
    """Linears of a block and their weights in training, in the same order."""

    sites: tuple[LinearSite, ...]
    weights: tuple[Weight, ...]

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the weights."""
        return tuple(site.weight for site in self.sites)

    def start(self) -> dict[str, Tensor]:
        """Return the state under which each weight is its base, rounded."""
        return {f"{site.weight}/{part}": t for site, w in self._pairs() for part, t in w.start().items()}

    def rates(self, rates: Rates) -> dict[str, float]:
        """Return the learning rate of each part of the state."""
        return {name: rates.of(name.rpartition("/")[2]) for name in self.start()}

    def params(self, state: Mapping[str, Tensor]) -> dict[str, Bound | Added]:
        """Return the weights under a state."""
        return {site.weight: weight.bound(state_of(state, site)) for site, weight in self._pairs()}

    def put(self, program: Program, state: Mapping[str, Tensor], by: str, ctx: Context) -> None:
        """Store the weights under a state in the program, and report how far each is from its base."""
        for site, weight in self._pairs():
            own = state_of(state, site)
            if isinstance(weight, AddedWeight):
                program.params.put(site.weight, weight.merged(own), by)
                ctx.log.report(site=site.name)
                continue
            codes, first = weight.stored(own), weight.stored(weight.start())
            error = _relative(program.params.get(site.weight), codes.dequantize())
            if isinstance(codes, QuantCodes):
                put_quant_codes(program, site, codes, by)
            else:
                put_shift_codes(program, site, codes, by)
            row = figures(codes.stored_bits, site.rows, site.inputs, error)
            ctx.log.report(site=site.name, **row, changed_codes=flipped(first, codes))

    def _pairs(self) -> list[tuple[LinearSite, Weight]]:
        return list(zip(self.sites, self.weights, strict=True))


def state_of(state: Mapping[str, Tensor], site: LinearSite) -> dict[str, Tensor]:
    """Return a site's part of the state."""
    names = ((part, f"{site.weight}/{part}") for part in (SCALES, OFFSETS, DOWN, UP, BASE))
    return {part: state[name] for part, name in names if name in state}


def all_rates(parts: Sequence[TrainedSites], rates: Rates) -> dict[str, float]:
    """Return the learning rate of each part of the state of several blocks."""
    return {name: rate for part in parts for name, rate in part.rates(rates).items()}


def _relative(weight: Tensor, found: Tensor) -> float:
    """Return the energy of the difference relative to the weight's."""
    off, whole = (x.double().square().sum() for x in (weight - found, weight))
    return float(off / whole.clamp(min=torch.finfo(torch.float64).tiny))
