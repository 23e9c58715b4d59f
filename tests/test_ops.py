"""The nomul operators: registered properly with torch, right against independent formulas, exact where promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ir.errors import UsageError
from ir.ops.codes import CODES
from ir.ops.cost import Cost, linear_cost
from ir.ops.packing import pack_bits
from ir.ops.quant import QuantCodes, quant_cost
from ir.ops.shift import shift
from ir.ops.shiftadd import shiftadd_by_shifts, shiftadd_cost, shiftadd_cost_of
from ir.ops.shiftcode import ShiftCodes, decode_planes, dequantize, encode, encode_uniform, group_count
from ir.ops.sparse import sparse_codes
from tests.sparse_cases import int_codes, random_mask, shift_codes, sparse_args, sparse_shift_args

nomul = torch.ops.nomul
F64 = torch.float64
SMALLEST_SUBNORMAL, LARGEST = -149, 127
FORMS = [("planes", 3), ("steps", 3), ("trits", 2), ("trits31", 2)]


def random_codes(
    rows: int,
    inputs: int,
    group: int,
    planes: int = 2,
    terms: int = 2,
    offsets: bool = True,
    seed: int = 0,
    whole: bool = False,
    row_group: int = 1,
    code: str = "planes",
) -> ShiftCodes:
    """Codes of seeded planes, scales of both signs spread over many octaves (some zero) and signed offsets.

    whole: scales and offsets are multiples of 2**-27 below 2**4, so that sums of small integers are exact in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    groups, tiles, sets = group_count(inputs, group), group_count(rows, row_group), CODES[code].sets(planes)
    digits = torch.randint(-1 if CODES[code].trits else 0, 2, (planes, rows, inputs), generator=generator)
    octave = torch.randint(-6 if whole or not terms else -20, 3, (tiles, groups, sets), generator=generator).double()
    alpha = torch.rand(tiles, groups, sets, generator=generator).double().add(1).mul(2**octave)
    alpha = alpha * (torch.randint(0, 2, alpha.shape, generator=generator) * 2 - 1)
    alpha[torch.rand(alpha.shape, generator=generator) < 0.1] = 0.0
    offset = torch.randn(tiles, groups, generator=generator).double()
    offset[torch.rand(offset.shape, generator=generator) < 0.1] = 0.0
    if code != "uniform":
        return encode(digits, alpha, offset if offsets else None, group, terms, row_group, code)
    integers = (digits << torch.arange(planes)[:, None, None]).sum(0).to(torch.uint8)
    zeros = torch.randint(0, 2**planes, (tiles, groups), generator=generator).to(torch.uint8)
    return encode_uniform(integers, alpha[..., 0], zeros if offsets else None, planes, group, terms, row_group)


def shift_args(codes: ShiftCodes, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    stored = (codes.signs, codes.scales, codes.exponents, codes.offsets)
    layout = () if codes.row_group == 1 and codes.code == "planes" else (codes.row_group, codes.code)
    return (x, *stored, bias, codes.group, codes.terms, *layout)


def nested_args(x: Tensor, bias: Tensor | None, terms: int, offsets: bool, precision: int) -> tuple[Any, ...]:
    """Arguments of `nested_linear` with 5 rows and precisions 1 and 3."""
    pair = [random_codes(5, x.shape[-1], 4, planes, terms, offsets, row_group=2).tensors() for planes in (1, 3)]
    lists = [[codes[name] for codes in pair if name in codes] for name in ("scales", "exponents", "offsets")]
    return (x, pair[1]["signs"], *lists, bias, 4, terms, 2, [1, 3], precision)


def random_quant(rows: int, inputs: int, group: int, bits: int, zeros: bool, seed: int = 0) -> QuantCodes:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(inputs, group)
    codes = torch.randint(0, 2**bits, (rows, inputs), generator=generator, dtype=torch.uint8)
    points = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    return QuantCodes(pack_bits(codes, bits), scales, pack_bits(points, bits) if zeros else None, bits, group, inputs)


def quant_args(codes: QuantCodes, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    return (x, codes.codes, codes.scales, codes.zeros, bias, codes.bits, codes.group)


def angles(seq: int, width: int, interleaved: bool, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines [1, 1, seq, width] with equal entries in a pair, and the angles [seq, width / 2]."""
    theta = torch.outer(torch.arange(seq, dtype=F64) + 3, 10000.0 ** (-torch.arange(width // 2, dtype=F64) / width * 2))
    spread = theta.repeat_interleave(2, -1) if interleaved else torch.cat([theta, theta], -1)
    return spread.cos().to(dtype)[None, None], spread.sin().to(dtype)[None, None], theta


def grouped_args(dtype: torch.dtype = F64, ends: tuple[int, ...] = (2, 2, 5, 6)) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(7, 5, dtype=dtype), torch.randn(4, 3, 5, dtype=dtype), torch.tensor(ends, dtype=torch.int32)


def op_cases() -> list[Any]:
    """Every operator with arguments of several shapes: (name, operator, arguments, differentiable ones, contiguity)."""
    cases = []
    for interleaved, width in ((False, 8), (True, 4)):
        cos, sin, _ = angles(3, width, interleaved)
        x = torch.randn(2, 4, 3, 8, dtype=F64)
        name = f"rope-{'neighbours' if interleaved else 'halves'}-{width}"
        cases.append(pytest.param(nomul.rope, (x, cos, sin, interleaved), (0,), id=name))
    turned = torch.randn(2, 3, 4, 8, dtype=F64).transpose(1, 2)
    cases.append(pytest.param(nomul.rope, (turned, *angles(3, 8, False)[:2], False), (0,), id="rope-strided"))
    last = torch.randn(2, 3, 8, 4, dtype=F64).permute(0, 3, 1, 2)
    cases.append(pytest.param(nomul.rope, (last, *angles(3, 8, False)[:2], False), (0,), id="rope-channels-last"))
    for offsets, bias in ((True, True), (False, False)):
        codes = random_codes(5, 11, 4, offsets=offsets)
        args = shift_args(codes, torch.randn(2, 3, 11, dtype=F64), torch.randn(5, dtype=F64) if bias else None)
        cases.append(pytest.param(nomul.shiftadd_linear, args, (0, 5) if bias else (0,), id=f"shiftadd-{offsets}"))
        quant = random_quant(5, 11, 4, 3, zeros=offsets)
        args = quant_args(quant, torch.randn(2, 3, 11, dtype=F64), torch.randn(5, dtype=F64) if bias else None)
        cases.append(pytest.param(nomul.quant_linear, args, (0, 4) if bias else (0,), id=f"quant-{offsets}"))
    for code, planes, terms in (
        ("uniform", 3, 1),
        ("uniform", 2, 0),
        ("trits", 2, 4),
        ("trits31", 2, 1),
        ("planes", 2, 0),
        ("steps", 3, 0),
        ("steps", 2, 2),
    ):
        codes = random_codes(5, 11, 4, planes, terms, offsets=terms != 1, row_group=2, code=code)
        args = shift_args(codes, torch.randn(2, 3, 11, dtype=F64), torch.randn(5, dtype=F64))
        cases.append(pytest.param(nomul.shiftadd_linear, args, (0, 5), id=f"shiftadd-{code}-{terms}"))
    for precision, terms, offsets in ((1, 2, True), (3, 0, False)):
        bias = torch.randn(5, dtype=F64) if offsets else None
        args = nested_args(torch.randn(2, 3, 11, dtype=F64), bias, terms, offsets, precision)
        cases.append(pytest.param(nomul.nested_linear, args, (0, 5) if offsets else (0,), id=f"nested-{precision}"))
    x, bias = torch.randn(2, 3, 24, dtype=F64), torch.randn(5, dtype=F64)
    mask = random_mask(5, 24, 2, 4)
    floats = sparse_codes(torch.randn(5, 24, dtype=F64) * mask, mask, 2, 4)
    cases.append(pytest.param(nomul.sparse_linear, sparse_args(floats, x, bias), (0, 4), id="sparse-float"))
    ints = int_codes(5, 24, 2, 4, bits=3, group=5)
    cases.append(pytest.param(nomul.sparse_linear, sparse_args(ints, x, None), (0,), id="sparse-int"))
    shifts = shift_codes(5, 24, 1, 4, planes=2, group=4, terms=2, offsets=True, code="planes")
    args = sparse_shift_args(shifts, x, bias)
    cases.append(pytest.param(nomul.sparse_shiftadd_linear, args, (0, 6), id="sparse-shiftadd"))
    cases.append(pytest.param(nomul.grouped_linear, grouped_args(), (0, 1), id="grouped"))
    cases.append(pytest.param(nomul.grouped_linear, grouped_args(ends=(0, 0, 0, 7)), (0, 1), id="grouped-one-expert"))
    for transposed in (False, True):
        turned = (torch.randn(2, 3, 24, dtype=F64), torch.tensor([3, 200, 77], dtype=torch.uint8), 12, transposed)
        cases.append(pytest.param(nomul.hadamard, turned, (0,), id=f"hadamard-{transposed}"))
    outer = (torch.randn(7, 3, dtype=F64), *grouped_args()[::2])
    cases.append(pytest.param(nomul.grouped_outer, outer, (), id="grouped-outer"))
    tokens = torch.randn(2, 3, 5, 11, dtype=F64)
    for bits, symmetric in ((4, False), (3, True)):
        rows = nomul.encode_tokens(tokens, bits, symmetric)
        for op, args in (
            (nomul.encode_tokens, (tokens.transpose(1, 2), bits, symmetric)),
            (nomul.decode_tokens, (rows, bits, 11, F64)),
            # Its gradient is no derivative; tests/test_tokens.py has it.
            (nomul.straight_tokens, (tokens, bits, symmetric)),
        ):
            cases.append(pytest.param(op, args, (), id=f"{op.__name__}-{bits}"))
    return cases


def test_every_nomul_op_is_covered_here() -> None:
    registered = {str(name) for name in torch._C._dispatch_get_all_op_names() if name.startswith("nomul::")}
    covered = {f"nomul::{case.values[0].__name__}" for case in op_cases()}
    # The operator of the target native, there once that was imported, is in test_native_torch.
    assert registered - {"nomul::tiled_linear"} == covered


@pytest.mark.parametrize(("op", "args", "wrt"), op_cases())
def test_opcheck(op: Callable[..., Tensor], args: tuple[Any, ...], wrt: tuple[int, ...]) -> None:
    leaves = tuple(a.detach().clone().requires_grad_() if i in wrt else a for i, a in enumerate(args))
    torch.library.opcheck(op, leaves)


@pytest.mark.parametrize(("op", "args", "wrt"), [case for case in op_cases() if case.values[2]])
def test_gradients_in_float64(op: Callable[..., Tensor], args: tuple[Any, ...], wrt: tuple[int, ...]) -> None:
    leaves = [args[i].detach().clone().requires_grad_() for i in wrt]

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(wrt, values, strict=True))
        return op(*[given.get(i, a) for i, a in enumerate(args)])

    assert torch.autograd.gradcheck(call, leaves, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("op", "args", "wrt"), op_cases())
def test_fake_results_look_like_real_ones(op: Callable[..., Tensor], args: tuple[Any, ...], wrt: Any) -> None:
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*tree_map_only(Tensor, mode.from_tensor, args))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_activations_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, 11, dtype=dtype)
    assert nomul.shiftadd_linear(*shift_args(random_codes(5, 11, 4), x, None)).dtype == dtype
    assert nomul.quant_linear(*quant_args(random_quant(5, 11, 4, 3, True), x, None)).dtype == dtype
    assert nomul.grouped_linear(*grouped_args(dtype)).dtype == dtype
    heads = torch.randn(1, 2, 3, 8, dtype=dtype)
    assert nomul.rope(heads, *angles(3, 8, False, dtype)[:2], False).dtype == dtype


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(8, 8), (8, 4), (16, 2), (6, 6)])
def test_rope_is_a_complex_product(width: int, rotated: int, interleaved: bool) -> None:
    x = torch.randn(2, 3, 5, width, dtype=F64)
    cos, sin, theta = angles(5, rotated, interleaved)
    pairs = x[..., :rotated].unflatten(-1, (-1, 2)) if interleaved else x[..., :rotated].unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(theta), theta))
    wanted = x.clone()
    wanted[..., :rotated] = (turned if interleaved else turned.mT).flatten(-2)
    torch.testing.assert_close(nomul.rope(x, cos, sin, interleaved), wanted, rtol=0, atol=1e-13)


def test_rope_pairings_differ() -> None:
    cos, sin, _ = angles(3, 8, False)
    x = torch.randn(1, 1, 3, 8, dtype=F64)
    assert (nomul.rope(x, cos, sin, False) - nomul.rope(x, cos, sin, True)).abs().max() > 0.1


def test_rope_preserves_relative_positions() -> None:
    q, k = torch.randn(1, 1, 1, 8, dtype=F64), torch.randn(1, 1, 1, 8, dtype=F64)
    cos, sin, _ = angles(6, 8, False)
    turned_q, turned_k = (nomul.rope(v.expand(1, 1, 6, 8), cos, sin, False) for v in (q, k))
    scores = (turned_q @ turned_k.mT)[0, 0]
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-13)


def test_grouped_linear_is_one_product_per_expert() -> None:
    x, weight, ends = grouped_args()
    out = nomul.grouped_linear(x, weight, ends)
    experts = [0, 0, 2, 2, 2, 3]
    wanted = torch.stack([weight[e] @ row for e, row in zip(experts, x, strict=False)])
    torch.testing.assert_close(out[:6], wanted, rtol=0, atol=1e-13)
    assert not out[6:].any()


@pytest.mark.parametrize("power", range(-30, 31))
def test_shift_is_ldexp_on_every_float16(power: int) -> None:
    patterns = np.arange(65536, dtype=np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        wanted = np.ldexp(patterns, np.int32(power))
    found = shift(torch.from_numpy(patterns.copy()), torch.tensor(power)).numpy()
    assert wanted.dtype == found.dtype == np.float16
    assert_same_bits(found, wanted, np.uint16)


def assert_same_bits(found: np.ndarray, wanted: np.ndarray, bits: Any) -> None:
    nan = np.isnan(wanted)
    assert (np.isnan(found) == nan).all()
    # Which NaN comes out is the hardware's choice; every other value has one right pattern, signed zeros included.
    assert (found.view(bits)[~nan] == wanted.view(bits)[~nan]).all()


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64),
    power=st.integers(-300, 300),
)
def test_shift_is_ldexp_on_float32(bits: list[int], power: int) -> None:
    x = np.array(bits, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        wanted = np.ldexp(x, np.int32(power))
    assert_same_bits(shift(torch.from_numpy(x.copy()), torch.tensor(power)).numpy(), wanted, np.uint32)


def test_shift_on_the_edges_of_float32() -> None:
    edge = [0.0, -0.0, 2.0**SMALLEST_SUBNORMAL, -(2.0**-126), 3.4028234663852886e38, np.inf, -np.inf, np.nan]
    x = np.array(edge, dtype=np.float32)
    for power in (-150, -149, -127, -126, -25, -24, -1, 0, 1, 24, 127, 128, 149, 276):
        with np.errstate(all="ignore"):
            wanted = np.ldexp(x, np.int32(power))
        assert_same_bits(shift(torch.from_numpy(x), torch.tensor(power)).numpy(), wanted, np.uint32)


def test_shift_broadcasts_exponents() -> None:
    found = shift(torch.ones(2, 3), torch.tensor([[0], [-3]]))
    assert found.tolist() == [[1.0] * 3, [0.125] * 3]


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize(
    ("code", "planes"), [("planes", 3), ("uniform", 3), ("steps", 3), ("trits", 2), ("trits31", 2)]
)
@pytest.mark.parametrize(
    ("rows", "inputs", "group", "row_group"),
    [(5, 24, 8, 1), (7, 21, 8, 3), (3, 5, 16, 1), (1, 1, 1, 1), (9, 33, 11, 4), (6, 13, 1, 8)],
)
def test_shifts_give_what_the_operator_gives(
    rows: int, inputs: int, group: int, row_group: int, code: str, planes: int, offsets: bool, terms: int
) -> None:
    codes = random_codes(rows, inputs, group, planes, terms, offsets, terms, True, row_group, code)
    x = torch.randint(-128, 128, (2, 3, inputs)).double()
    bias = torch.randint(-64, 64, (rows,)).double() / 8
    for b in (bias, None):
        args = shift_args(codes, x, b)
        # Every partial sum is a multiple of 2**-36 below 2**16, so that float64 rounds nothing, in whatever order.
        assert torch.equal(shiftadd_by_shifts(*args), nomul.shiftadd_linear(*args))


@pytest.mark.parametrize(
    ("code", "planes"), [("planes", 3), ("uniform", 8), ("steps", 4), ("trits", 2), ("trits31", 2)]
)
def test_scales_that_are_no_sums_of_powers_multiply(code: str, planes: int) -> None:
    codes = random_codes(7, 21, 8, planes, terms=0, row_group=3, code=code)
    x = torch.randint(-128, 128, (2, 3, 21)).double()
    args = shift_args(codes, x, None)
    assert torch.equal(shiftadd_by_shifts(*args), nomul.shiftadd_linear(*args))
    assert shiftadd_cost(codes, 1).multiplies > 0


def test_no_weight_is_decoded_by_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("a weight was decoded")

    codes = random_codes(7, 21, 8, 2, 2, row_group=3, code="trits")
    for name in ("ir.ops.shiftadd.dequantize", "ir.ops.shiftadd.decode_scales", "ir.ops.shiftadd.decode_offsets"):
        monkeypatch.setattr(name, forbidden)
    shiftadd_by_shifts(*shift_args(codes, torch.randn(2, 21), None))


def signed_sums(x: Tensor) -> Tensor:
    """The look-up table of 8 activations, entry k with their signs by the bits of k: by doubling, one add each."""
    table = -x.sum(0, keepdim=True)
    for value in x:
        table = torch.cat([table, table + 2 * value])
    return table


def test_look_up_tables_of_eight_activations() -> None:
    x = torch.randint(-128, 128, (8,), generator=torch.Generator().manual_seed(4))
    table = signed_sums(x)
    keys = torch.arange(256)
    assert table.tolist() == [sum((2 * (k >> t & 1) - 1) * int(x[t]) for t in range(8)) for k in range(256)]
    assert torch.equal(table[255 - keys], -table[keys]) and table[255] == x.sum()


def test_look_ups_by_the_stored_bytes_are_the_planes_product() -> None:
    codes = random_codes(7, 24, 24, planes=2, offsets=False)
    x = torch.randint(-128, 128, (24,), generator=torch.Generator().manual_seed(4))
    tables = torch.stack([signed_sums(part) for part in x.split(8)])
    found = tables[torch.arange(3), codes.signs.long()].sum(-1)
    assert torch.equal(found, (decode_planes(codes).long() * x).sum(-1))


def test_negative_terms_and_offsets_are_exercised_by_the_exactness_test() -> None:
    codes = random_codes(7, 21, 8, planes=3, terms=3, seed=3, whole=True)
    later = codes.scales.view(-1)
    assert ((later >> 4 & 8) > 0).any() and codes.offsets is not None
    values = encode(torch.ones(1, 1, 4), torch.tensor([[[0.75]]]), torch.tensor([[-0.75]]), 4, 2)
    weight = dequantize(values, F64)
    assert weight.tolist() == [[0.0] * 4]
    flipped = encode(torch.ones(1, 1, 4), torch.tensor([[[-0.75]]]), torch.tensor([[-0.75]]), 4, 2)
    assert dequantize(flipped, F64).tolist() == [[-1.5] * 4]
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=F64)
    assert shiftadd_by_shifts(*shift_args(flipped, x, None)).tolist() == [[-15.0]]


def test_one_wrong_code_shows() -> None:
    codes = random_codes(5, 24, 8, planes=1, terms=2, offsets=False, whole=True)
    x = torch.randint(1, 128, (4, 24)).double()
    args = list(shift_args(codes, x, None))
    right = nomul.shiftadd_linear(*args)
    args[1] = codes.signs.clone()
    args[1][0, 2, 0] ^= 1
    assert dequantize(codes, F64)[2, 0] != 0
    assert (shiftadd_by_shifts(*args) != right).any(0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_quant_linear_decodes_each_weight(bits: int, zeros: bool) -> None:
    codes = random_quant(4, 10, 4, bits, zeros)
    x = torch.eye(10, dtype=F64)
    found = nomul.quant_linear(*quant_args(codes, x, None)).T
    for row in range(4):
        stream = int.from_bytes(bytes(codes.codes[row].tolist()), "little")
        points = int.from_bytes(bytes(codes.zeros[row].tolist()), "little") if zeros else 0
        for column in range(10):
            group, mask = column // 4, 2**bits - 1
            point = points >> group * bits & mask if zeros else 2 ** (bits - 1)
            value = (stream >> column * bits & mask) - point
            assert float(found[row, column]) == value * float(codes.scales[row, group])


def test_too_many_terms_are_refused() -> None:
    with pytest.raises(UsageError):
        encode(torch.ones(1, 1, 4), torch.ones(1, 1, 1), None, 4, 5)


def test_costs_add_and_shift_add_never_multiplies() -> None:
    codes = random_codes(32, 64, 16, planes=3)
    one, ten = shiftadd_cost(codes, 1), shiftadd_cost(codes, 10)
    assert one.multiplies == ten.multiplies == 0 and one.adds > 0 and one.shifts > 0
    assert (ten.adds, ten.shifts, ten.lookups) == (10 * one.adds, 10 * one.shifts, 10 * one.lookups)
    weights = codes.stored_bits // 8
    assert (one.bytes - weights) * 10 == ten.bytes - weights
    assert one + one == Cost(2 * one.bytes, 0, 2 * one.adds, 2 * one.shifts, 2 * one.lookups)


def test_shift_add_costs_grow_with_what_is_stored() -> None:
    plain = shiftadd_cost(random_codes(32, 64, 16, planes=2, terms=1, offsets=False), 1)
    for more in ({"planes": 3}, {"terms": 2}, {"offsets": True}):
        dearer = shiftadd_cost(random_codes(32, 64, 16, **{"planes": 2, "terms": 1, "offsets": False, **more}), 1)
        assert dearer.adds > plain.adds and dearer.shifts > plain.shifts and dearer.bytes > plain.bytes


def cost_of(**changes: Any) -> Cost:
    numbers = {"planes": 2, "rows": 96, "in_features": 64, "groups": 4, "scale_sets": 2, "terms": 2, "row_group": 1}
    rest = {"has_offset": False, "stored_bytes": 1000, "tokens": 1, "element": 4}
    return shiftadd_cost_of(**{**numbers, **rest, **changes})  # type: ignore[arg-type]


def test_costs_counted_by_hand() -> None:
    lookups = 2 * 96 * 8
    scaled = 96 * 4 * 2 * 2
    # Eight tables of 128 sums; a look-up and an add for 8 inputs of each row and plane; 2 shifts and adds a scale.
    assert cost_of() == Cost(1000 + 160 * 4, 0, 8 * 128 + lookups + scaled, scaled, lookups)
    # Without sums of powers of two, a multiply a scale.
    assert cost_of(terms=0) == Cost(1640, scaled // 2, 8 * 128 + lookups + scaled // 2, 0, lookups)
    # Offsets: the sums of groups, a shifted add for each power of two, and one add a row.
    extra = cost_of(has_offset=True)
    assert (extra.adds - cost_of().adds, extra.shifts - cost_of().shifts) == (64 + 96 * 4 * 2 + 96, 96 * 4 * 2)
    # Three bits with one scale are joined by 2 adds and 2 shifts; a pair of 3:1 trits by 4 and 1, with 4 look-ups.
    tied = cost_of(planes=3, scale_sets=1, code="uniform", terms=1)
    assert tied.shifts == 96 * 4 * (2 + 1) + 96 * 4
    trits = cost_of(scale_sets=1, code="trits31", terms=1)
    assert (trits.lookups, trits.shifts) == (2 * lookups, 96 * 4 * (1 + 1))
    assert trits.adds == 8 * 128 + 2 * lookups + 96 * 4 * (4 + 1)
    assert cost_of(code="trits").shifts == cost_of().shifts


def test_few_tiles_scale_the_activations_first() -> None:
    # A column a group and all rows one tile: scaling 64 activations twice beats scaling 64 x 96 products.
    acc = cost_of(groups=64, row_group=96)
    assert acc == Cost(1640, 0, 2 * 64 + 2 * 8 * 128 + 2 * 96 * 8 + 96 * 2, 2 * 64 * 2, 2 * 96 * 8)
    assert acc.operations < cost_of(groups=64).operations
    # With a table of its own for every few rows that order loses.
    assert cost_of(row_group=2) == cost_of()


def test_dense_and_quantised_costs() -> None:
    assert linear_cost(3, 8, 16, 512) == Cost(512 + 3 * 24 * 4, 3 * 8 * 16, 3 * 8 * 15)
    codes = random_quant(8, 16, 4, 4, True)
    cost = quant_cost(codes, 3)
    assert cost.multiplies == 3 * 8 * (16 + 4) and cost.shifts == 0
    assert cost.bytes == codes.stored_bits // 8 + 3 * 24 * 4
