"""What training makes small: a block's distance from where it should be, or that of the model's predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

# Tokens weaker than this share of the median energy are not weighed up further; a mean would follow massive tokens.
_FLOOR = 1e-3
# Logits looked at at once: what is in between then stays in the caches.
_AT_ONCE = 1 << 19
# In place of the token that follows the last one.
_NONE = -1

_Part = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def token_loss(found: Tensor, target: Tensor) -> Tensor:
    """Return the mean over tokens of a token's squared error relative to its energy; both [..., width].

    A plain mean of squares is governed by the few tokens with massive activations (2402.17762), which can hold nearly
    all the energy of a sequence; the norm that reads a residual stream sees every token at the same size.
    """
    energy = target.square().mean(-1)
    floor = (_FLOOR * energy.median()).clamp(min=torch.finfo(energy.dtype).tiny)
    loss: Tensor = ((found - target).square().mean(-1) / torch.maximum(energy, floor)).mean()
    return loss


def plain_loss(found: Tensor, target: Tensor) -> Tensor:
    """Return the mean of squared errors (OmniQuant, 2308.13137, eq. 1)."""
    loss: Tensor = (found - target).square().mean()
    return loss


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of each next token of ids [batch, seq]; logits [batch, seq, vocab]."""
    return distilled_loss(logits, None, ids, 0.0, 1.0)


def teacher_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over positions of KL(teacher || student), in nats; both are logits [batch, seq, vocabulary]."""
    return distilled_loss(logits, wanted, None, 1.0, 1.0)


def distilled_loss(
    logits: Tensor, wanted: Tensor | None, ids: Tensor | None, share: float, temperature: float
) -> Tensor:
    """Return share * T^2 * KL(teacher || student) at temperature T + (1 - share) * cross-entropy of the text, in nats.

    Both are logits [batch, seq, vocabulary], ids [batch, seq] (AST, 2407.20584, eq. 4; T as in its release). wanted is
    not read where `share` is 0, nor ids where it is 1; the gradient goes to `logits` alone.
    """
    found: Tensor = _Distilled.apply(logits, wanted, ids, share, temperature)
    return found


class _Distilled(Function):
    """`distilled_loss`, whose gradient is found with it, some positions at a time.

    Of the vocabulary's width nothing else is kept for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, wanted: Tensor | None, ids: Tensor | None, share: float, temperature: float
    ) -> Tensor:
        flat = logits.flatten(0, -2)
        grad = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        if share > 0 and wanted is not None:
            part = partial(_distance, temperature=temperature)
            total += _summed(part, flat, wanted.flatten(0, -2), grad, share / len(flat))
        if share < 1 and ids is not None:
            following = functional.pad(ids[:, 1:], (0, 1), value=_NONE).flatten()
            total += _summed(_surprise, flat, following, grad, (1 - share) / int((following != _NONE).sum()))
        if grad is not None:
            ctx.save_for_backward(grad.view(logits.shape))
        return total.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None, None, None


def _summed(loss: _Part, logits: Tensor, aims: Tensor, grad: Tensor | None, scale: float) -> Tensor:
    """Return a loss's sum over positions times a scale, its gradient added to `grad`; logits [positions, vocab]."""
    at_once = max(1, _AT_ONCE // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for first in range(0, len(logits), at_once):
        rows = slice(first, first + at_once)
        found, slope = loss(logits[rows], aims[rows])
        total += found
        if grad is not None:
            grad[rows].add_(slope, alpha=scale)
    return total * scale


def _distance(logits: Tensor, wanted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sum over positions of T^2 * KL(teacher || student) at temperature T, and its gradient."""
    student, teacher = (functional.log_softmax(x / temperature, -1) for x in (logits, wanted))
    chances = teacher.exp()
    loss = teacher.sub_(student).mul_(chances).sum() * temperature**2
    return loss, student.exp_().sub_(chances).mul_(temperature)


def _surprise(logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of cross-entropies of the tokens that follow, `_NONE` where none does, and its gradient."""
    known, at = following != _NONE, following.clamp(min=0)[:, None]
    log = functional.log_softmax(logits, -1)
    loss = -log.gather(1, at)[:, 0][known].sum()
    slope = log.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=log.dtype))
    return loss, slope.mul_(known[:, None])
