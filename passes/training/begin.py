"""Where the training of a block's linears through rounding begins: at levels laid by themselves, or at GPTQ's codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ir.analysis import LinearSite, sibling_sites
from ir.ops.nm import gather_kept, kept_inputs
from ir.ops.packing import unpack_bits
from ir.ops.quant import QuantCodes
from ir.program import Program
from passes.base import OptionError, PlanRow
from passes.gptq import Gptq
from passes.moments import moments_of
from passes.quantize.first_levels import Begin, first_levels
from passes.sites import mask_bytes, weights_of
from passes.sparsify.masks import kept_group, mask_of, pattern_at
from passes.sparsify.pattern import Pattern
from passes.stream import Step
from passes.training.sites import TrainedSites
from passes.training.trained_codes import Grid, TrainedCodes, trained_codes

Start = Begin | Literal["gptq"]


def begun_sites(
    program: Program,
    walked: Step,
    sites: Sequence[LinearSite],
    grids: Sequence[Grid],
    begin: Start,
    by: str,
    **how: Any,
) -> TrainedSites:
    """Return linears of a block as they are trained through rounding to grids.

    begin: as `first_levels` has it, or `gptq`; how: as `trained_codes` takes it; `seed` is that of the first linear.
    """
    if begin == "gptq":
        return _swept(program, walked, sites, grids, by, **how)
    energies = input_energies(walked, sites) if begin == "hessian" else {}
    weights, seed = [], how.pop("seed", 0)
    for place, (site, asked) in enumerate(zip(sites, grids, strict=True)):
        base, mask = base_of(program, site, by), mask_of(program, site)
        grid = under_pattern(asked, None if mask is None else mask.pattern, by)
        energy, seen = energies.get(site.name), base
        if mask is not None:
            seen = gather_kept(base, mask.kept)
            energy = None if energy is None else gather_kept(energy.expand(base.shape), mask.kept)
        levels = first_levels(seen, grid, begin, energy)
        weights.append(trained_codes(base, grid, *levels, seed=seed + place, mask=mask, **how))
    return TrainedSites(tuple(sites), tuple(weights))


def base_of(program: Program, site: LinearSite, by: str) -> Tensor:
    """Return a weight in float32, the one that is there where it can be; raises UnsupportedError unless finite."""
    weights_of(program, [site], by)
    return program.params.get(site.weight).float()


def under_pattern(grid: Grid, pattern: Pattern | None, by: str) -> Grid:
    """Return the grid of what a pattern keeps of a weight: as many inputs a group, levels around zero."""
    if pattern is None:
        return grid
    return replace(grid, group=kept_group(grid.group, pattern, by), offset="none")


def _swept(
    program: Program, walked: Step, sites: Sequence[LinearSite], grids: Sequence[Grid], by: str, **how: Any
) -> TrainedSites:
    """Return linears as they are trained on the levels that `gptq` finds on the compressed stream.

    A weight begins as what it had become when it was rounded, with the errors of others in it, so that its nearest code
    is GPTQ's and training knows how far it is from the next.
    """
    found: dict[str, TrainedCodes] = {}
    seed, places = how.pop("seed", 0), {site.node.name: i for i, site in enumerate(sites)}
    for group, known in moments_of(walked, sibling_sites(sites), True, False):
        for site in group:
            if mask_of(program, site) is not None:
                why = f"{site.name} has a mask, and weights that a sweep met are those of dense ones"
                raise OptionError(by, "begin", why, fix="begin with mse, or with hessian")
            place = places[site.node.name]
            grid, met = grids[place], torch.empty(site.rows, site.inputs, dtype=torch.float64)
            coder = Gptq(bits=grid.bits, group=grid.group, symmetric=grid.offset == "none", terms=grid.terms)
            solved = coder.fit(program, site, known, met=met)
            assert isinstance(solved.codes, QuantCodes)
            levels = _levels(solved.codes, grid)
            found[site.node.name] = trained_codes(met.float(), grid, *levels, seed=seed + place, **how)
    return TrainedSites(tuple(sites), tuple(found[site.node.name] for site in sites))


def _levels(codes: QuantCodes, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return scales, and zero points or offsets, of codes."""
    scales = codes.scales.float()
    if codes.zeros is None:
        return scales, None
    zeros = unpack_bits(codes.zeros, codes.bits, scales.shape[1]).float()
    return scales, zeros if grid.offset == "zero" else scales * (grid.center - zeros)


def input_energies(walked: Step, sites: Sequence[LinearSite]) -> dict[str, Tensor]:
    """Return the sum of squares of each input of the float model's linears, [K], by site."""
    inputs = {str(site.node.args[0]): torch.zeros(site.inputs) for site in sites}

    def add(total: Tensor, x: Tensor) -> None:
        total += x.flatten(0, -2).square().sum(0)

    walked.observe_float({name: partial(add, total) for name, total in inputs.items()})
    return {site.name: inputs[str(site.node.args[0])] for site in sites}


def planned_sites(program: Program, sites: Sequence[LinearSite], grids: Sequence[Grid], by: str) -> list[PlanRow]:
    """Return the sites with the bits and bytes that their codes will take, masks included."""
    rows = []
    for site, grid in zip(sites, grids, strict=True):
        pattern = pattern_at(program, site)
        inputs = site.inputs if pattern is None else kept_inputs(site.inputs, pattern.n, pattern.m)
        size = under_pattern(grid, pattern, by).stored_bytes(site.rows, inputs)
        size += 0 if pattern is None else mask_bytes(site)
        weights = site.rows * site.inputs
        rows.append(
            PlanRow(site.name, by, {"bits": 8 * size / weights, "bytes": float(size), "weights": float(weights)})
        )
    return rows
