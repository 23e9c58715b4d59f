"""What one-shot methods look at of a linear's inputs: second moments, and where asked their mean and variance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.analysis import LinearSite
from passes.moments import moments_of
from passes.quantize.targets import Moments
from passes.stream import Step


@dataclass
class Observed:
    """Of an input [.., K]: its second moments and the sum over tokens of each channel, float64 [K], or None."""

    moments: Moments
    total: Tensor | None

    @property
    def energy(self) -> Tensor:
        """The sum of squares of each channel, [K]."""
        return self.moments.gram.matrix.diagonal()

    @property
    def mean(self) -> Tensor:
        """The mean of each channel over tokens, float64 [K]."""
        assert self.total is not None
        return self.total / max(1, self.moments.gram.tokens)

    @property
    def variance(self) -> Tensor:
        """The variance of each channel over tokens, float64 [K]."""
        square = self.energy.double() / max(1, self.moments.gram.tokens)
        return (square - self.mean.square()).clamp_min(0.0)

    def add(self, x: Tensor) -> None:
        """Add the sum over the tokens of x [..., K]."""
        assert self.total is not None
        self.total += x.flatten(0, -2).sum(0, dtype=torch.float64)


def observed(
    walked: Step, groups: Sequence[list[LinearSite]], both: bool, means: bool
) -> Iterator[tuple[list[LinearSite], Observed]]:
    """Yield siblings with what was seen of their input on the compressed stream.

    both: second moments with the drift from the float stream; means: with the sums of channels, for one more run.
    """
    rows = [(group, Observed(m, None)) for group, m in moments_of(walked, groups, both, False)]
    if means:
        for group, row in rows:
            row.total = torch.zeros(group[0].inputs, dtype=torch.float64)
        walked.observe({group[0].node.args[0]: row.add for group, row in rows})  # type: ignore[misc]
    yield from rows
