"""Uniform min-max rounding: codes are chosen against the stored scale and every group stays finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import UsageError
from passes.quantize.uniform import reconstruct, rtn


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    inputs=st.integers(1, 40),
    group=st.integers(1, 50),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_are_nearest_under_the_stored_scale(
    rows: int, inputs: int, group: int, bits: int, symmetric: bool, seed: int
) -> None:
    w = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    coded = rtn(w, bits, group, symmetric)
    groups = -(-inputs // group)
    assert coded.scales.shape == coded.zeros.shape == (rows, groups) and coded.scales.dtype == torch.float16
    assert int(coded.codes.max()) < 2**bits and int(coded.zeros.max()) < 2**bits
    which = torch.arange(inputs) // group
    levels = (torch.arange(2**bits)[:, None, None] - coded.zeros[:, which].float()) * coded.scales[:, which].float()
    nearest = (levels - w).abs().amin(0)
    torch.testing.assert_close((reconstruct(coded) - w).abs(), nearest, rtol=0, atol=1e-6)


def test_asymmetric_error_is_at_most_half_a_step() -> None:
    w = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) + 3.0
    coded = rtn(w, 4, 16)
    step = coded.scales.float().repeat_interleave(16, 1)
    assert bool(((coded.dequantize() - w).abs() <= step * 0.51).all())
    assert int(coded.zeros.max()) == 0


def test_grid_weights_come_back_exactly() -> None:
    codes = torch.arange(48).reshape(3, 16) % 16
    w = (codes.float() - 5) * 0.125
    assert torch.equal(rtn(w, 4, 16).dequantize(), w)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-9, -3.5, 1e5, 2.0**-30])
def test_constant_rows_are_finite(value: float, symmetric: bool) -> None:
    restored = rtn(torch.full((2, 10), value), 3, 4, symmetric).dequantize()
    assert bool(torch.isfinite(restored).all())
    assert abs(float(restored[0, 0]) - value) <= max(abs(value) * 0.2, 2.0**-24)


def test_weights_beyond_float16_scales_saturate_finitely() -> None:
    restored = rtn(torch.tensor([[3e38, -3e38, 1.0]]), 3, 3).dequantize()
    assert bool(torch.isfinite(restored).all()) and float(restored.abs().max()) <= 7 * 65504


def test_stored_bits_count_scales_and_zeros() -> None:
    assert rtn(torch.ones(4, 100), 3, 64).stored_bits == 4 * 100 * 3 + 4 * 2 * 19


@pytest.mark.parametrize(("bits", "group"), [(1, 8), (9, 8), (4, 0)])
def test_misuse_is_refused(bits: int, group: int) -> None:
    with pytest.raises(UsageError):
        rtn(torch.ones(2, 8), bits, group)
    with pytest.raises(UsageError):
        rtn(torch.full((2, 8), float("inf")), 4, 8)
