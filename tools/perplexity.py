"""How well a model predicts a text, and how far one model is from another: pure functions of logits and tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ir.errors import UsageError

FORMULA = "exp(mean over all windows w and positions t = 1..ctx-1 of -ln p(token[w,t] | token[w,0..t-1]))"
# Tokens whose log-softmax is held at once, in several copies: 32 rows of 49152 words are 6 MB in float32.
_CHUNK = 32


def window_tokens(ids: Sequence[int], ctx: int, windows: int | None = None) -> Tensor:
    """Return the first `windows` (default: all) non-overlapping windows of `ctx` tokens, int64 [windows, ctx].

    What is left at the end is dropped. Raises UsageError when there are fewer tokens than asked for.
    """
    if ctx < 2 or (windows is not None and windows < 1):
        raise UsageError(
            "a window has at least 2 tokens, and there is at least one", why=f"--ctx {ctx} --windows {windows}"
        )
    available, wanted = len(ids) // ctx, windows or 1
    if available < wanted:
        raise UsageError(
            f"the text is too short for {wanted} window{'s' if wanted > 1 else ''} of {ctx} tokens",
            why=f"it has {len(ids)} tokens, and {wanted * ctx} are needed",
            fix="give a longer text, or lower --ctx or --windows",
        )
    count = windows or available
    return torch.tensor(ids[: count * ctx], dtype=torch.long).view(count, ctx)


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return -ln p of every token but the first, float32 [batch, ctx-1], from logits [batch, ctx, vocab]."""
    rows = logits[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    parts = [
        -row.float().log_softmax(-1).gather(1, target[:, None])[:, 0]
        for row, target in zip(rows.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts).view(ids.shape[0], -1)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats for each prediction, float32 [batch, ctx-1], from logits of equal shape."""
    parts = []
    for a, b in _row_pairs(teacher, student):
        p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
        # A probability of exactly 0 contributes nothing, though its logarithm is -inf.
        parts.append(torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1))
    return torch.cat(parts).view(teacher.shape[0], -1)


def agreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Return whether both models predict the same token first, bool [batch, ctx-1]."""
    parts = [a.argmax(-1) == b.argmax(-1) for a, b in _row_pairs(teacher, student)]
    return torch.cat(parts).view(teacher.shape[0], -1)


def _row_pairs(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(a[:, :-1].flatten(0, 1).split(_CHUNK), b[:, :-1].flatten(0, 1).split(_CHUNK), strict=True)


@dataclass(frozen=True)
class Tally:
    """Sums over windows, added up in float64 in the order of the text."""

    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, ids: Tensor, teacher: Tensor | None = None) -> None:
        """Add some windows: logits [batch, ctx, vocab] of the model and, if given, the teacher; ids [batch, ctx]."""
        self.losses.extend(nll(logits, ids).double().mean(1).tolist())
        if teacher is not None:
            self.divergences.extend(kl_divergence(teacher, logits).double().mean(1).tolist())
            self.agreements.extend(agreement(teacher, logits).double().mean(1).tolist())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over all windows so far; infinite where that overflows."""
        mean = _mean(self.losses)
        return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan

    @property
    def kl(self) -> float | None:
        """Mean KL(teacher || student) in nats a token, None without a teacher."""
        return _mean(self.divergences) if self.divergences else None

    @property
    def top1(self) -> float | None:
        """Share of tokens where both predict the same token first, None without a teacher."""
        return _mean(self.agreements) if self.agreements else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
