"""Choosing planes, group and terms for a budget of stored bits per weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from ir.errors import UsageError
from passes.shiftcode.solver import solve
from passes.shiftcode.spec import ShiftSpec

_ROWS, _INPUTS = 64, 1536
_SMALLEST_GROUP = 16


def choose(
    bpw: float, base: ShiftSpec, inputs: Sequence[int], stored_bits: Callable[[ShiftSpec], float], rotated: bool
) -> ShiftSpec:
    """Return the options that lose least among those of at most `bpw` stored bits per weight.

    base: what is not chosen here; inputs: widths of the sites, all of which a group must divide; stored_bits: bits per
    weight that options take over all sites; rotated: whether the inputs are. For every number of planes and terms, with
    and without offsets, the smallest group that the budget allows competes; the loss compared is that of the data-free
    fit on random rows, normal ones where rotation makes them so and heavy-tailed ones elsewhere, so that no weight has
    to be read. Raises UsageError with the smallest possible budget when nothing fits.
    """
    groups = [g for g in range(_SMALLEST_GROUP, min(inputs) + 1, 8) if all(n % g == 0 for n in inputs)] + [max(inputs)]
    fitting, smallest = [], float("inf")
    for bits in range(1, 9):
        for terms in (1, 2, 3):
            for offset in (False, True):
                options = replace(base, bits=bits, terms=terms, offset=offset)
                sized = [(stored_bits(replace(options, group=g)), replace(options, group=g)) for g in groups]
                smallest = min(smallest, sized[-1][0])
                within = [spec for size, spec in sized if size <= bpw]
                fitting += within[:1]
    if not fitting:
        raise UsageError(
            f"no shift-add code takes {bpw:g} bits per weight or less",
            why=f"one plane with a scale a row takes {smallest:.3f}",
            fix=f"give bpw={smallest:.3f} or more",
        )
    widest = max(spec.bits for spec in fitting)
    return min((s for s in fitting if s.bits >= widest - 1), key=lambda spec: _typical_loss(spec, rotated))


@lru_cache(maxsize=256)
def _typical_loss(spec: ShiftSpec, rotated: bool) -> float:
    """Return the relative loss of a data-free fit on normal rows, or on Student's t with 8 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal, others = (torch.randn(8 if i else 1, _ROWS, _INPUTS, generator=generator) for i in (0, 1))
    rows = (normal[0] if rotated else normal[0] / others.square().mean(0).sqrt()).double()
    error = rows - solve(rows, None, spec).dequantize(torch.float64)
    return float(error.square().sum() / rows.square().sum())
