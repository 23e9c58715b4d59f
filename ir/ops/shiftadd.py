"""`nomul::shiftadd_linear`: a linear map whose weight is planes of signs or trits with power-of-two scales."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ir.ops.codes import Code, expand_rows, group_count, meaning
from ir.ops.cost import Cost
from ir.ops.packing import unpack_bits
from ir.ops.shift import shift
from ir.ops.shiftcode import (
    OFFSET_OCTAVES,
    SCALE_OCTAVES,
    ShiftCodes,
    decode_offsets,
    decode_plane,
    decode_scales,
    decode_zeros,
    dequantize,
)

# 2**22 values are 32 MiB in float64.
_SHIFTED_AT_ONCE = 1 << 22
# Inputs a look-up table covers: a byte of signs is its key.
_KEY = 8


@torch.library.custom_op("nomul::shiftadd_linear", mutates_args=())
def shiftadd_linear(
    x: Tensor,
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    group: int,
    terms: int,
    row_group: int = 1,
    code: str = "planes",
) -> Tensor:
    """Return x W^T + bias with W = z + sum_i alpha_i D_i decoded from its codes (ShiftAddLLM, 2406.05981, section 3).

    x: float [..., K]; signs to code: the stored form of `ir.ops.shiftcode.ShiftCodes` with N rows; bias: [N]. Returns
    [..., N] in x's dtype. This eager form multiplies by the decoded weight and defines the meaning;
    `shiftadd_by_shifts` is the same map without multiplies where terms > 0.
    """
    codes = ShiftCodes(signs, scales, exponents, offsets, group, terms, x.shape[-1], row_group, code)
    return functional.linear(x, dequantize(codes, x.dtype), bias)


@shiftadd_linear.register_fake
def _(x, signs, scales, exponents, offsets, bias, group, terms, row_group=1, code="planes"):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], signs.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, signs, scales, exponents, offsets, bias, *ctx.layout = inputs
    ctx.has_bias, ctx.inputs = bias is not None, x.shape[-1]
    ctx.save_for_backward(signs, scales, exponents, offsets)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The map is linear in x with constant codes, so the gradient flows through W alone."""
    signs, scales, exponents, offsets = ctx.saved_tensors
    group, terms, row_group, code = ctx.layout
    codes = ShiftCodes(signs, scales, exponents, offsets, group, terms, ctx.inputs, row_group, code)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    return grad @ dequantize(codes, grad.dtype), None, None, None, None, grad_bias, None, None, None, None


shiftadd_linear.register_autograd(_backward, setup_context=_save)


def shiftadd_by_shifts(
    x: Tensor,
    signs: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    offsets: Tensor | None,
    bias: Tensor | None,
    group: int,
    terms: int,
    row_group: int = 1,
    code: str = "planes",
) -> Tensor:
    """Evaluate `nomul::shiftadd_linear` by signed sums of activations and exponent shifts only.

    Arguments as for the operator. Per group and plane the activations are added with their signs, the sums of planes
    with one scale are joined by constant shifts, and each power-of-two term of the scale shifts what comes out
    (`ir.ops.shift.shift`); no weight is ever decoded to a float. With terms = 0 the scales are no short sums of powers
    of two, and that last step multiplies the sums by them.
    """
    codes = ShiftCodes(signs, scales, exponents, offsets, group, terms, x.shape[-1], row_group, code)
    total = by_shifts(x, codes)
    return total if bias is None else total + bias


def by_shifts(x: Tensor, codes: ShiftCodes, index: Tensor | None = None) -> Tensor:
    """Return x W^T for x [..., K], evaluated as `shiftadd_by_shifts` says.

    index: which inputs of x each row reads, i64 [N, in_features of the codes]; None for all of them in order.
    """
    # Some tokens at a time, so that what is shifted, one value a token, row and group, stays small.
    step = max(1, _SHIFTED_AT_ONCE // (codes.rows * (codes.groups if index is None else codes.in_features)))
    parts = [_tokens_by_shifts(tokens, codes, index) for tokens in x.reshape(-1, x.shape[-1]).split(step)]
    return torch.cat(parts).reshape(*x.shape[:-1], codes.rows)


def _tokens_by_shifts(x: Tensor, codes: ShiftCodes, index: Tensor | None) -> Tensor:
    """Return x W^T for tokens x [T, K]."""
    # A row of its own for every token, or for every token and row of the weight.
    grouped = (
        _grouped(x, codes)[:, None]
        if index is None
        else _grouped(x[:, index].flatten(0, 1), codes).unflatten(0, (-1, codes.rows))
    )
    group_sums = grouped.sum(-1)
    total = x.new_zeros(x.shape[0], codes.rows)
    for which in range(codes.sets):
        planes = range(codes.planes) if codes.meaning.tied else (which,)
        sums = x.new_zeros(x.shape[0], codes.rows, codes.groups)
        for plane in planes:
            plane_sums = _plane_sums(grouped, group_sums, codes, plane)
            for power in codes.meaning.digit_powers(plane):
                sums = sums + (shift(plane_sums, torch.tensor(power)) if power else plane_sums)
        total = total + _scaled(sums, codes, which)
    if codes.offsets is not None and codes.code != "uniform":
        total = total + _offset_sums(group_sums.expand(-1, codes.rows, -1), codes)
    return total


def _grouped(values: Tensor, codes: ShiftCodes) -> Tensor:
    """Return values [M, K] by group, [M, G, group], the last one filled up with zeros."""
    pad = codes.groups * codes.group - codes.in_features if codes.group < codes.in_features else 0
    grouped: Tensor = functional.pad(values, (0, pad)).unflatten(1, (codes.groups, -1))
    return grouped


def _plane_sums(grouped: Tensor, group_sums: Tensor, codes: ShiftCodes, plane: int) -> Tensor:
    """Return the sums [T, N, G] of the activations [T, 1 or N, G, group] with the digits of one plane as their signs.

    Bit by bit like the code itself, a uniform zero point takes its own sign times the group's sum [T, 1 or N, G] off.
    """
    digits = _grouped(decode_plane(codes, plane).to(grouped.dtype), codes)
    shared = grouped.shape[1] == 1
    sums = torch.einsum("tgk,ngk->tng", grouped[:, 0], digits) if shared else (grouped * digits).sum(-1)
    if codes.code != "uniform":
        return sums
    bit = expand_rows(decode_zeros(codes) >> plane & 1, codes.row_group, codes.rows)
    return sums - torch.where(bit.bool(), group_sums, -group_sums)


def _scaled(sums: Tensor, codes: ShiftCodes, which: int) -> Tensor:
    """Return the sum over groups of `sums` [T, N, G] times the scales of one set, [T, N]."""
    if codes.terms == 0:
        scale = expand_rows(decode_scales(codes, sums.dtype)[..., which], codes.row_group, codes.rows)
        return (sums * scale).sum(-1)
    nibbles = unpack_bits(codes.scales, 4, codes.groups * codes.sets * codes.terms)
    nibbles = nibbles.reshape(codes.tiles, codes.groups, codes.sets, codes.terms)[:, :, which]
    return _shift_terms(sums, nibbles, 0, codes)


def _offset_sums(sums: Tensor, codes: ShiftCodes) -> Tensor:
    """Return the sum over groups of `sums` [T, N, G] times the offsets, [T, N]."""
    if codes.terms == 0:
        offset = decode_offsets(codes, sums.dtype)
        assert offset is not None
        return (sums * expand_rows(offset, codes.row_group, codes.rows)).sum(-1)
    assert codes.offsets is not None
    nibbles = unpack_bits(codes.offsets, 4, codes.groups * codes.terms)
    return _shift_terms(sums, nibbles.reshape(codes.tiles, codes.groups, codes.terms), 1, codes)


def _shift_terms(sums: Tensor, nibbles: Tensor, column: int, codes: ShiftCodes) -> Tensor:
    """Return the sum over groups and terms of `sums` [T, N, G] shifted by the exponents in `nibbles` [tiles, G, terms].

    column: 0 for scales, 1 for offsets, which have a sign.
    """
    assert codes.exponents is not None
    nibbles = expand_rows(nibbles, codes.row_group, codes.rows)
    row = expand_rows(codes.exponents[:, column], codes.row_group, codes.rows)
    first = nibbles[..., 0] & 7 if column else nibbles[..., 0]
    negative = (nibbles[..., 0] >> 3).bool() if column else torch.zeros_like(first, dtype=torch.bool)
    present = first < (OFFSET_OCTAVES if column else SCALE_OCTAVES)
    exponent = row.long()[:, None] - first.long()
    out = torch.where(present, shift(torch.where(negative, -sums, sums), exponent), 0.0).sum(-1)
    for nibble in nibbles[..., 1:].unbind(-1):
        delta = (nibble & 7).long()
        present, exponent = present & (delta > 0), exponent - delta
        minus = (nibble >> 3).bool() ^ negative
        out = out + torch.where(present, shift(torch.where(minus, -sums, sums), exponent), 0.0).sum(-1)
    return out


def shiftadd_cost(codes: ShiftCodes, tokens: int, element: int = 4) -> Cost:
    """Return the cost of one call on `tokens` tokens of `element`-byte activations, as `shiftadd_cost_of` counts it."""
    return shiftadd_cost_of(
        planes=codes.planes,
        rows=codes.rows,
        in_features=codes.in_features,
        groups=codes.groups,
        scale_sets=codes.sets,
        terms=codes.terms,
        row_group=codes.row_group,
        has_offset=codes.offsets is not None,
        stored_bytes=codes.stored_bits // 8,
        tokens=tokens,
        element=element,
        code=codes.code,
    )


def shiftadd_cost_of(
    *,
    planes: int,
    rows: int,
    in_features: int,
    groups: int,
    scale_sets: int,
    terms: int,
    row_group: int,
    has_offset: bool,
    stored_bytes: int,
    tokens: int,
    element: int = 4,
    code: str = "planes",
) -> Cost:
    """Return the cost of a shift-add linear with 8-input look-up tables, from numbers alone.

    planes: as stored, a plane of trits counts once; groups: along a row; scale_sets: scales stored a group; has_offset:
    whether offsets or zero points are stored. A table of 8 activations has 256 signed sums, 128 by symmetry, each one
    add from another (LUT-GEMM). Scales either follow the look-ups, `terms` shifts and adds a row, group and set, with
    tables cut at groups; or go before them, on every activation, with tables of their own for every set and tile of
    rows. The second order pays where few tiles have many groups; the one of fewer operations is counted. Every look-up
    is followed by one add. terms = 0 multiplies where it would shift.
    """
    kind, tiles = meaning(code, planes), group_count(rows, row_group)
    keys, joins = planes * (2 if kind.trits else 1), _joins(kind, planes)
    after = _scales_after(keys, rows, in_features, groups, scale_sets, terms, joins)
    before = _scales_before(keys, rows, in_features, tiles, scale_sets, terms, joins)
    one = min(after, before, key=lambda cost: cost.operations)
    if has_offset or code == "uniform":
        # Zero points multiply a group's sum, bit by bit, before the scale does.
        zero_bits = planes if code == "uniform" and has_offset else 0
        values = tiles * groups
        adds = in_features + values * (zero_bits + max(terms, 1)) + rows
        one += Cost(0, values * (terms == 0), adds, values * terms + groups * zero_bits)
    moved = stored_bytes + tokens * (rows + in_features) * element
    return Cost(moved, tokens * one.multiplies, tokens * one.adds, tokens * one.shifts, tokens * one.lookups)


def _joins(kind: Code, planes: int) -> tuple[int, int]:
    """Return the adds and the shifts that join, for one row, the sums of sign planes to one sum per scale."""
    adds = shifts = 0
    for first in range(1 if kind.tied else planes):
        powers = [e for i in (range(planes) if kind.tied else (first,)) for e in kind.digit_powers(i)]
        pairs = (planes if kind.tied else 1) if kind.trits else 0
        # The least power is the scale's own.
        adds, shifts = adds + pairs + len(powers) - 1, shifts + sum(e > min(powers) for e in powers)
    return adds, shifts


def _scales_after(
    keys: int, rows: int, in_features: int, groups: int, sets: int, terms: int, joins: tuple[int, int]
) -> Cost:
    """Return the operations for one token when sums are scaled: one table for all planes and rows."""
    width = group_count(in_features, groups)
    last = in_features - (groups - 1) * width
    tables = (groups - 1) * group_count(width, _KEY) + group_count(max(last, 0), _KEY)
    lookups, values = keys * rows * tables, rows * groups
    adds = tables * _table_adds(width) + lookups + values * (joins[0] + sets * max(terms, 1))
    return Cost(0, values * sets * (terms == 0), adds, values * (joins[1] + sets * terms), lookups)


def _scales_before(
    keys: int, rows: int, in_features: int, tiles: int, sets: int, terms: int, joins: tuple[int, int]
) -> Cost:
    """Return the operations for one token when activations are scaled: tables for every set and tile of rows."""
    tables, scaled = group_count(in_features, _KEY), tiles * sets * in_features
    lookups = keys * rows * tables
    adds = scaled * max(terms - 1, 0) + tiles * sets * tables * _table_adds(in_features) + lookups
    adds += rows * (joins[0] + sets)
    return Cost(0, scaled * (terms == 0), adds, scaled * terms + rows * joins[1], lookups)


def _table_adds(width: int) -> int:
    """Return the adds that make one table of at most 8 inputs; half of its sums are the others' negatives."""
    return 2 ** (min(width, _KEY) - 1) if width > 1 else 0
