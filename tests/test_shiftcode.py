"""The stored form of shift-add weights: rounding to power-of-two sums and exact, idempotent codes."""

import dataclasses
import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import UsageError
from ir.ops.codes import CODES, expand_rows, part_types
from ir.ops.packing import pack_bits, unpack_bits
from ir.ops.powerterms import round_power_terms_up
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import (
    ShiftCodes,
    decode_offsets,
    decode_planes,
    decode_scales,
    decode_zeros,
    dequantize,
    encode,
    encode_uniform,
    expand_groups,
    group_count,
    plane_scales,
    power_of_two,
    round_power_terms,
    take_rows,
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


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_rounding_is_nearest_of_all_representable_values(terms: int) -> None:
    x = log_uniform(600) % 1.0 + 0.5
    grid = torch.tensor(representable(terms), dtype=torch.float64)
    nearest = (x[:, None] - grid).abs().amin(1)
    rounded = round_power_terms(x, terms)
    assert torch.equal((x - rounded).abs(), nearest)
    assert bool(torch.isin(rounded, grid).all())
    up = round_power_terms_up(x, terms)
    assert torch.equal(up, grid[torch.searchsorted(grid, x)])
    assert torch.equal(round_power_terms_up(-x, terms), -up)


def test_rounding_error_bounds_and_order() -> None:
    x = log_uniform(20000)
    errors = [((round_power_terms(x, terms) - x) / x).abs() for terms in (1, 2, 3, 4)]
    for error, worst, mean in zip(
        errors, (1 / 3, 1 / 11, 1 / 43, 1 / 171), (0.17, 0.0284, 0.0047, 0.0008), strict=True
    ):
        assert 0.9 * worst < float(error.max()) <= worst + 1e-12
        assert float(error.mean()) == pytest.approx(mean, rel=0.03)
    assert all(bool((more <= fewer).all()) for fewer, more in pairwise(errors))


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
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
    for terms in (1, 2, 3, 4):
        for steps in product((2, 3, 5, 7), repeat=terms - 1):
            for signs in product((1, -1), repeat=terms - 1):
                depth = [sum(steps[: i + 1]) for i in range(terms - 1)]
                value = 1.0 + sum(s * 2.0**-d for s, d in zip(signs, depth, strict=True))
                assert round_power_terms(torch.tensor([value, -value]), terms).tolist() == [value, -value]


def test_window_zeroes_below_and_saturates_above() -> None:
    x = torch.tensor([0.124, 0.9, 3.0, 100.0, -100.0, 0.0], dtype=torch.float64)
    low, high = torch.tensor(-2), torch.tensor(1)
    assert round_power_terms(x, 1, low, high).tolist() == [0.0, 1.0, 2.0, 2.0, -2.0, 0.0]
    assert round_power_terms(x, 2, low, high).tolist() == [0.0, 0.875, 3.0, 3.0, -3.0, 0.0]


def make(
    rows: int,
    inputs: int,
    group: int,
    planes: int,
    terms: int,
    offset: bool,
    seed: int,
    spread: float,
    row_group: int = 1,
    code: str = "planes",
) -> ShiftCodes:
    generator = torch.Generator().manual_seed(seed)
    groups, tiles = math.ceil(inputs / group), math.ceil(rows / row_group)
    planes = 2 if code == "trits31" else planes
    spread = min(spread, 3.0) if terms == 0 else spread
    sets = CODES[code].sets(planes)
    digits = torch.randint(-1 if CODES[code].trits else 0, 2, (planes, rows, inputs), generator=generator)
    size = torch.exp2(torch.randn(tiles, groups, sets, generator=generator, dtype=torch.float64) * spread)
    alpha = size * torch.randn(tiles, groups, sets, generator=generator, dtype=torch.float64).sign()
    z = torch.randn(tiles, groups, generator=generator, dtype=torch.float64) if offset else None
    if code != "uniform":
        return encode(digits, alpha, z, group, terms, row_group, code)
    integers = (digits << torch.arange(planes)[:, None, None]).sum(0).to(torch.uint8)
    zeros = torch.randint(0, 2**planes, (tiles, groups), generator=generator, dtype=torch.uint8) if offset else None
    return encode_uniform(integers, alpha[..., 0], zeros, planes, group, terms, row_group)


def fields(codes: ShiftCodes) -> list[Tensor | None]:
    return [codes.signs, codes.scales, codes.exponents, codes.offsets]


CASE = {
    "rows": st.integers(1, 5),
    "inputs": st.integers(1, 45),
    "group": st.integers(1, 50),
    "planes": st.integers(1, 4),
    "terms": st.integers(0, 4),
    "row_group": st.integers(1, 4),
    "code": st.sampled_from(list(CODES)),
    "offset": st.booleans(),
    "seed": st.integers(0, 2**31),
    "spread": st.sampled_from([0.5, 3.0, 30.0]),
}


def encoded_again(c: ShiftCodes) -> ShiftCodes:
    """What a weight decodes to, encoded again."""
    if c.code == "uniform":
        integers = (decode_planes(c) > 0).to(torch.uint8) << torch.arange(c.planes, dtype=torch.uint8)[:, None, None]
        zeros = None if c.offsets is None else decode_zeros(c)
        integers = integers.sum(0, dtype=torch.uint8)
        return encode_uniform(integers, decode_scales(c)[..., 0], zeros, c.planes, c.group, c.terms, c.row_group)
    return encode(decode_planes(c), decode_scales(c), decode_offsets(c), c.group, c.terms, c.row_group, c.code)


@settings(max_examples=150, deadline=None)
@given(**CASE)
def test_encode_is_idempotent_and_sized_as_promised(**case: int) -> None:
    codes = make(**case)  # type: ignore[arg-type]
    again = encoded_again(codes)
    for first, second in zip(fields(codes), fields(again), strict=True):
        assert (first is None and second is None) or torch.equal(first, second)  # type: ignore[arg-type]
    c, offset = codes, codes.offsets is not None
    types = part_types(c.planes, c.rows, c.in_features, c.group, c.terms, c.row_group, c.code, offset)
    assert types == {name: (t.dtype, tuple(t.shape)) for name, t in codes.tensors().items()}
    sets, tiles, trits = CODES[c.code].sets(c.planes), math.ceil(c.rows / c.row_group), CODES[c.code].trits
    payload = math.ceil(c.groups * sets * c.terms / 2) + 2 if c.terms else 2 * c.groups * sets
    if offset and c.code == "uniform":
        payload += math.ceil(c.groups * c.planes / 8)
    elif offset:
        payload += math.ceil(c.groups * c.terms / 2) if c.terms else 2 * c.groups
    signs = c.planes * c.rows * math.ceil(c.in_features / (5 if trits else 8))
    assert codes.stored_bits == 8 * (signs + tiles * payload)


@settings(max_examples=60, deadline=None)
@given(**CASE)
def test_dequantize_is_the_definition(**case: int) -> None:
    codes = make(**case)  # type: ignore[arg-type]
    alpha, z, planes = plane_scales(codes), decode_offsets(codes), decode_planes(codes, torch.float64)
    dense = torch.empty(codes.rows, codes.in_features, dtype=torch.float64)
    for n, k in product(range(codes.rows), range(codes.in_features)):
        r, g = n // codes.row_group, k // codes.group
        exact = math.fsum(float(alpha[r, g, i] * planes[i, n, k]) for i in range(codes.planes))
        dense[n, k] = exact if z is None else math.fsum([exact, float(z[r, g])])
    bound = alpha.abs().amax() + (0 if z is None else z.abs().amax())
    torch.testing.assert_close(dequantize(codes, torch.float64), dense, rtol=1e-15, atol=4e-16 * float(bound))
    assert torch.equal(codes.dequantize(), dequantize(codes, torch.float64).float())


@settings(max_examples=40, deadline=None)
@given(terms=st.integers(1, 4), **{k: CASE[k] for k in ("rows", "inputs", "group", "seed")})
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
    for alpha, terms in (
        ([[[math.nan]]], 1),
        ([[[1.0], [1.0]]], 1),
        ([[[1.0]]], 5),
        ([[[1.0]]], -1),
        ([[[2.0**130]]], 1),
        ([[[7e4]]], 0),
    ):
        with pytest.raises(UsageError):
            encode(ones, torch.tensor(alpha, dtype=torch.float64), None, 4, terms)


def test_power_of_two_is_exact_over_the_normal_range() -> None:
    exponents = torch.arange(-1022, 1024)
    assert power_of_two(exponents).tolist() == [math.ldexp(1.0, e) for e in exponents.tolist()]


def test_codes_are_frozen() -> None:
    codes = encode(torch.ones(1, 1, 4), torch.ones(1, 1, 1), None, 4, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        codes.group = 2  # type: ignore[misc]


LAYOUTS = [("planes", 3), ("trits", 2), ("trits31", 2), ("uniform", 3), ("steps", 3)]


@pytest.mark.parametrize("terms", [0, 1, 4])
@pytest.mark.parametrize(("code", "planes"), LAYOUTS)
@pytest.mark.parametrize(("rows", "inputs", "group", "row_group"), [(7, 21, 8, 3), (10, 8, 8, 4), (5, 33, 1, 5)])
def test_both_ways_to_decode_agree(
    code: str,
    planes: int,
    terms: int,
    rows: int,
    inputs: int,
    group: int,
    row_group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = make(rows, inputs, group, planes, terms, True, 3, 3.0, row_group, code)
    found = codes.dequantize(torch.float64)
    for most in (0, 1 << 20):
        monkeypatch.setattr("ir.ops.shiftcode._MOST_LEVELS", most)
        assert torch.equal(codes.dequantize(torch.float64), found)


@pytest.mark.parametrize("terms", [0, 2])
@pytest.mark.parametrize(("code", "planes"), LAYOUTS)
def test_rows_can_be_taken_at_tiles_only(code: str, planes: int, terms: int) -> None:
    codes = make(11, 13, 4, planes, terms, True, 1, 2.0, 3, code)
    whole = codes.dequantize(torch.float64)
    for start, stop in ((0, 6), (3, 11), (9, 11), (0, 11)):
        assert torch.equal(take_rows(codes, start, stop).dequantize(torch.float64), whole[start:stop])
    for start, stop in ((1, 6), (3, 7), (0, 10)):
        with pytest.raises(UsageError, match="3 rows share"):
            take_rows(codes, start, stop)


@pytest.mark.parametrize(("code", "planes"), [("planes", 3), ("trits", 2), ("trits31", 2)])
@pytest.mark.parametrize("terms", [0, 3])
def test_negative_scales_turn_the_planes_of_their_tile(code: str, planes: int, terms: int) -> None:
    generator = torch.Generator().manual_seed(5)
    trits = CODES[code].trits
    digits = torch.randint(0, 2, (planes, 7, 10), generator=generator) * 2 - 1
    digits = digits * torch.randint(0, 2, digits.shape, generator=generator) if trits else digits
    alpha = torch.tensor([0.75, -1.5, 5.0])[torch.randint(0, 3, (3, 4, CODES[code].sets(planes)), generator=generator)]
    codes = encode(digits, alpha, None, 3, terms, 3, code)
    worth = torch.tensor([3.0, 1.0] if code == "trits31" else [1.0] * planes)
    spread = expand_groups(expand_rows(alpha * worth, 3, 7).permute(2, 0, 1), 3, 10)
    assert bool((decode_scales(codes) >= 0).all()) and bool((alpha < 0).any())
    assert torch.equal(codes.dequantize(torch.float64), (digits * spread).sum(0).double())


def uniform(rows: int, inputs: int, group: int, bits: int, zeros: bool, powers: bool, seed: int) -> QuantCodes:
    """Codes with scales of float16, some negative and subnormal, or with signed powers of two."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(inputs, group)
    integers = torch.randint(0, 2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    points = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(-7, 7, (rows, groups), generator=generator).double()
    signs = torch.randn(rows, groups, generator=generator).sign()
    nasty = torch.randn(rows, groups, generator=generator) * 2.0 ** torch.randint(
        -20, 4, (rows, groups), generator=generator
    )
    scales = (signs * 2**exponents if powers else nasty).half()
    packed = pack_bits(integers, bits)
    return QuantCodes(packed, scales, pack_bits(points, bits) if zeros else None, bits, group, inputs)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 6),
    inputs=st.integers(1, 45),
    group=st.integers(1, 50),
    bits=st.integers(1, 8),
    zeros=st.booleans(),
    powers=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_uniform_codes_are_imported_exactly(
    rows: int, inputs: int, group: int, bits: int, zeros: bool, powers: bool, seed: int
) -> None:
    given_codes = uniform(rows, inputs, group, bits, zeros, powers, seed)
    integers = unpack_bits(given_codes.codes, bits, inputs)
    groups = group_count(inputs, group)
    points = None if given_codes.zeros is None else unpack_bits(given_codes.zeros, bits, groups)
    codes = encode_uniform(integers, given_codes.scales, points, bits, group, 1 if powers else 0)
    assert torch.equal(codes.dequantize(torch.float64), given_codes.dequantize(torch.float64))
    assert torch.equal(codes.dequantize(), given_codes.dequantize())
    if inputs % 8 == 0 and not powers:
        assert codes.stored_bits == given_codes.stored_bits


def test_stored_bits_of_known_layouts() -> None:
    def bits(inputs: int, group: int, planes: int, code: str = "planes", terms: int = 0, row_group: int = 1) -> float:
        codes = make(64, inputs, group, planes, terms, True, 0, 1.0, row_group, code)
        return codes.stored_bits / (64 * inputs)

    assert bits(256, 128, 2) == 2.375 and bits(256, 64, 2) == 2.75 and bits(256, 128, 3) == 3.5
    assert bits(512, 64, 3, "uniform") == 3 + 19 / 64
    assert bits(320, 64, 2, "trits") == 3.2 + 48 / 64 and bits(320, 64, 2, "trits31") == 3.2 + 32 / 64
    # A tile of 8 columns and 64 rows shares one set: 3 scales and an offset of 16 bits for 512 weights.
    assert bits(256, 8, 3, row_group=64) == 3 + 4 * 16 / 512
    assert bits(256, 64, 2, terms=2) == 2 + (2 + 1) * 8 / 64 + 16 / 256


def test_a_pair_of_sign_planes_is_a_trit_in_integers() -> None:
    generator = torch.Generator().manual_seed(2)
    trits = torch.randint(-1, 2, (2, 7, 19), generator=generator)
    x = torch.randint(-128, 128, (5, 19), generator=generator)
    upper, lower = torch.where(trits >= 0, 1, -1), torch.where(trits > 0, 1, -1)
    for code in ("trits", "trits31"):
        kind = CODES[code]
        halves = [int(2 * sum(2.0**e for e in kind.powers(i))) for i in range(2)]
        worth = [int(sum(2.0**e for e in kind.digit_powers(i))) for i in range(2)]
        pairs = sum(h * (x @ (a + b).T) for h, a, b in zip(halves, upper, lower, strict=True))
        ternary = sum(w * (x @ t.T) for w, t in zip(worth, trits, strict=True))
        assert torch.equal(pairs, 2 * ternary)
        codes = encode(trits, torch.ones(1, 1, kind.sets(2)), None, 32, 1, 8, code)
        assert torch.equal(x.double() @ codes.dequantize(torch.float64).T, ternary.double())


def test_codes_that_do_not_exist_are_refused() -> None:
    for code, planes in (("bits", 2), ("trits31", 3), ("uniform", 2)):
        with pytest.raises(UsageError):
            encode(
                torch.ones(planes, 1, 4),
                torch.ones(1, 1, CODES.get(code, CODES["trits"]).sets(planes)),
                None,
                4,
                1,
                1,
                code,
            )
    with pytest.raises(UsageError, match="must be \\[1, 2\\]"):
        encode_uniform(torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3, 2), None, 2, 4, 0, 3)
    with pytest.raises(UsageError, match="does not fit 2 bits"):
        encode_uniform(torch.full((1, 4), 4, dtype=torch.uint8), torch.ones(1, 1), None, 2, 4, 0)
