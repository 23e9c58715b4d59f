"""`nomul::grouped_linear`: one linear map per expert over tokens that are sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


@torch.library.custom_op("nomul::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each expert's span by that expert's weight.

    x: [rows, K], sorted by expert; weight: [experts, N, K]; ends: int32 [experts], where each span ends. Rows past the
    last end are zero. Returns [rows, N].
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (start, stop) in enumerate(_spans(ends)):
        if stop > start:
            out[start:stop] = x[start:stop] @ weight[expert].T
    return out


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("nomul::grouped_outer", mutates_args=())
def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return the sum of outer products of the rows of each expert's span: the weight gradient of `grouped_linear`.

    a: [rows, N]; b: [rows, K]; ends: int32 [experts]. Returns [experts, N, K], zero for an expert without rows.
    """
    out = a.new_zeros(ends.shape[0], a.shape[1], b.shape[1])
    for expert, (start, stop) in enumerate(_spans(ends)):
        if stop > start:
            out[expert] = a[start:stop].T @ b[start:stop]
    return out


@grouped_outer.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Both gradients are operators too: the spans are values, which a traced backward pass must not look at."""
    x, weight, ends = ctx.saved_tensors
    grad_x = grouped_linear(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


grouped_linear.register_autograd(_backward, setup_context=_save)
