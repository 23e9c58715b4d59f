"""`nomul::rope`: rotary position embedding with its pairing, full or partial."""

from __future__ import annotations

import torch
from torch import Tensor


def _rotate(x: Tensor, interleaved: bool) -> Tensor:
    """Return x with every pair (a, b) turned into (-b, a); pairs are neighbours when interleaved, else halves."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def _apply(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    turned = x[..., :width]
    out = turned * cos + _rotate(turned, interleaved) * sin
    return torch.cat([out, x[..., width:]], dim=-1)


@torch.library.custom_op("nomul::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of the first r of d channels by position-dependent angles; the tail passes through.

    x: [batch, heads, seq, d]; cos, sin: [..., seq, r] with r <= d, broadcast over heads, both entries of a pair equal
    for a true rotation. interleaved: pairs are (2i, 2i+1), else (i, i + r/2). Source: RoFormer (2104.09864), eq. 34.
    """
    return _apply(x, cos, sin, interleaved)


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The rotation is linear in x; its transpose takes the quarter turn the other way. Angles get no gradient."""
    cos, sin = ctx.saved_tensors
    width = cos.shape[-1]
    turned = grad[..., :width]
    back = turned * cos - _rotate(turned * sin, ctx.interleaved)
    return torch.cat([back, grad[..., width:]], dim=-1), None, None, None


rope.register_autograd(_backward, setup_context=_save)
