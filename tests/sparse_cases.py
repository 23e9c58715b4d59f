"""N:M masks, and stored N:M weights, drawn at random for tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ir.ops.codes import CODES, group_count
from ir.ops.nm import kept_inputs, pack_mask
from ir.ops.packing import pack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes, encode
from ir.ops.sparse import SparseCodes


def random_mask(rows: int, inputs: int, n: int, m: int, seed: int = 0) -> Tensor:
    """A mask, bool [rows, inputs], that keeps n of every m."""
    order = torch.rand(rows, inputs // m, m, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return (order < n).flatten(1)


@st.composite
def masks(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A mask of any pattern and shape, with its n and m."""
    m = draw(st.integers(2, 16))
    n = draw(st.integers(1, m - 1))
    rows, groups, seed = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(0, 1000))
    return random_mask(rows, groups * m, n, m, seed), n, m


def int_codes(rows: int, inputs: int, n: int, m: int, bits: int, group: int) -> SparseCodes:
    """A weight whose kept values are codes; `group` kept weights share a scale."""
    generator, kept = torch.Generator().manual_seed(1), kept_inputs(inputs, n, m)
    codes = torch.randint(0, 2**bits, (rows, kept), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, group_count(kept, group), generator=generator) + 0.1).half()
    inner = QuantCodes(pack_bits(codes, bits), scales, None, bits, group, kept)
    return SparseCodes(inner, pack_mask(random_mask(rows, inputs, n, m), n, m), n, m, inputs)


def shift_codes(
    rows: int, inputs: int, n: int, m: int, *, planes: int, group: int, terms: int, offsets: bool, code: str
) -> SparseCodes:
    """A weight whose kept values are planes of signs or trits."""
    generator, kept = torch.Generator().manual_seed(2), kept_inputs(inputs, n, m)
    groups = group_count(kept, group)
    digits = torch.randint(-1 if CODES[code].trits else 0, 2, (planes, rows, kept), generator=generator)
    alpha = torch.rand(rows, groups, CODES[code].sets(planes), generator=generator) + 0.1
    offset = torch.randn(rows, groups, generator=generator) if offsets else None
    inner = encode(digits, alpha, offset, group, terms, code=code)
    assert isinstance(inner, ShiftCodes)
    return SparseCodes(inner, pack_mask(random_mask(rows, inputs, n, m), n, m), n, m, inputs)


def sparse_args(codes: SparseCodes, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """Arguments of `nomul::sparse_linear`."""
    if isinstance(codes.kept, Tensor):
        return (x, codes.kept, codes.mask, None, bias, codes.n, codes.m)
    assert isinstance(codes.kept, QuantCodes)
    return (
        x,
        codes.kept.codes,
        codes.mask,
        codes.kept.scales,
        bias,
        codes.n,
        codes.m,
        codes.kept.bits,
        codes.kept.group,
    )


def sparse_shift_args(codes: SparseCodes, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """Arguments of `nomul::sparse_shiftadd_linear`."""
    kept = codes.kept
    assert isinstance(kept, ShiftCodes)
    stored = (kept.signs, kept.scales, kept.exponents, kept.offsets, codes.mask, bias, codes.n, codes.m)
    return (x, *stored, kept.group, kept.terms, kept.row_group, kept.code)
