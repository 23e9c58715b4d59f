"""What training makes small: a block's distance from where it should be, or that of the model's predictions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Tokens weaker than this share of the median energy are not weighed up further; a mean would follow massive tokens.
_FLOOR = 1e-3


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
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def teacher_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over positions of KL(teacher || student), in nats; both are logits [batch, seq, vocabulary]."""
    student, teacher = (functional.log_softmax(x.flatten(0, -2), -1) for x in (logits, wanted))
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distilled_loss(logits: Tensor, wanted: Tensor, ids: Tensor, share: float, temperature: float) -> Tensor:
    """Return share * T^2 * KL(teacher || student) at temperature T + (1 - share) * cross-entropy of the text, in nats.

    Both are logits [batch, seq, vocabulary], ids [batch, seq] (AST, 2407.20584, eq. 4; T as in its release).
    """
    total = torch.zeros((), device=logits.device)
    if share > 0:
        total = total + share * temperature**2 * teacher_loss(logits / temperature, wanted / temperature)
    if share < 1:
        total = total + (1 - share) * next_token_loss(logits, ids)
    return total
