"""Values rounded token by token while a program runs: rows of codes with a scale of their own, and back.

A row stands for x [K]: its scale as float16 in two bytes, low byte first, its zero point in one, and its codes as a bit
stream, x ~ (code - zero) * scale. A key/value cache is kept in such rows, and linears read what they decode to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ir.ops.cost import Cost
from ir.ops.packing import pack_bits, packed_length, unpack_bits

# The operators that go between values and rows, as a program's text names them.
CODING = frozenset({"nomul.encode_tokens", "nomul.decode_tokens"})
# Bytes of a row before its codes: the scale and the zero point.
_HEAD = 3
_TINY, _MOST = 2.0**-24, 65504.0


def row_bytes(width: int, bits: int) -> int:
    """Return the bytes of a row for `width` values."""
    return _HEAD + packed_length(width, bits)


def rounded(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [..., K] and zero points [..., 1] as whole numbers in x's dtype, and float16 scales [..., 1].

    The levels cover the smallest range around 0 that holds a token's values; symmetric: as far below 0 as above, with
    the zero point in the middle (2**(bits-1), the lowest code unused).
    """
    top = 2**bits - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    span = torch.maximum(high, -low) / (2 ** (bits - 1) - 1) if symmetric else high / top - low / top
    # What float16 cannot hold is as fine or as coarse as it can; a token of zeros has any scale.
    scale = span.clamp(_TINY, _MOST).half()
    step = scale.to(x.dtype)
    zero = torch.full_like(step, 2.0 ** (bits - 1)) if symmetric else torch.round(-low / step).clamp(0, top)
    codes = (torch.round(x / step) + zero).clamp(int(symmetric), top)
    return codes, zero, scale


def _fresh(x: Tensor) -> Tensor:
    """Return a copy whose bytes lie side by side, also where a dim of one has a stride that `contiguous` lets be."""
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("nomul::encode_tokens", mutates_args=())
def encode_tokens(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return a row of codes for every token.

    x: float [..., K]; returns uint8 [..., `row_bytes`]. bits: 2 to 8.
    """
    codes, zero, scale = rounded(x, bits, symmetric)
    head = torch.cat([_fresh(scale).view(torch.uint8), zero.to(torch.uint8)], -1)
    return torch.cat([head, pack_bits(codes.to(torch.uint8), bits)], -1)


@encode_tokens.register_fake
def _(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], row_bytes(x.shape[-1], bits), dtype=torch.uint8)


@torch.library.custom_op("nomul::decode_tokens", mutates_args=())
def decode_tokens(rows: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the values that rows of codes stand for, [..., width] in a floating dtype.

    rows: uint8 [..., `row_bytes`], as `encode_tokens` gives them.
    """
    scale = _fresh(rows[..., :2]).view(torch.float16).to(dtype)
    zero = rows[..., 2:_HEAD].to(dtype)
    return (unpack_bits(rows[..., _HEAD:], bits, width).to(dtype) - zero) * scale


@decode_tokens.register_fake
def _(rows: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], width, dtype=dtype)


@torch.library.custom_op("nomul::straight_tokens", mutates_args=())
def straight_tokens(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return what `decode_tokens` gives of `encode_tokens`, for training: gradients pass as if nothing was rounded.

    No finished program may call it. Source: straight-through estimation (Bengio et al. 2013, 1308.3432).
    """
    codes, zero, scale = rounded(x, bits, symmetric)
    return (codes - zero) * scale.to(x.dtype)


@straight_tokens.register_fake
def _(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return grad, None, None


straight_tokens.register_autograd(_backward)


def encode_cost(width: int, bits: int, tokens: int, element: int) -> Cost:
    """Return the cost of encoding: a pass for the range, a product and an addition a value."""
    moved = tokens * (width * element + row_bytes(width, bits))
    return Cost(moved, tokens * width, 3 * tokens * width)


def decode_cost(width: int, bits: int, tokens: int, element: int) -> Cost:
    """Return the cost of decoding: a difference and a product a value."""
    moved = tokens * (width * element + row_bytes(width, bits))
    return Cost(moved, tokens * width, tokens * width)
