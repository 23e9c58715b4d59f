"""The linears of a block as training rounds them, and how what it found is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ir.analysis import LinearSite, matches
from ir.program import Program
from passes.base import Context
from passes.sites import figures
from passes.solved import Solved
from passes.training.low_rank import Added, AddedWeight
from passes.training.trained_codes import (
    BASE,
    DOWN,
    OFFSETS,
    SCALES,
    UP,
    Bound,
    TrainedCodes,
    flipped,
)
from passes.training.trained_planes import BoundPlanes, TrainedPlanes

Rounded = TrainedCodes | TrainedPlanes
Weight = Rounded | AddedWeight


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

    def rates(self, rates: Rates, frozen: Sequence[str] = ()) -> dict[str, float]:
        """Return the learning rate of each part of the state; frozen: patterns of sites whose scales alone move."""
        found = {}
        for site, weight in self._pairs():
            still = any(matches(pattern, site.name) for pattern in frozen)
            for part in weight.start():
                kept = still and part not in (SCALES, OFFSETS)
                found[f"{site.weight}/{part}"] = 0.0 if kept else rates.of(part)
        return found

    def params(self, state: Mapping[str, Tensor]) -> dict[str, Bound | BoundPlanes | Added]:
        """Return the weights under a state."""
        return {site.weight: weight.bound(state_of(state, site)) for site, weight in self._pairs()}

    def solved(self, floats: Program, state: Mapping[str, Tensor]) -> dict[str, Solved]:
        """Return the weights under a state as they are stored, by the node's name.

        floats: the program that has the weights before training, from which errors are told.
        """
        found = {}
        for site, weight in self._pairs():
            assert not isinstance(weight, AddedWeight)
            codes, first = weight.stored(state_of(state, site)), weight.stored(weight.start())
            error = _relative(floats.params.get(site.weight), codes.dequantize())
            row = figures(codes.stored_bits, site.rows, site.inputs, error)
            found[site.node.name] = Solved(site, codes, {**row, "changed_codes": flipped(first, codes)})
        return found

    def settled(self, state: Mapping[str, Tensor], **how: Any) -> TrainedSites:
        """Return the weights under a state as the start of other training, codes as they are; how: as for weights."""
        weights, seed = list[Rounded](), how.pop("seed", 0)
        for place, (site, weight) in enumerate(self._pairs()):
            assert not isinstance(weight, AddedWeight)
            weights.append(weight.settled(state_of(state, site), seed=seed + place, **how))
        return TrainedSites(self.sites, tuple(weights))

    def merge(self, program: Program, state: Mapping[str, Tensor], by: str, ctx: Context) -> None:
        """Put weights that are not rounded in place, their additions merged."""
        for site, weight in self._pairs():
            assert isinstance(weight, AddedWeight)
            program.params.put(site.weight, weight.merged(state_of(state, site)), by)
            ctx.log.report(site=site.name, rank=float(weight.rank))

    def round_in(self, program: Program, state: Mapping[str, Tensor], by: str) -> None:
        """Put the weights under a state in place as floats, for what reads them next."""
        for site, weight in self._pairs():
            assert not isinstance(weight, AddedWeight)
            with torch.no_grad():
                program.params.put(site.weight, weight.bound(state_of(state, site)).dense(), by)

    def _pairs(self) -> list[tuple[LinearSite, Weight]]:
        return list(zip(self.sites, self.weights, strict=True))


def state_of(state: Mapping[str, Tensor], site: LinearSite) -> dict[str, Tensor]:
    """Return a site's part of the state."""
    names = ((part, f"{site.weight}/{part}") for part in (SCALES, OFFSETS, DOWN, UP, BASE))
    return {part: state[name] for part, name in names if name in state}


def all_rates(parts: Sequence[TrainedSites], rates: Rates, frozen: Sequence[str] = ()) -> dict[str, float]:
    """Return the learning rate of each part of the state of several blocks."""
    return {name: rate for part in parts for name, rate in part.rates(rates, frozen).items()}


def _relative(weight: Tensor, found: Tensor) -> float:
    """Return the energy of the difference relative to the weight's."""
    off, whole = (x.double().square().sum() for x in (weight - found, weight))
    return float(off / whole.clamp(min=torch.finfo(torch.float64).tiny))
