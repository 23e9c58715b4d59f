"""Bit streams: the layout is little-endian and dense, and packing loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import UsageError
from ir.ops.packing import pack_bits, packed_length, unpack_bits
from ir.ops.trits import pack_trits, trit_bytes, unpack_trits


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(1, 37), rows=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_round_trip_and_layout(bits: int, n: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, n), dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.shape == (2, rows, packed_length(n, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, n), codes)
    stream = sum(int(c) << (i * bits) for i, c in enumerate(codes[1, -1].tolist()))
    assert bytes(packed[1, -1].tolist()) == stream.to_bytes(packed_length(n, bits), "little")


def test_three_bit_codes_cross_bytes() -> None:
    packed = pack_bits(torch.tensor([1, 2, 7], dtype=torch.uint8), 3)
    assert packed.tolist() == [0b11010001, 0b1]


def test_strided_input_packs_like_its_copy() -> None:
    codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6).T % 8
    assert torch.equal(pack_bits(codes, 3), pack_bits(codes.contiguous(), 3))


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (torch.tensor([4], dtype=torch.uint8), 2),
        (torch.tensor([1], dtype=torch.int32), 2),
        (torch.tensor([1], dtype=torch.uint8), 0),
        (torch.tensor([1], dtype=torch.uint8), 9),
    ],
)
def test_misuse_is_refused(codes: torch.Tensor, bits: int) -> None:
    with pytest.raises(UsageError):
        pack_bits(codes, bits)


def test_wrong_stream_length_is_refused() -> None:
    with pytest.raises(UsageError):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 4, 5)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 37), rows=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_trits_round_trip_and_layout(n: int, rows: int, seed: int) -> None:
    digits = torch.randint(-1, 2, (2, rows, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_trits(digits)
    assert packed.shape == (2, rows, trit_bytes(n)) and packed.dtype == torch.uint8
    found = unpack_trits(packed, n)
    assert found.dtype == torch.int8 and torch.equal(found.long(), digits)
    filled = digits[1, -1].tolist() + [0] * (-n % 5)
    for byte, value in enumerate(packed[1, -1].tolist()):
        assert value == sum((t + 1) * 3**i for i, t in enumerate(filled[5 * byte : 5 * byte + 5]))


def test_five_trits_take_a_byte_and_a_sixth_another() -> None:
    assert pack_trits(torch.tensor([-1, -1, -1, -1, -1])).tolist() == [0]
    assert pack_trits(torch.tensor([1, 1, 1, 1, 1, -1])).tolist() == [242, 120]


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), inputs=st.integers(1, 43), seed=st.integers(0, 2**31), trits=st.booleans())
def test_permuted_columns_come_back_in_place(rows: int, inputs: int, seed: int, trits: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(inputs, generator=generator)
    if trits:
        digits = torch.randint(-1, 2, (rows, inputs), generator=generator, dtype=torch.int8)
        found = unpack_trits(pack_trits(digits[:, order]), inputs)
    else:
        digits = torch.randint(0, 2, (rows, inputs), generator=generator, dtype=torch.uint8)
        found = unpack_bits(pack_bits(digits[:, order], 1), 1, inputs)
    assert torch.equal(found[:, order.argsort()], digits)


@pytest.mark.parametrize("digits", [torch.tensor([0, 2]), torch.tensor([-2.0]), torch.tensor([0.5])])
def test_what_is_no_trit_is_refused(digits: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        pack_trits(digits)


@pytest.mark.parametrize("packed", [torch.tensor([1.0]), torch.tensor([1, 1], dtype=torch.uint8)])
def test_streams_that_hold_no_five_trits_are_refused(packed: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        unpack_trits(packed, 5)
