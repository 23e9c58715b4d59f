"""The exact multiple-choice knapsack: one width a site, least total loss within a budget of stored bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ir.errors import UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """One way to store a site: its size in bytes and the loss it causes."""

    size: int
    loss: float


def allocate(sites: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Return the index of one choice a site so that the sizes fit the budget and the losses sum to the least possible.

    Dynamic programming over the sites on the Pareto front of (size, loss); a state whose loss plus the linear
    relaxation of the sites still open exceeds the best known solution is dropped, which leaves few (Pisinger 1995, a
    minimal algorithm for the multiple-choice knapsack problem). Ties go to the smaller size, then to the earlier
    choice. Raises UsageError for a budget below the smallest possible size, naming it, or for a site without choices.
    """
    if any(not site for site in sites):
        raise UsageError("every site needs at least one choice")
    if any(not np.isfinite(c.loss) or c.size < 0 for site in sites for c in site):
        raise UsageError("sizes must not be negative and losses must be finite")
    least = sum(min(c.size for c in site) for site in sites)
    if budget < least:
        raise UsageError(
            f"a budget of {budget} bytes cannot be met",
            why=f"the smallest choices take {least} bytes",
            fix=f"give at least {least} bytes, or offer fewer bits",
        )
    bounds = _relaxations(sites)
    limit = _rounded(sites, budget)
    size, loss = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for site, rest in zip(sites, bounds[1:], strict=True):
        sizes = (size[:, None] + np.array([c.size for c in site], np.int64)).ravel()
        losses = (loss[:, None] + np.array([c.loss for c in site])).ravel()
        keep = np.flatnonzero(losses + rest.loss_within(budget - sizes) <= limit)
        keep = keep[_front(sizes[keep], losses[keep])]
        trail.append((keep // len(site), keep % len(site)))
        size, loss = sizes[keep], losses[keep]
    state, picked = int(np.argmin(loss)), []
    for parent, choice in reversed(trail):
        picked.append(int(choice[state]))
        state = int(parent[state])
    return picked[::-1]


@dataclass(frozen=True)
class _Relaxation:
    """The least loss of some sites with fractional choices: convex, piecewise linear between (sizes, losses)."""

    sizes: Floats
    losses: Floats

    def loss_within(self, budget: Ints) -> Floats:
        """Return the least loss within each budget, infinity where not even the smallest choices fit."""
        found = np.interp(budget, self.sizes, self.losses)
        return np.where(budget < self.sizes[0], np.inf, found)


def _hull(site: Sequence[Choice]) -> list[Choice]:
    """Return the lower convex hull of a site's choices, sizes rising and losses falling."""
    hull: list[Choice] = []
    for choice in sorted(site, key=lambda c: (c.size, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-1], choice) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(small: Choice, large: Choice) -> float:
    """Return the loss per byte from one choice to a larger one, negative."""
    return (large.loss - small.loss) / (large.size - small.size)


def _relaxations(sites: Sequence[Sequence[Choice]]) -> list[_Relaxation]:
    """Return the relaxation of sites[i:] for every i, the last one of no sites."""
    found = [_Relaxation(np.zeros(1), np.zeros(1))]
    base_size, base_loss = 0.0, 0.0
    steps: list[tuple[float, float, float]] = []
    for site in reversed(sites):
        hull = _hull(site)
        base_size, base_loss = base_size + hull[0].size, base_loss + hull[0].loss
        for small, large in pairwise(hull):
            steps.append((_slope(small, large), large.size - small.size, large.loss - small.loss))
        steps.sort()
        sizes = base_size + np.concatenate([[0.0], np.cumsum([s[1] for s in steps])])
        losses = base_loss + np.concatenate([[0.0], np.cumsum([s[2] for s in steps])])
        found.append(_Relaxation(sizes, losses))
    return found[::-1]


def _rounded(sites: Sequence[Sequence[Choice]], budget: int) -> float:
    """Return the loss of a feasible solution: hull steps in the order of their slope, each taken if it still fits."""
    hulls = [_hull(site) for site in sites]
    at = [0] * len(hulls)
    left = budget - sum(hull[0].size for hull in hulls)
    steps = sorted((_slope(h[i], h[i + 1]), s, i) for s, h in enumerate(hulls) for i in range(len(h) - 1))
    for _, site, place in steps:
        cost = hulls[site][place + 1].size - hulls[site][place].size
        if at[site] == place and cost <= left:
            at[site], left = place + 1, left - cost
    total = sum(hull[place].loss for hull, place in zip(hulls, at, strict=True))
    # Room for the rounding of sums taken in another order, so that the best solution itself is never cut off.
    return total + 1e-9 * sum(abs(hull[0].loss) for hull in hulls)


def _front(sizes: Ints, losses: Floats) -> Ints:
    """Return the places of the states that no other beats in both size and loss, by rising size."""
    order = np.lexsort((losses, sizes))
    sorted_losses = losses[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
    return order[sorted_losses < before]
