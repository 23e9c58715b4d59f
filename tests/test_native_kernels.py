"""The compiled kernels against float64, at every level that this CPU runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from backends.native.layout import pack
from backends.native.library import BLOCK, MODES, Library, load
from ir.errors import UnsupportedError, UsageError
from tests.coded_weights import exact_product, quant_codes, relative_error, shift_codes

# Bounds of relative error against float64: what each mode promises.
BOUNDS = {"exact": 1e-6, "14bit": 1e-4, "8bit": 3e-2}
LEVELS = load().levels
# Rows, inputs and group: tiny, ragged, whole, wide, with groups that fill no whole chunk and groups of a whole row.
SHAPES = [(1, 1, 64), (17, 33, 32), (33, 100, 40), (48, 64, 4096), (31, 576, 64), (129, 257, 96)]
some_codes = lru_cache(maxsize=None)(shift_codes)


@pytest.fixture(params=[level for level in LEVELS if level != "amx"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library at one level of those that decode in ways of their own; the fastest again afterwards."""
    found = load()
    found.use(request.param)
    yield found
    found.use(LEVELS[-1])


@pytest.fixture(params=LEVELS)
def library(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library at one level; the fastest again afterwards."""
    found = load()
    found.use(request.param)
    yield found
    found.use(LEVELS[-1])


def activations(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Return activations with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    return x * (1 + 9 * (torch.rand(inputs, generator=generator) < 0.02))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("planes", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_packed_weight_decodes_to_the_stored_one(planes: int, terms: int, offset: bool, decoder: Library) -> None:
    for index in (planes % 3, 3 + (planes + terms) % 3):
        codes = some_codes(*SHAPES[index][:2], planes, SHAPES[index][2], terms, offset, seed=index, spread=3)
        packed = pack(codes)
        assert packed.data.numel() == decoder.weight_bytes(packed.layout)
        assert torch.equal(decoder.decode(packed), codes.dequantize())


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_extreme_exponents_decode_exactly(terms: int, decoder: Library) -> None:
    codes = some_codes(64, 96, 3, 32, terms, True, seed=terms, spread=40)
    assert torch.equal(decoder.decode(pack(codes)), codes.dequantize())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_uniform_codes_decode_as_stored(bits: int, zeros: bool, decoder: Library) -> None:
    for rows, inputs, group in SHAPES:
        codes = quant_codes(rows, inputs, bits, group, zeros, seed=bits)
        found, wanted = decoder.decode(pack(codes)), codes.dequantize()
        assert torch.allclose(found, wanted, rtol=3e-7, atol=3e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("planes", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_within_the_bound_of_their_mode(
    shape: tuple[int, int, int], planes: int, mode: str, library: Library
) -> None:
    rows, inputs, group = shape
    terms, offset = planes % 5, planes != 3
    codes = some_codes(rows, inputs, planes, group, terms, offset, seed=planes, spread=2)
    packed, weight = pack(codes), codes.dequantize(torch.float64)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)) if offset else None
    for tokens in (1, 2, 3, 4, 5, 12, 24, 70):
        x = activations(tokens, inputs, seed=tokens)
        got = library.linear(x, packed, bias, mode, threads=1)
        assert relative_error(got, exact_product(x, weight, bias)) <= BOUNDS[mode], tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_products_are_within_the_bound_of_their_mode(bits: int, mode: str, library: Library) -> None:
    for rows, inputs, group in SHAPES:
        codes, x = quant_codes(rows, inputs, bits, group, True, seed=bits), activations(3, inputs)
        wanted = exact_product(x, codes.dequantize(torch.float64), None)
        assert relative_error(library.linear(x, pack(codes), None, mode, threads=1), wanted) <= BOUNDS[mode], rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (17, 33), (70, 100), (130, 576)])
def test_products_with_16_bit_floats_are_within_the_bound_of_their_mode(
    shape: tuple[int, int], dtype: torch.dtype, mode: str, library: Library
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1)) if shape[0] % 2 else None
    for tokens in (1, 2, 3, 7, 9, 40):
        x = activations(tokens, shape[1], seed=tokens)
        got = library.dense_linear(x, weight, bias, mode, threads=2)
        assert relative_error(got, exact_product(x, weight.double(), bias)) <= BOUNDS[mode], tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (17, 33), (70, 100), (130, 576)])
def test_products_with_scaled_int8_are_within_the_bound_of_their_mode(
    shape: tuple[int, int], mode: str, library: Library
) -> None:
    rows, inputs = shape
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    scales = torch.randn(rows, -(-inputs // BLOCK), generator=generator).half()
    weight = codes.double() * scales.double().repeat_interleave(BLOCK, 1)[:, :inputs]
    bias = torch.randn(rows, generator=generator) if rows % 2 else None
    for tokens in (1, 2, 3, 7, 9, 40):
        x = activations(tokens, inputs, seed=tokens)
        got = library.dense_linear(x, codes, bias, mode, 2, scales)
        assert relative_error(got, exact_product(x, weight, bias)) <= BOUNDS[mode], tokens


def test_int8_without_scales_is_refused(library: Library) -> None:
    codes = torch.zeros(4, 64, dtype=torch.int8)
    for scales in (None, torch.zeros(4, 1).half(), torch.zeros(4, 2)):
        with pytest.raises(UsageError, match="scales do not fit"):
            library.dense_linear(torch.zeros(1, 64), codes, scales=scales)
    with pytest.raises(UsageError, match="scales do not fit"):
        library.dense_linear(torch.zeros(1, 64), codes.half(), scales=torch.zeros(4, 2).half())


@pytest.mark.parametrize("tokens", [5, 20])
def test_threads_and_row_pieces_change_nothing(tokens: int, library: Library) -> None:
    codes = shift_codes(1000, 192, 3, 64, 2, True, seed=1, spread=2)
    packed, x = pack(codes), activations(tokens, 192)
    one = library.linear(x, packed, None, "14bit", threads=1)
    for threads in (2, 3, 8):
        assert torch.equal(library.linear(x, packed, None, "14bit", threads=threads), one)


# Few tokens are looked up one by one; many are multiplied in float, or as tiles, which rounds in another way.
@pytest.mark.parametrize("tokens, mode, limit", [(7, "14bit", 3e-6), (29, "exact", 3e-6), (29, "14bit", 1e-4)])
def test_a_token_alone_gives_what_it_gives_among_others(tokens: int, mode: str, limit: float, library: Library) -> None:
    codes = shift_codes(80, 320, 3, 64, 2, True, seed=2, spread=2)
    packed, x = pack(codes), activations(tokens, 320)
    whole = library.linear(x, packed, None, mode, threads=1)
    for t in range(tokens):
        alone = library.linear(x[t : t + 1], packed, None, mode, threads=1)[0]
        assert relative_error(alone, whole[t].double()) < limit


@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_zeros_give_the_bias(mode: str, library: Library) -> None:
    codes, bias = shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2), torch.arange(40.0)
    assert torch.equal(library.linear(torch.zeros(2, 96), pack(codes), bias, mode, threads=1), bias.expand(2, 40))


def test_no_tokens_give_no_results(library: Library) -> None:
    packed = pack(shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2))
    assert library.linear(torch.zeros(2, 0, 96), packed, None, "14bit", threads=2).shape == (2, 0, 40)


def test_what_does_not_fit_is_refused(library: Library) -> None:
    packed = pack(shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2))
    with pytest.raises(UsageError, match="activations do not fit"):
        library.linear(torch.zeros(2, 95), packed, None, "14bit", threads=1)
    with pytest.raises(UsageError, match="activations do not fit"):
        library.linear(torch.zeros(2, 96).double(), packed, None, "14bit", threads=1)
    with pytest.raises(UsageError, match="bias does not fit"):
        library.linear(torch.zeros(2, 96), packed, torch.zeros(41), "14bit", threads=1)
    with pytest.raises(UsageError, match="there is no mode"):
        library.linear(torch.zeros(2, 96), packed, None, "7bit", threads=1)
    with pytest.raises(UnsupportedError, match="there is no level riscv"):
        library.use("riscv")
