"""The stored form of shift-add weights: rounding to power-of-two sums and exact, idempotent codes."""

import dataclasses
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import UsageError
from ir.ops.packing import unpack_bits
from ir.ops.shiftcode import (
    ShiftCodes,
    decode_offsets,
    decode_planes,
    decode_scales,
    dequantize,
    encode,
    power_of_two,
    round_power_terms,
)


def representable(terms: int) -> list[float]:
    """Every mantissa that a code can hold, from its definition, over a few octaves."""
    values = {1.0}
    for count in range(1, terms):
        for steps in product(range(1, 8), repeat=count):
            for signs in product((-1, 1), repeat=count):
                depth = [sum(steps[: i + 1]) for i in range(count)]
                values.add(1.0 + sum(s * 2.0**-d for s, d in zip(signs, depth, strict=True)))
    return sorted({v * 2.0**k for v in values for k in range(-4, 5)})


def log_uniform(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.rand(n, dtype=torch.float64, generator=generator) * 20 - 10)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_rounding_is_nearest_of_all_representable_values(terms: int) -> None:
    x = log_uniform(3000) % 1.0 + 0.5
    grid = torch.tensor(representable(terms), dtype=torch.float64)
    nearest = (x[:, None] - grid).abs().amin(1)
    rounded = round_power_terms(x, terms)
    assert torch.equal((x - rounded).abs(), nearest)
    assert bool(torch.isin(rounded, grid).all())


def test_rounding_error_bounds_and_order() -> None:
    x = log_uniform(20000)
    errors = [((round_power_terms(x, terms) - x) / x).abs() for terms in (1, 2, 3)]
    for error, worst in zip(errors, (1 / 3, 1 / 11, 0.0234), strict=True):
        assert float(error.max()) <= worst + 1e-12
    assert bool((errors[1] <= errors[0]).all()) and bool((errors[2] <= errors[1]).all())


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_rounding_symmetries(terms: int) -> None:
    x = log_uniform(500)
    rounded = round_power_terms(x, terms)
    assert torch.equal(round_power_terms(-x, terms), -rounded)
    assert torch.equal(round_power_terms(rounded, terms), rounded)
    for k in (-60, -7, 3, 41):
        assert torch.equal(round_power_terms(x * 2.0**k, terms), rounded * 2.0**k)
    assert round_power_terms(torch.zeros(2), terms).tolist() == [0.0, 0.0]


def test_rounding_is_exact_on_sums_of_distant_powers() -> None:
    assert round_power_terms(torch.tensor([5.0, -0.265625, 96.0]), 2).tolist() == [5.0, -0.265625, 96.0]
    assert round_power_terms(torch.tensor([73.0, 0.8125]), 3).tolist() == [73.0, 0.8125]


def test_window_zeroes_below_and_saturates_above() -> None:
    x = torch.tensor([0.124, 0.9, 3.0, 100.0, -100.0, 0.0], dtype=torch.float64)
    low, high = torch.tensor(-2), torch.tensor(1)
    assert round_power_terms(x, 1, low, high).tolist() == [0.0, 1.0, 2.0, 2.0, -2.0, 0.0]
    assert round_power_terms(x, 2, low, high).tolist() == [0.0, 0.875, 3.0, 3.0, -3.0, 0.0]


def make(
    rows: int, inputs: int, group: int, planes: int, terms: int, offset: bool, seed: int, spread: float
) -> ShiftCodes:
    generator = torch.Generator().manual_seed(seed)
    groups = math.ceil(inputs / group)
    signs = torch.rand(planes, rows, inputs, generator=generator) > 0.5
    size = torch.exp2(torch.randn(rows, groups, planes, generator=generator, dtype=torch.float64) * spread)
    alpha = size * torch.randn(rows, groups, planes, generator=generator, dtype=torch.float64).sign()
    z = torch.randn(rows, groups, generator=generator, dtype=torch.float64) if offset else None
    return encode(signs, alpha, z, group, terms)


def fields(codes: ShiftCodes) -> list[Tensor | None]:
    return [codes.signs, codes.scales, codes.exponents, codes.offsets]


CASE = {
    "rows": st.integers(1, 5),
    "inputs": st.integers(1, 45),
    "group": st.integers(1, 50),
    "planes": st.integers(1, 4),
    "terms": st.integers(1, 3),
    "offset": st.booleans(),
    "seed": st.integers(0, 2**31),
    "spread": st.sampled_from([0.5, 3.0, 30.0]),
}


@settings(max_examples=80, deadline=None)
@given(**CASE)
def test_encode_is_idempotent_and_sized_as_promised(**case: int) -> None:
    codes = make(**case)  # type: ignore[arg-type]
    again = encode(decode_planes(codes), decode_scales(codes), decode_offsets(codes), codes.group, codes.terms)
    for first, second in zip(fields(codes), fields(again), strict=True):
        assert (first is None and second is None) or torch.equal(first, second)  # type: ignore[arg-type]
    rows, groups, planes, terms = codes.rows, codes.groups, codes.planes, codes.terms
    payload = planes * math.ceil(codes.in_features / 8) + math.ceil(groups * planes * terms / 2) + 2
    payload += math.ceil(groups * terms / 2) if codes.offsets is not None else 0
    assert codes.stored_bits == 8 * rows * payload


@settings(max_examples=20, deadline=None)
@given(**CASE)
def test_dequantize_is_the_definition(**case: int) -> None:
    codes = make(**case)  # type: ignore[arg-type]
    alpha, z, planes = decode_scales(codes), decode_offsets(codes), decode_planes(codes, torch.float64)
    dense = torch.empty(codes.rows, codes.in_features, dtype=torch.float64)
    for n, k in product(range(codes.rows), range(codes.in_features)):
        g = k // codes.group
        exact = math.fsum(float(alpha[n, g, i] * planes[i, n, k]) for i in range(codes.planes))
        dense[n, k] = exact if z is None else math.fsum([exact, float(z[n, g])])
    torch.testing.assert_close(dequantize(codes, torch.float64), dense, rtol=1e-15, atol=0)
    assert torch.equal(codes.dequantize(), dequantize(codes, torch.float64).float())


@settings(max_examples=40, deadline=None)
@given(**{k: v for k, v in CASE.items() if k not in ("offset", "spread", "planes")})
def test_rounded_values_in_the_window_survive_bit_for_bit(**case: int) -> None:
    rows, inputs, group, terms = case["rows"], case["inputs"], case["group"], case["terms"]
    generator = torch.Generator().manual_seed(case["seed"])
    groups = math.ceil(inputs / group)
    raw = torch.exp2(torch.randn(rows, groups, 2, dtype=torch.float64, generator=generator) * 12)
    z = torch.randn(rows, groups, dtype=torch.float64, generator=generator) ** 5
    alpha = round_power_terms(raw, terms, torch.tensor(-14), torch.tensor(0))
    z = round_power_terms(z, terms, torch.tensor(-6), torch.tensor(0))
    codes = encode(torch.ones(2, rows, inputs, dtype=torch.bool), alpha, z, group, terms)
    offsets = decode_offsets(codes)
    assert torch.equal(decode_scales(codes), alpha) and offsets is not None and torch.equal(offsets, z)
    assert torch.equal(decode_scales(codes, torch.float32).double(), alpha)


def test_nibbles_of_a_hand_made_row() -> None:
    alpha = torch.tensor([[[5.0, 0.75], [0.0, 1.5]]])
    codes = encode(torch.ones(2, 1, 4), alpha, torch.tensor([[-0.75, 0.0]]), 2, 2)
    assert codes.exponents.tolist() == [[2, -1]]
    # 5 = 2^2 + 2^0; 0.75 = 2^-1 + 2^-2; 0; 1.5 = 2^0 + 2^-1. Equal values keep the lowest leading exponent.
    assert unpack_bits(codes.scales, 4, 8).tolist() == [[0, 2, 3, 1, 15, 0, 2, 1]]
    assert codes.offsets is not None
    # -0.75 = -(2^-1 + 2^-2): the sign sits in the first nibble, later signs are relative to it.
    assert unpack_bits(codes.offsets, 4, 4).tolist() == [[8, 1, 7, 0]]


def test_negative_scales_flip_their_plane_only() -> None:
    signs = torch.tensor([[[1, 0, 1, 1, 0]], [[0, 0, 1, 0, 1]]], dtype=torch.bool)
    alpha = torch.tensor([[[1.0, -0.5], [-2.0, 0.25]]])
    codes = encode(signs, alpha, None, 3, 1)
    pm = signs.double() * 2 - 1
    expected = pm[0] * torch.tensor([[1, 1, 1, -2, -2.0]]) + pm[1] * torch.tensor([[-0.5] * 3 + [0.25] * 2])
    assert torch.equal(dequantize(codes, torch.float64), expected)
    assert codes.signs.max() < 32


def test_what_leaves_the_row_window_becomes_zero() -> None:
    alpha = torch.tensor([[[2.0**-14], [2.0**-15], [1.0]]], dtype=torch.float64)
    z = torch.tensor([[2.0**-6, -(2.0**-7), -1.0]], dtype=torch.float64)
    codes = encode(torch.ones(1, 1, 3), alpha, z, 1, 2)
    assert decode_scales(codes).flatten().tolist() == [2.0**-14, 0.0, 1.0]
    assert decode_offsets(codes).flatten().tolist() == [2.0**-6, 0.0, -1.0]  # type: ignore[union-attr]
    tiny = encode(torch.ones(1, 1, 2), torch.tensor([[[2.0**-128], [2.0**-129]]], dtype=torch.float64), None, 1, 3)
    assert decode_scales(tiny).flatten().tolist() == [2.0**-128, 0.0]


def test_all_zero_row_is_zero() -> None:
    codes = encode(torch.ones(2, 3, 5), torch.zeros(3, 2, 2), torch.zeros(3, 2), 4, 3)
    assert codes.exponents.abs().max() == 0 and codes.dequantize().abs().max() == 0


def test_misuse_is_refused() -> None:
    ones = torch.ones(1, 1, 4)
    for alpha, terms in (([[[math.nan]]], 1), ([[[1.0], [1.0]]], 1), ([[[1.0]]], 4), ([[[2.0**130]]], 1)):
        with pytest.raises(UsageError):
            encode(ones, torch.tensor(alpha, dtype=torch.float64), None, 4, terms)


def test_power_of_two_is_exact_over_the_normal_range() -> None:
    exponents = torch.arange(-1022, 1024)
    assert power_of_two(exponents).tolist() == [math.ldexp(1.0, e) for e in exponents.tolist()]


def test_codes_are_frozen() -> None:
    codes = encode(torch.ones(1, 1, 4), torch.ones(1, 1, 1), None, 4, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        codes.group = 2  # type: ignore[misc]
