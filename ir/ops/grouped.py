"""`nomul::grouped_linear`: one linear map per expert over tokens that are sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _apply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (start, stop) in enumerate(_spans(ends)):
        if stop > start:
            out[start:stop] = x[start:stop] @ weight[expert].T
    return out


@torch.library.custom_op("nomul::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each expert's span by that expert's weight.

    x: [rows, K], sorted by expert; weight: [experts, N, K]; ends: int32 [experts], where each span ends. Rows past the
    last end are zero. Returns [rows, N].
    """
    return _apply(x, weight, ends)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, ends = ctx.saved_tensors
    grad_x = _apply(grad.contiguous(), weight.transpose(1, 2), ends)
    grad_w = torch.zeros_like(weight)
    for expert, (start, stop) in enumerate(_spans(ends)):
        if stop > start:
            grad_w[expert] = grad[start:stop].T @ x[start:stop]
    return grad_x, grad_w, None


grouped_linear.register_autograd(_backward, setup_context=_save)
