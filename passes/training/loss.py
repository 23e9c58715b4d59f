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


def next_token_loss(logits: Tensor, ids: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy, in nats, of each next token of ids [batch, seq]; logits [batch, seq, vocab].

    counted: bool [batch, seq], the tokens whose prediction counts; None for all.
    """
    return distilled_loss(logits, None, ids, 0.0, 1.0, counted)


def teacher_loss(logits: Tensor, wanted: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the mean over positions of KL(teacher || student), in nats; both are logits [batch, seq, vocabulary].

    counted: bool [batch, seq], the tokens whose prediction counts; None for all, what follows the last one too.
    """
    return distilled_loss(logits, wanted, None, 1.0, 1.0, counted)


def distilled_loss(
    logits: Tensor,
    wanted: Tensor | None,
    ids: Tensor | None,
    share: float,
    temperature: float,
    counted: Tensor | None = None,
) -> Tensor:
    """Return share * T^2 * KL(teacher || student) at temperature T + (1 - share) * cross-entropy of the text, in nats.

    Both are logits [batch, seq, vocabulary], ids [batch, seq] (AST, 2407.20584, eq. 4; T as in its release). wanted is
    not read where `share` is 0, nor ids where it is 1; the gradient goes to `logits` alone. counted: bool [batch, seq],
    the tokens whose prediction counts; None for all. Where none counts the loss is 0.
    """
    found: Tensor = _Distilled.apply(logits, wanted, ids, share, temperature, counted)
    return found


class _Distilled(Function):
    """`distilled_loss`, whose gradient is found with it, some positions at a time.

    Of the vocabulary's width nothing else is kept for the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        wanted: Tensor | None,
        ids: Tensor | None,
        share: float,
        temperature: float,
        counted: Tensor | None,
    ) -> Tensor:
        flat = logits.flatten(0, -2)
        grad = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        seen = None if counted is None else _before(counted)
        if share > 0 and wanted is not None:
            part = partial(_distance, temperature=temperature)
            total += _summed(part, flat, wanted.flatten(0, -2), grad, share, seen)
        if share < 1 and ids is not None:
            following = functional.pad(ids[:, 1:], (0, 1)).flatten()
            told = _before(torch.ones_like(ids, dtype=torch.bool)) if seen is None else seen
            total += _summed(_surprise, flat, following, grad, 1 - share, told)
        if grad is not None:
            ctx.save_for_backward(grad.view(logits.shape))
        return total.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None, None, None, None


def _before(counted: Tensor) -> Tensor:
    """Return the positions [n] that predict the tokens counted, bool [batch, seq]."""
    return torch.nonzero(functional.pad(counted[:, 1:], (0, 1)).flatten())[:, 0]


def _summed(
    loss: _Part, logits: Tensor, aims: Tensor, grad: Tensor | None, share: float, positions: Tensor | None
) -> Tensor:
    """Return a share of a loss's mean over positions, all by default, its gradient added to `grad`.

    logits: [all positions, vocabulary].
    """
    at_once, total = max(1, _AT_ONCE // logits.shape[-1]), torch.zeros((), dtype=torch.float64, device=logits.device)
    count = len(logits) if positions is None else len(positions)
    scale = share / max(1, count)
    for first in range(0, count, at_once):
        rows = slice(first, first + at_once) if positions is None else positions[first : first + at_once]
        found, slope = loss(logits[rows], aims[rows])
        total += found
        if grad is not None:
            grad[rows] = grad[rows].add(slope, alpha=scale)
    return total * scale


def _distance(logits: Tensor, wanted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sum over positions of T^2 * KL(teacher || student) at temperature T, and its gradient."""
    student, teacher = (functional.log_softmax(x / temperature, -1) for x in (logits, wanted))
    chances = teacher.exp()
    loss = teacher.sub_(student).mul_(chances).sum() * temperature**2
    return loss, student.exp_().sub_(chances).mul_(temperature)


def _surprise(logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of cross-entropies of the tokens that follow, and its gradient."""
    log, at = functional.log_softmax(logits, -1), following[:, None]
    loss = -log.gather(1, at).sum()
    return loss, log.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=log.dtype))
