"""Bit streams: the layout is little-endian and dense, and packing loses nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import UsageError
from ir.ops.packing import pack_bits, packed_length, unpack_bits


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
