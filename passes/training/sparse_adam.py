"""AdamW with a decay of its own for weights that a mask drops, kept out of the mean of gradients (AST)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Numbers moved at once: what is in between then stays in the caches.
_AT_ONCE = 1 << 16


class SparseAdamW(torch.optim.Optimizer):
    """AdamW whose groups may have a mask and a decay for what it drops.

    With m the running mean of gradients g and d the weight (norm `l2`) or its sign (`l1`, as CAST has it, 2509.25996)
    where nothing is kept, a step is lr * (m / (1 - b1^t) + decay * d) / (sqrt(v / (1 - b2^t)) + eps), v the running
    mean of (g + decay * d)^2: the decay is kept out of the mean and counted among the squares (AST, 2407.20584, section
    3.2). AST corrects the bias of the sum and takes squares of means, so that its first step is ten times as long and
    later ones several times; here what is kept moves as under AdamW. AST's release takes the mask's sign the wrong way,
    which lets dropped weights grow.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": 1e-8, "mask": None, "decay": 0.0, "norm": "l2"})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        tensors = [parameter, grad, state["exp_avg"], state["exp_avg_sq"]]
        tensors += [group["mask"]] if group["mask"] is not None else []
        rows = max(1, _AT_ONCE * max(1, len(torch.atleast_1d(parameter))) // max(1, parameter.numel()))
        parts = [torch.atleast_1d(tensor).split(rows) for tensor in tensors]
        for part in zip(*parts, strict=True):
            _move_part(group, float(state["step"]), *part)


def _move_part(
    group: dict[str, Any],
    t: float,
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    mask: Tensor | None = None,
) -> None:
    """Move some rows of a parameter at its step number t."""
    b1, b2 = group["betas"]
    mean.lerp_(grad, 1 - b1)
    update, seen = mean / (1 - b1**t), grad
    if mask is not None:
        pull = (weight if group["norm"] == "l2" else weight.sign()) * group["decay"]
        pull.masked_fill_(mask, 0.0)
        update, seen = update.add_(pull), pull.add_(grad)
    square.mul_(b2).addcmul_(seen, seen, value=1 - b2)
    root = (square / (1 - b2**t)).sqrt_().add_(group["eps"])
    weight.addcdiv_(update, root, value=-group["lr"])
