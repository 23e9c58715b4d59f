"""Random weights in stored form, for tests of kernels: nasty scales, ragged shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from ir.ops.codes import group_count
from ir.ops.packing import pack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes, encode


def shift_codes(
    rows: int, inputs: int, planes: int, group: int, terms: int, offset: bool, seed: int, spread: int
) -> ShiftCodes:
    """Return codes of sign planes whose scales span 2**+-spread between rows."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(inputs, group)
    signs = torch.rand(planes, rows, inputs, generator=generator) < 0.5
    octaves = torch.randint(-spread, spread + 1, (rows, 1, 1), generator=generator)
    alpha = torch.randn(rows, groups, planes, generator=generator).double() * 2.0**octaves
    z = torch.randn(rows, groups, generator=generator).double() * 2.0 ** octaves[..., 0] if offset else None
    return encode(signs, alpha, z, group, terms)


def quant_codes(rows: int, inputs: int, bits: int, group: int, zeros: bool, seed: int) -> QuantCodes:
    """Return uniform codes with float16 scales."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(inputs, group)
    codes = torch.randint(0, 2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    scales = (torch.randn(rows, groups, generator=generator) * 0.02).half()
    points = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8) if zeros else None
    packed = None if points is None else pack_bits(points, bits)
    return QuantCodes(pack_bits(codes, bits), scales, packed, bits, group, inputs)


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias in float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted| over all entries."""
    return float((got.double() - wanted).norm() / wanted.norm())
