"""The second moments of what a block's linears read, as its passes fit them one group of siblings after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ir.analysis import LinearSite
from passes.quantize.targets import Moments, empty_moments
from passes.stream import Step


def moments_of(
    walked: Step, groups: Sequence[list[LinearSite]], both: bool, sequential: bool
) -> Iterator[tuple[list[LinearSite], Moments]]:
    """Yield siblings with the second moments of their input on the compressed stream, in order.

    both: with its drift from the float stream. sequential: observe each input when its turn comes, with the linears
    before it as the caller left them (GPTQ's `true_sequential`); otherwise all at once, in one run of the block.
    """
    rounds = [[group] for group in groups] if sequential else [list(groups)]
    for together in rounds:
        moments = [empty_moments(group[0].inputs, both) for group in together]
        inputs: list[Any] = [group[0].node.args[0] for group in together]
        if both:
            walked.observe_pairs({x: m.add for x, m in zip(inputs, moments, strict=True)}, last=together is rounds[-1])
        else:
            walked.observe({x: m.add_alone for x, m in zip(inputs, moments, strict=True)})
        yield from zip(together, moments, strict=True)
