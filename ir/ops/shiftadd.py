"""`nomul::shiftadd_linear`: a linear map whose weight is sign planes with power-of-two scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ir.ops.cost import Cost
from ir.ops.packing import unpack_bits
from ir.ops.shift import shift
from ir.ops.shiftcode import OFFSET_OCTAVES, SCALE_OCTAVES, ShiftCodes, dequantize

# 2**22 values are 32 MiB in float64.
_SHIFTED_AT_ONCE = 1 << 22


def _codes(x: Tensor, signs: Tensor, scales: Tensor, exponents: Tensor, offsets: Tensor | None, group: int, terms: int):  # type: ignore[no-untyped-def]
    return ShiftCodes(signs, scales, exponents, offsets, group, terms, x.shape[-1])


@torch.library.custom_op("nomul::shiftadd_linear", mutates_args=())
def shiftadd_linear(
    x: Tensor,
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    group: int,
    terms: int,
) -> Tensor:
    """Return x W^T + bias with W = z + sum_i alpha_i B_i decoded from its codes (ShiftAddLLM, 2406.05981, section 3).

    x: float [..., K]; signs, scales, exponents, offsets: the stored form of `ir.ops.shiftcode.ShiftCodes` with N rows;
    bias: [N]; group: inputs per scale; terms: powers of two per scale. Returns [..., N] in x's dtype. This eager form
    multiplies by the decoded weight and defines the meaning; `shiftadd_by_shifts` is the same map without multiplies.
    """
    weight = dequantize(_codes(x, signs, scales, exponents, offsets, group, terms), x.dtype)
    return functional.linear(x, weight, bias)


@shiftadd_linear.register_fake
def _(x, signs, scales, exponents, offsets, bias, group, terms):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], signs.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, signs, scales, exponents, offsets, bias, ctx.group, ctx.terms = inputs
    ctx.has_bias, ctx.inputs = bias is not None, x.shape[-1]
    ctx.save_for_backward(signs, scales, exponents, offsets)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The map is linear in x with constant codes, so the gradient flows through W alone."""
    signs, scales, exponents, offsets = ctx.saved_tensors
    codes = ShiftCodes(signs, scales, exponents, offsets, ctx.group, ctx.terms, ctx.inputs)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    return grad @ dequantize(codes, grad.dtype), None, None, None, None, grad_bias, None, None


shiftadd_linear.register_autograd(_backward, setup_context=_save)


def shiftadd_by_shifts(
    x: Tensor,
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    group: int,
    terms: int,
) -> Tensor:
    """Evaluate `nomul::shiftadd_linear` by signed sums of activations and exponent shifts only.

    Arguments as for the operator. Per group and plane the activations are added with their signs, and each power-of-two
    term of the scale shifts that sum (`ir.ops.shift.shift`); no weight is ever decoded to a float.
    """
    codes = _codes(x, signs, scales, exponents, offsets, group, terms)
    # Some tokens at a time, so that what is shifted, one value a token, row and group, stays small.
    step = max(1, _SHIFTED_AT_ONCE // (codes.rows * codes.groups))
    parts = [_by_shifts(tokens, codes) for tokens in x.reshape(-1, codes.in_features).split(step)]
    total = torch.cat(parts).reshape(*x.shape[:-1], codes.rows)
    return total if bias is None else total + bias


def _by_shifts(x: Tensor, codes: ShiftCodes) -> Tensor:
    """Return x W^T for tokens x [T, K]."""
    groups, terms = codes.groups, codes.terms
    pad = groups * codes.group - codes.in_features if codes.group < codes.in_features else 0
    grouped = functional.pad(x, (0, pad)).unflatten(1, (groups, -1))
    total = x.new_zeros(x.shape[0], codes.rows)
    nibbles = unpack_bits(codes.scales, 4, groups * codes.planes * terms)
    nibbles = nibbles.reshape(codes.rows, groups, codes.planes, terms)
    for plane in range(codes.planes):
        plus = functional.pad(unpack_bits(codes.signs[plane], 1, codes.in_features), (0, pad)).to(x.dtype) * 2 - 1
        sums = torch.einsum("tgk,ngk->tng", grouped, plus.unflatten(1, (groups, -1)))
        total = total + _shift_terms(sums, nibbles[:, :, plane], codes.exponents[:, 0], SCALE_OCTAVES, signed=False)
    if codes.offsets is not None:
        nibbles = unpack_bits(codes.offsets, 4, groups * terms).reshape(codes.rows, groups, terms)
        sums = grouped.sum(-1)[:, None, :].expand(-1, codes.rows, -1)
        total = total + _shift_terms(sums, nibbles, codes.exponents[:, 1], OFFSET_OCTAVES, signed=True)
    return total


def _shift_terms(sums: Tensor, nibbles: Tensor, row: Tensor, octaves: int, signed: bool) -> Tensor:
    """Return the sum over groups and terms of `sums` [T, N, G] shifted by the exponents in `nibbles` [N, G, terms]."""
    first = nibbles[..., 0] & 7 if signed else nibbles[..., 0]
    negative = (nibbles[..., 0] >> 3).bool() if signed else torch.zeros_like(first, dtype=torch.bool)
    present = first < octaves
    exponent = row.long()[:, None] - first.long()
    out = torch.where(present, shift(torch.where(negative, -sums, sums), exponent), 0.0).sum(-1)
    for nibble in nibbles[..., 1:].unbind(-1):
        delta = (nibble & 7).long()
        present, exponent = present & (delta > 0), exponent - delta
        minus = (nibble >> 3).bool() ^ negative
        out = out + torch.where(present, shift(torch.where(minus, -sums, sums), exponent), 0.0).sum(-1)
    return out


def shiftadd_cost(codes: ShiftCodes, tokens: int, element: int = 4) -> Cost:
    """Return the cost of one call with 8-input look-up tables: adds to build and sum them, one shift a scale term.

    A table of 8 activations has 256 signed sums (128 by symmetry), each one add from another; a plane then takes one
    look-up and add per 8 inputs, and each scale `terms` shifts and adds (ShiftAddLLM section 3.1, LUT-GEMM).
    """
    bytes_per_row = -(-codes.in_features // 8)
    lookups = tokens * codes.planes * codes.rows * bytes_per_row
    scale_terms = tokens * codes.rows * codes.groups * codes.planes * codes.terms
    offset_terms = tokens * codes.rows * codes.groups * codes.terms if codes.offsets is not None else 0
    adds = tokens * bytes_per_row * 128 + lookups + scale_terms + offset_terms
    moved = codes.stored_bits // 8 + tokens * (codes.rows + codes.in_features) * element
    return Cost(moved, 0, adds, scale_terms + offset_terms)
