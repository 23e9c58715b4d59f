"""`nomul::quant_linear`: a linear map whose weight is uniform integer codes with a scale and zero point per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ir.ops.cost import Cost
from ir.ops.packing import unpack_bits
from ir.ops.shiftcode import expand_groups, group_count


@dataclass(frozen=True)
class QuantCodes:
    """A uniformly quantised weight [N, in_features] in stored form: w = (code - zero) * scale.

    codes: uint8 bit stream [N, ceil(K*bits/8)]; scales: float16 [N, G]; zeros: uint8 bit stream [N, ceil(G*bits/8)], or
    None for a zero point of 2**(bits-1) everywhere.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    in_features: int

    @property
    def stored_bits(self) -> int:
        """Bits of all stored tensors, padding included."""
        tensors = [self.codes, self.scales] + ([] if self.zeros is None else [self.zeros])
        return sum(8 * t.numel() * t.element_size() for t in tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K]: an exact integer difference times the stored scale, rounded once to `dtype`."""
        groups = group_count(self.in_features, self.group)
        codes = unpack_bits(self.codes, self.bits, self.in_features).double()
        if self.zeros is None:
            zeros = torch.full_like(self.scales, 2.0 ** (self.bits - 1), dtype=torch.float64)
        else:
            zeros = unpack_bits(self.zeros, self.bits, groups).double()
        shifted = codes - expand_groups(zeros, self.group, self.in_features)
        return (shifted * expand_groups(self.scales.double(), self.group, self.in_features)).to(dtype)


@torch.library.custom_op("nomul::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    """Return x W^T + bias with W = (code - zero) * scale decoded from its codes.

    x: float [..., K]; codes, scales, zeros: the stored form of `QuantCodes` with N rows; bias: [N]. Returns [..., N] in
    x's dtype.
    """
    weight = QuantCodes(codes, scales, zeros, bits, group, x.shape[-1]).dequantize(x.dtype)
    return functional.linear(x, weight, bias)


@quant_linear.register_fake
def _(x, codes, scales, zeros, bias, bits, group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, bias, ctx.bits, ctx.group = inputs
    ctx.has_bias, ctx.inputs = bias is not None, x.shape[-1]
    ctx.save_for_backward(codes, scales, zeros)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The codes are constants; the gradient flows to the activations and the bias."""
    codes, scales, zeros = ctx.saved_tensors
    weight = QuantCodes(codes, scales, zeros, ctx.bits, ctx.group, ctx.inputs).dequantize(grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    return grad @ weight, None, None, None, grad_bias, None, None


quant_linear.register_autograd(_backward, setup_context=_save)


def quant_cost(codes: QuantCodes, tokens: int, element: int = 4) -> Cost:
    """Return the cost of one call: a dense product with the weights read as codes."""
    rows, inputs = codes.codes.shape[0], codes.in_features
    moved = codes.stored_bits // 8 + tokens * (rows + inputs) * element
    scale_muls = tokens * rows * codes.scales.shape[1]
    return Cost(moved, tokens * rows * inputs + scale_muls, tokens * rows * inputs)
