"""Choosing scale groups, terms and offsets for a budget of stored bits per weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from ir.errors import UsageError
from passes.shiftcode.siblings import quick
from passes.shiftcode.solver import solve
from passes.shiftcode.spec import ShiftSpec

_ROWS, _INPUTS = 32, 1536
_GROUPS = range(32, 513, 32)


def choose(
    bpw: float, base: ShiftSpec, inputs: Sequence[int], stored_bits: Callable[[ShiftSpec], float], rotated: bool
) -> tuple[ShiftSpec, tuple[int, ...]]:
    """Return options and the planes to choose from, site by site, that lose least within `bpw` stored bits per weight.

    base: what is not chosen here; inputs: widths of the sites, all of which a group must divide; stored_bits: bits per
    weight that options take over all sites; rotated: whether the inputs are. Groups, terms and offsets compete by what
    sites of two numbers of planes lose together when their mean size is the budget; the losses are those of the
    data-free fit on random rows, normal ones where rotation makes them so and heavy-tailed ones elsewhere, so that no
    weight has to be read. Raises UsageError with the smallest possible budget when nothing fits.
    """
    planes = tuple(range(max(1, int(bpw) - 1), min(8, int(bpw) + 2) + 1))
    groups = [g for g in _GROUPS if all(n % g == 0 for n in inputs)] + [max(inputs)]
    found, smallest = [], float("inf")
    for terms in (1, 2, 3):
        for offset in (False, True):
            for group in groups:
                options = replace(base, terms=terms, offset=offset, group=group)
                specs = [replace(options, bits=bits) for bits in planes]
                sizes = [stored_bits(spec) for spec in specs]
                smallest = min(smallest, sizes[0])
                if sizes[0] <= bpw:
                    found.append((_mixed_loss(bpw, specs, sizes, rotated), options))
    if not found:
        raise UsageError(
            f"no shift-add code takes {bpw:g} bits per weight or less",
            why=f"one plane with a scale a row takes {smallest:.3f}",
            fix=f"give bpw={smallest:.3f} or more",
        )
    return min(found, key=lambda row: row[0])[1], planes


def _mixed_loss(bpw: float, specs: Sequence[ShiftSpec], sizes: Sequence[float], rotated: bool) -> float:
    """Return the loss at a size between those of two neighbouring numbers of planes, each taken for a share of it."""
    above = next((i for i, size in enumerate(sizes) if size > bpw), len(sizes))
    low = _typical_loss(specs[above - 1], rotated)
    if above == len(sizes):
        return low
    share = (bpw - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
    return (1 - share) * low + share * _typical_loss(specs[above], rotated)


@lru_cache(maxsize=1024)
def _typical_loss(spec: ShiftSpec, rotated: bool) -> float:
    """Return the relative loss of a data-free fit on normal rows, or on Student's t with 8 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal, others = (torch.randn(8 if i else 1, _ROWS, _INPUTS, generator=generator) for i in (0, 1))
    rows = (normal[0] if rotated else normal[0] / others.square().mean(0).sqrt()).double()
    error = rows - solve(rows, None, quick(spec)).dequantize(torch.float64)
    return float(error.square().sum() / rows.square().sum())
