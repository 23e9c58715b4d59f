"""The quality gate: is what was compiled still a language model, and how far is it from the one that came in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ir.program import Program


@dataclass(frozen=True)
class Quality:
    """Measured on held-out text. kl: mean KL(before || after) in nats; top1: share of equal first choices.

    before, after: token-level perplexity; finite: whether every logit is; passed: kl is finite and at most `limit`.
    """

    tokens: int
    before: float
    after: float
    kl: float
    top1: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the program is kept unmarked."""
        return math.isfinite(self.kl) and self.kl <= self.limit

    def as_json(self) -> dict[str, float | bool | int]:
        """Return the figures by name."""
        return {**asdict(self), "passed": self.passed}


def judge(
    before: Program, after: Program, held_out: torch.Tensor, limit: float, step: Callable[[str], None]
) -> Quality:
    """Compare two programs on token windows i64[windows, length], one window's logits in memory at a time."""
    from ir.execute import logits_by_row
    from tools.perplexity import Tally

    student, teacher = Tally(), Tally()
    pairs = zip(logits_by_row(before, held_out), logits_by_row(after, held_out), strict=True)
    for index, (expected, found) in enumerate(pairs):
        ids = held_out[index : index + 1]
        teacher.add(expected, ids)
        student.add(found, ids, expected)
        step("")
    kl, top1 = student.kl, student.top1
    return Quality(
        held_out.numel() - len(held_out),
        teacher.perplexity,
        student.perplexity,
        math.nan if kl is None else kl,
        math.nan if top1 is None else top1,
        limit,
    )
