"""Codes without a tile order in ONNX Runtime: decoded by standard operators as they are stored, and told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.native.layout import refuses
from backends.onnxruntime.coded import coded_function, coding_of
from ir.ops.shiftcode import ShiftCodes, encode, encode_uniform
from tests.coded_weights import exact_product, shift_codes
from tests.coded_weights import relative_error as error_of
from tests.test_onnx_twins import run, twin_session


def decoded(codes: ShiftCodes) -> Tensor:
    """Return the weight as the function decodes it: its product with the identity."""
    assert refuses(codes) is not None
    session = twin_session(coded_function(coding_of(codes), False, 23), list(codes.tensors().values()), codes.rows)
    return run(session, torch.eye(codes.in_features)[None])[0].T


def assert_decoded(codes: ShiftCodes) -> None:
    """Hold a decoded weight to what the sum of its planes and offset may be rounded by in float32."""
    wanted, found = codes.dequantize(torch.float64), decoded(codes)
    largest = wanted.abs().amax(1, keepdim=True)
    assert found.shape == wanted.shape and bool(((found - wanted).abs() <= 1e-6 * largest).all())


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "inputs", "group"), [(1, 40, 8), (300, 64, 8), (130, 45, 7), (128, 33, 1)])
def test_small_groups(rows: int, inputs: int, group: int, terms: int, offset: bool) -> None:
    assert_decoded(shift_codes(rows, inputs, 1 + (rows + terms) % 8, group, terms, offset, seed=terms, spread=3))


@pytest.mark.parametrize("row_group", [3, 128, 200, 4096])
@pytest.mark.parametrize("terms", [0, 2])
def test_rows_that_share_scales(terms: int, row_group: int) -> None:
    generator = torch.Generator().manual_seed(row_group)
    rows, inputs = 300, 40
    tiles = -(-rows // row_group)
    signs = torch.rand(3, rows, inputs, generator=generator) < 0.5
    alpha, z = torch.rand(tiles, inputs, 3, generator=generator), torch.randn(tiles, inputs, generator=generator)
    assert_decoded(encode(signs, alpha, z, 1, terms, row_group))


@pytest.mark.parametrize("code", ["trits", "trits31", "steps"])
@pytest.mark.parametrize("terms", [0, 1, 3])
def test_trits_and_tied_planes(terms: int, code: str) -> None:
    generator = torch.Generator().manual_seed(terms)
    digits = torch.randint(-1 if code != "steps" else 0, 2, (2, 150, 47), generator=generator)
    alpha = torch.rand(75, 3, 2 if code == "trits" else 1, generator=generator)
    assert_decoded(encode(digits, alpha, torch.randn(75, 3, generator=generator), 16, terms, row_group=2, code=code))


def test_more_planes_than_kernels_have() -> None:
    generator = torch.Generator().manual_seed(0)
    digits, alpha = torch.randint(-1, 2, (5, 40, 64), generator=generator), torch.rand(40, 2, 5, generator=generator)
    assert_decoded(encode(digits, alpha, None, 32, 2, code="trits"))


@pytest.mark.parametrize("terms", [0, 2])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_uniform_planes_are_exact(bits: int, terms: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(0, 2**bits, (140, 50), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (140, 4), generator=generator, dtype=torch.uint8)
    for points in (zeros, None):
        codes = encode_uniform(integers, torch.rand(140, 4, generator=generator), points, bits, 16, terms)
        assert torch.equal(decoded(codes), codes.dequantize())


def test_bias_and_batches_without_tokens() -> None:
    codes, bias = shift_codes(140, 48, 3, 8, 2, True, seed=1, spread=2), torch.arange(140).float()
    session = twin_session(coded_function(coding_of(codes), True, 23), [*codes.tensors().values(), bias], 140)
    for batch, tokens in ((1, 1), (3, 5), (2, 0)):
        x = torch.randn(batch, tokens, 48, generator=torch.Generator().manual_seed(tokens))
        got, wanted = run(session, x), exact_product(x, codes.dequantize(torch.float64), bias)
        assert got.shape == wanted.shape and (tokens == 0 or error_of(got, wanted) < 1e-6)
