"""`nomul::sparse_linear` and `nomul::sparse_shiftadd_linear`: linear maps that store n of every m weights of a row.

The stored form is a bit an input, and the kept weights of every row side by side: as floats, as uniform codes around
zero, or as sign planes. Every row keeps equally many, so that it starts at a fixed place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ir.errors import UsageError
from ir.ops.cost import Cost
from ir.ops.nm import gather_kept, kept_index, kept_inputs, pack_mask, scatter_kept, unpack_mask
from ir.ops.quant import QuantCodes
from ir.ops.shiftadd import by_shifts
from ir.ops.shiftcode import ShiftCodes

Kept = Tensor | QuantCodes | ShiftCodes


@dataclass(frozen=True)
class SparseCodes:
    """A weight [N, in_features] of which n of every m inputs of a row are kept.

    kept: the kept weights [N, in_features * n / m]: float, or codes of as many inputs, whose groups count kept weights;
    uniform ones without zero points. mask: uint8 [N, ceil(K/8)], bit t of byte b = input 8*b+t is kept.
    """

    kept: Kept
    mask: Tensor
    n: int
    m: int
    in_features: int

    @property
    def stored_bits(self) -> int:
        """Bits of all stored tensors, the mask and padding included."""
        return _bits(self.mask) + (_bits(self.kept) if isinstance(self.kept, Tensor) else self.kept.stored_bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] with zeros where none is kept."""
        kept = self.kept.to(dtype) if isinstance(self.kept, Tensor) else self.kept.dequantize(dtype)
        return scatter_kept(kept, unpack_mask(self.mask, self.in_features))


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.numel() * tensor.element_size()


def sparse_codes(weight: Tensor, mask: Tensor, n: int, m: int) -> SparseCodes:
    """Return a weight [N, K] in stored form, its kept values as they are; mask: bool [N, K].

    Raises UsageError for a mask of another pattern and for a weight that is not zero where none is kept: it would be
    lost.
    """
    packed = pack_mask(mask, n, m)
    lost = int((weight[~mask] != 0).sum())
    if lost:
        raise UsageError(
            "a weight is not zero where its mask keeps none",
            why=f"{lost} of its {weight.numel()} values would be lost",
            fix="multiply it by the mask first",
        )
    return SparseCodes(gather_kept(weight, mask), packed, n, m, weight.shape[1])


@torch.library.custom_op("nomul::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    bits: int = 0,
    group: int = 0,
) -> Tensor:
    """Return x W^T + bias for a weight of which a row keeps n of every m inputs.

    x: float [..., K]; values: the kept weights, float [N, kept] with bits 0, else codes uint8 [N, ceil(kept*bits/8)]
    around 2**(bits-1) with float16 scales [N, G], one for `group` kept weights; mask: uint8 [N, ceil(K/8)]; bias: [N].
    Returns [..., N] in x's dtype.
    """
    codes = sparse_parts(values, mask, scales, n, m, bits, group, x.shape[-1])
    return functional.linear(x, codes.dequantize(x.dtype), bias)


@sparse_linear.register_fake
def _(x, values, mask, scales, bias, n, m, bits=0, group=0):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def sparse_parts(
    values: Tensor, mask: Tensor, scales: Tensor | None, n: int, m: int, bits: int, group: int, inputs: int
) -> SparseCodes:
    """Return the stored form that the arguments of `sparse_linear` spell; UsageError for m that does not fit."""
    width = kept_inputs(inputs, n, m)
    if not bits:
        return SparseCodes(values, mask, n, m, inputs)
    assert scales is not None
    return SparseCodes(QuantCodes(values, scales, None, bits, group, width), mask, n, m, inputs)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, mask, scales, bias, *ctx.layout = inputs
    ctx.has_bias, ctx.inputs = bias is not None, x.shape[-1]
    ctx.save_for_backward(values, mask, scales)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The weight is a constant; the gradient flows to the activations and the bias."""
    n, m, bits, group = ctx.layout
    values, mask, scales = ctx.saved_tensors
    weight = sparse_parts(values, mask, scales, n, m, bits, group, ctx.inputs).dequantize(grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    return grad @ weight, None, None, None, grad_bias, None, None, None, None


sparse_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("nomul::sparse_shiftadd_linear", mutates_args=())
def sparse_shiftadd_linear(
    x: Tensor,
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    group: int,
    terms: int,
    row_group: int = 1,
    code: str = "planes",
) -> Tensor:
    """Return x W^T + bias for a weight of which a row keeps n of every m inputs, the kept ones as shift-add codes.

    signs to code: the stored form of `ir.ops.shiftcode.ShiftCodes` over the kept weights of each row, `group` of which
    share scales; mask: uint8 [N, ceil(K/8)]; the rest as for `nomul::shiftadd_linear`.
    """
    parts = (signs, scales, exponents, offsets, mask, n, m, group, terms, row_group, code)
    return functional.linear(x, sparse_shift_parts(*parts, x.shape[-1]).dequantize(x.dtype), bias)


@sparse_shiftadd_linear.register_fake
def _(x, signs, scales, exponents, offsets, mask, bias, n, m, group, terms, row_group=1, code="planes"):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def sparse_shift_parts(
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor,
    n: int,
    m: int,
    group: int,
    terms: int,
    row_group: int,
    code: str,
    inputs: int,
) -> SparseCodes:
    """Return the stored form that the arguments of `sparse_shiftadd_linear` spell; UsageError as `sparse_parts`."""
    width = kept_inputs(inputs, n, m)
    kept = ShiftCodes(signs, scales, exponents, offsets, group, terms, width, row_group, code)
    return SparseCodes(kept, mask, n, m, inputs)


def _save_shifts(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, signs, scales, exponents, offsets, mask, bias, *ctx.layout = inputs
    ctx.has_bias, ctx.inputs = bias is not None, x.shape[-1]
    ctx.save_for_backward(signs, scales, exponents, offsets, mask)


def _backward_shifts(ctx, grad):  # type: ignore[no-untyped-def]
    """As for `sparse_linear`."""
    n, m, group, terms, row_group, code = ctx.layout
    signs, scales, exponents, offsets, mask = ctx.saved_tensors
    parts = (signs, scales, exponents, offsets, mask, n, m, group, terms, row_group, code)
    codes = sparse_shift_parts(*parts, ctx.inputs)
    weight = codes.dequantize(grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    return grad @ weight, None, None, None, None, None, grad_bias, None, None, None, None, None, None


sparse_shiftadd_linear.register_autograd(_backward_shifts, setup_context=_save_shifts)


def sparse_by_shifts(
    x: Tensor,
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    offsets: Tensor | None,
    mask: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    group: int,
    terms: int,
    row_group: int = 1,
    code: str = "planes",
) -> Tensor:
    """Evaluate `nomul::sparse_shiftadd_linear` by signed sums of the kept inputs and exponent shifts only."""
    parts = (signs, scales, exponents, offsets, mask, n, m, group, terms, row_group, code)
    kept = sparse_shift_parts(*parts, x.shape[-1]).kept
    assert isinstance(kept, ShiftCodes)
    total = by_shifts(x, kept, kept_index(unpack_mask(mask, x.shape[-1])))
    return total if bias is None else total + bias


def sparse_cost(codes: SparseCodes, tokens: int, element: int = 4) -> Cost:
    """Return the cost of one call: the kept weights are met one by one, by a multiply, or by an add a sign plane.

    A table of signed sums serves all rows only where they keep the same inputs, so that none is counted.
    """
    rows, kept = codes.mask.shape[0], kept_inputs(codes.in_features, codes.n, codes.m)
    moved = codes.stored_bits // 8 + tokens * (rows + codes.in_features) * element
    if not isinstance(codes.kept, ShiftCodes):
        scaled = 0 if isinstance(codes.kept, Tensor) else codes.kept.scales.shape[1]
        return Cost(moved, tokens * rows * (kept + scaled), tokens * rows * kept)
    shift = codes.kept
    values = rows * shift.groups * (shift.sets + (shift.offsets is not None))
    adds = rows * kept * (shift.planes + (shift.offsets is not None)) + values * max(shift.terms, 1)
    return Cost(moved, tokens * values * (shift.terms == 0), tokens * adds, tokens * values * shift.terms)
