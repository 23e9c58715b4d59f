"""N:M weights in stored form: packed and back, what the operators compute, what they cost, and CUTLASS's layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import _semi_structured_conversions as pytorch

from ir.errors import UsageError
from ir.ops.cost import Cost
from ir.ops.cutlass import CutlassWeight, from_cutlass, to_cutlass
from ir.ops.nm import gather_kept, kept_inputs, pack_mask, scatter_kept, unpack_mask
from ir.ops.packing import pack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes, sparse_by_shifts, sparse_codes, sparse_cost
from tests.sparse_cases import int_codes, masks, random_mask, shift_codes, sparse_args, sparse_shift_args

F64 = torch.float64
nomul = torch.ops.nomul
PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2), (7, 8)]


@given(masks())
@settings(max_examples=60, deadline=None)
def test_masks_and_kept_weights_round_trip(drawn: tuple[Tensor, int, int]) -> None:
    mask, n, m = drawn
    rows, inputs = mask.shape
    packed = pack_mask(mask, n, m)
    assert packed.shape == (rows, (inputs + 7) // 8) and torch.equal(unpack_mask(packed, inputs), mask)
    weight = torch.randn(rows, inputs) * mask
    kept = gather_kept(weight, mask)
    assert kept.shape == (rows, kept_inputs(inputs, n, m)) and torch.equal(scatter_kept(kept, mask), weight)


@given(masks(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_stored_floats_are_the_weight_bit_for_bit(drawn: tuple[Tensor, int, int], dtype: torch.dtype) -> None:
    mask, n, m = drawn
    weight = (torch.randn(mask.shape) * mask).to(dtype)
    codes = sparse_codes(weight, mask, n, m)
    assert torch.equal(codes.dequantize(dtype), weight)
    element = weight.element_size()
    rows, inputs = mask.shape
    assert codes.stored_bits == 8 * rows * (inputs // m * n * element + (inputs + 7) // 8)


def test_a_kept_zero_is_stored_and_stays_kept() -> None:
    mask = torch.tensor([[True, True, False, False]])
    codes = sparse_codes(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), mask, 2, 4)
    assert torch.equal(codes.kept, torch.tensor([[0.0, 3.0]]))  # type: ignore[arg-type]
    assert torch.equal(unpack_mask(codes.mask, 4), mask)


def test_nothing_is_lost_silently() -> None:
    mask = random_mask(4, 16, 2, 4)
    with pytest.raises(UsageError, match="not zero where its mask keeps none") as caught:
        sparse_codes(torch.randn(4, 16), mask, 2, 4)
    assert "32 of its 64" in caught.value.why
    with pytest.raises(UsageError, match="keep 2 of every 4"):
        pack_mask(torch.ones(2, 8, dtype=torch.bool), 2, 4)
    unbalanced = mask.clone()
    unbalanced[2, 4:12] = torch.tensor([True, True, True, False, True, False, False, False])
    with pytest.raises(UsageError) as caught:
        pack_mask(unbalanced, 2, 4)
    assert caught.value.where == "row 2, inputs 4 to 7" and "3" in caught.value.why
    for n, m in ((0, 4), (4, 4), (2, 3)):
        with pytest.raises(UsageError, match=f"{n}:{m}"):
            pack_mask(mask, n, m)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_the_masked_product(n: int, m: int, bias: bool) -> None:
    mask = random_mask(7, 5 * m, n, m)
    weight = torch.randn(7, 5 * m, dtype=F64) * mask
    x, b = torch.randn(2, 3, 5 * m, dtype=F64), torch.randn(7, dtype=F64) if bias else None
    found = nomul.sparse_linear(*sparse_args(sparse_codes(weight, mask, n, m), x, b))
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, b), rtol=1e-13, atol=1e-13)
    assert found.shape == (2, 3, 7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_kept_weights_lie_around_zero(bits: int) -> None:
    codes = int_codes(6, 24, 2, 4, bits, group=4)
    weight = codes.dequantize(F64)
    mask = unpack_mask(codes.mask, 24)
    assert isinstance(codes.kept, QuantCodes) and not weight[~mask].any()
    assert torch.equal(weight[mask].view(6, -1), codes.kept.dequantize(F64))
    x = torch.randn(3, 24, dtype=F64)
    found = nomul.sparse_linear(*sparse_args(codes, x, None))
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-13, atol=1e-13)
    assert codes.stored_bits == 8 * 6 * ((12 * bits + 7) // 8 + 2 * 3 + 3)


@pytest.mark.parametrize(("code", "terms", "offsets"), [("planes", 2, True), ("planes", 0, True), ("trits", 2, False)])
def test_shift_add_codes_of_kept_weights(code: str, terms: int, offsets: bool) -> None:
    codes = shift_codes(6, 24, 2, 4, planes=2, group=4, terms=terms, offsets=offsets, code=code)
    weight, mask = codes.dequantize(F64), unpack_mask(codes.mask, 24)
    assert isinstance(codes.kept, ShiftCodes) and not weight[~mask].any()
    x, bias = torch.randn(3, 24, dtype=F64), torch.randn(6, dtype=F64)
    args = sparse_shift_args(codes, x, bias)
    wanted = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(nomul.sparse_shiftadd_linear(*args), wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(sparse_by_shifts(*args), wanted, rtol=1e-12, atol=1e-12)


def test_no_weight_is_decoded_by_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("a weight was decoded")

    codes = shift_codes(6, 24, 2, 4, planes=2, group=4, terms=2, offsets=True, code="planes")
    monkeypatch.setattr("ir.ops.shiftcode.dequantize", forbidden)
    monkeypatch.setattr("ir.ops.sparse.scatter_kept", forbidden)
    sparse_by_shifts(*sparse_shift_args(codes, torch.randn(2, 24), None))


def test_costs_count_kept_weights_and_the_mask() -> None:
    rows, inputs, tokens = 8, 32, 3
    moved = tokens * (rows + inputs) * 4
    mask = random_mask(rows, inputs, 2, 4)
    floats = sparse_codes(torch.randn(rows, inputs).half() * mask, mask, 2, 4)
    assert sparse_cost(floats, tokens) == Cost(rows * (16 * 2 + 4) + moved, tokens * rows * 16, tokens * rows * 16)
    ints = int_codes(rows, inputs, 2, 4, bits=4, group=8)
    assert sparse_cost(ints, tokens).multiplies == tokens * rows * (16 + 2)
    assert sparse_cost(ints, tokens).bytes == rows * (8 + 4 + 4) + moved
    shifts = shift_codes(rows, inputs, 2, 4, planes=3, group=8, terms=2, offsets=False, code="planes")
    cost = sparse_cost(shifts, tokens)
    assert cost.multiplies == 0 and cost.lookups == 0
    assert cost.adds == tokens * rows * (16 * 3 + 2 * 3 * 2) and cost.shifts == tokens * rows * 2 * 3 * 2


def masked(rows: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A 2:4 weight without zeros among those kept, and its mask."""
    mask = random_mask(rows, inputs, 2, 4)
    values = torch.randint(1, 100, (rows, inputs)) * torch.where(torch.rand(rows, inputs) < 0.5, -1, 1)
    return (values * mask).to(dtype), mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (64, 192), (96, 64), (192, 576)])
def test_cutlass_floats_are_those_of_pytorch_both_ways(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, mask = masked(*shape, dtype)
    codes = sparse_codes(weight, mask, 2, 4)
    found = to_cutlass(codes)
    values, meta = pytorch.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(found.values, values) and torch.equal(found.meta, meta)
    assert torch.equal(pytorch.sparse_semi_structured_to_dense_cutlass(found.values, found.meta), weight)
    back = from_cutlass(CutlassWeight(values, meta))
    assert torch.equal(back.dequantize(dtype), weight) and torch.equal(back.mask, codes.mask)


@pytest.mark.parametrize("shape", [(16, 128), (64, 256)])
def test_cutlass_int8_is_that_of_pytorch_both_ways(shape: tuple[int, int]) -> None:
    weight, mask = masked(*shape, torch.int8)
    kept = pack_bits((gather_kept(weight, mask).to(torch.int16) + 128).to(torch.uint8), 8)
    scales = torch.rand(shape[0], 1).half()
    inner = QuantCodes(kept, scales, None, 8, shape[1] // 2, shape[1] // 2)
    codes = SparseCodes(inner, pack_mask(mask, 2, 4), 2, 4, shape[1])
    found = to_cutlass(codes)
    values, meta = pytorch.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(found.values, values) and torch.equal(found.meta, meta)
    back = from_cutlass(found)
    assert isinstance(back.kept, QuantCodes) and torch.equal(back.kept.codes, kept)
    assert torch.equal(back.mask, codes.mask) and torch.equal(back.dequantize(), codes.dequantize())


def test_what_cutlass_cannot_hold_is_refused() -> None:
    mask = random_mask(32, 64, 2, 4)
    weight = torch.randn(32, 64) * mask
    with pytest.raises(UsageError, match="16-bit floats or 8-bit codes"):
        to_cutlass(sparse_codes(weight, mask, 2, 4))
    with pytest.raises(UsageError, match="tiles of 32 rows"):
        to_cutlass(sparse_codes(weight[:24].half(), mask[:24], 2, 4))
    other = random_mask(32, 64, 1, 4)
    with pytest.raises(UsageError, match="2:4 weights only"):
        to_cutlass(sparse_codes((torch.randn(32, 64) * other).half(), other, 1, 4))
    good = to_cutlass(sparse_codes(weight.half(), mask, 2, 4))
    with pytest.raises(UsageError, match="must ascend"):
        from_cutlass(CutlassWeight(good.values, torch.zeros_like(good.meta)))
