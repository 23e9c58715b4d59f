"""`nomul::hadamard`: every matrix exact in integers, the fast transform equal to it, and additions counted honestly."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ir.errors import UsageError
from ir.op_checks import site_of
from ir.ops.cost import Cost
from ir.ops.hadamard import block_order, hadamard_cost, hadamard_matrix, hadamard_orders
from ir.ops.packing import pack_bits
from ir.program import Program
from ir.rotation_checks import hadamard as check_site
from ir.types import TensorType
from tests.programs import F32, Sketch, hidden

nomul = torch.ops.nomul
F64 = torch.float64
CLAIMED = [n for n in range(1, 201) if block_order(n) == n]


def signs_of(width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (width,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Integers in float64, whose sums are exact."""
    return torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(seed)).double()


def by_matrix(x: Tensor, signs: Tensor, order: int, transposed: bool) -> Tensor:
    """The definition, by a dense block-diagonal matrix in float64."""
    blocks = x.shape[-1] // order
    h = torch.block_diag(*[hadamard_matrix(order).double()] * blocks)
    turn = h * (signs.double() * 2 - 1)
    return x @ (turn if transposed else turn.T)


@pytest.mark.parametrize("order", [*CLAIMED, 576, 1536])
def test_every_claimed_order_is_orthogonal_in_integers(order: int) -> None:
    h = hadamard_matrix(order)
    assert h.shape == (order, order) and h.dtype == torch.int8 and bool((h.abs() == 1).all())
    # Sums of at most 1536 products of +-1 are integers that float64 holds exactly.
    assert torch.equal(h.double().T @ h.double(), order * torch.eye(order, dtype=F64))


def test_one_wrong_sign_is_no_hadamard_matrix() -> None:
    h = hadamard_matrix(36).double()
    h[5, 7] *= -1
    assert not torch.equal(h.T @ h, 36 * torch.eye(36, dtype=F64))


def test_the_orders_that_paley_gives_are_claimed() -> None:
    first = {12, 20, 24, 44, 48, 60, 68, 72, 80, 84, 104, 108}
    second = {28, 36, 76}
    assert first | second <= set(CLAIMED)
    assert all(n in (1, 2) or n % 4 == 0 for n in CLAIMED)
    # Matrices of these orders exist, but by constructions over prime powers or by search.
    assert not {52, 92, 100, 116, 156, 172, 184, 188} & set(CLAIMED)


@pytest.mark.parametrize(
    ("width", "orders"),
    [
        (576, (2, 2, 12, 12)),
        (1536, (*[2] * 7, 12)),
        (64, (2,) * 6),
        (24, (2, 12)),
        (3584, (*[2] * 7, 28)),
        (11008, (2,) * 8),
        (52, (2, 2)),
        (6, (2,)),
        (7, ()),
        (1, ()),
    ],
)
def test_widths_are_rotated_whole_where_a_matrix_exists_and_else_in_blocks(width: int, orders: tuple[int, ...]) -> None:
    assert hadamard_orders(width) == orders
    assert width % prod(orders) == 0


def test_no_larger_known_order_divides_a_width() -> None:
    for width in range(1, 400):
        order = block_order(width)
        assert not any(width % n == 0 for n in CLAIMED if n > order)


def test_orders_out_of_reach_are_refused() -> None:
    with pytest.raises(UsageError, match="no Hadamard matrix of order 52"):
        hadamard_matrix(52)
    with pytest.raises(UsageError, match="positive"):
        hadamard_orders(0)
    with pytest.raises(UsageError, match="do not divide"):
        nomul.hadamard(torch.ones(2, 12), pack_bits(signs_of(12), 1), 8)
    with pytest.raises(UsageError, match="order 6"):
        nomul.hadamard(torch.ones(2, 12), pack_bits(signs_of(12), 1), 6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("width", "order"), [(576, 576), (1536, 1536), (24, 12), (36, 36), (60, 4), (10, 2), (9, 1)])
def test_the_fast_transform_equals_the_matrix_exactly(width: int, order: int, transposed: bool) -> None:
    x, signs = whole(3, 2, width), signs_of(width)
    found = nomul.hadamard(x, pack_bits(signs, 1), order, transposed)
    assert torch.equal(found, by_matrix(x, signs, order, transposed))
    assert not torch.equal(found, by_matrix(x, 1 - signs, order, transposed))
    if order > 2:
        assert not torch.equal(found, by_matrix(x, signs, order, not transposed))


@given(st.sampled_from([n for n in CLAIMED if n <= 64]), st.integers(1, 3), st.integers(0, 5), st.integers(0, 99))
def test_there_and_back_is_a_multiple_of_the_order(order: int, blocks: int, rows: int, seed: int) -> None:
    width = order * blocks
    x, signs = whole(rows, width, seed=seed), pack_bits(signs_of(width, seed), 1)
    assert torch.equal(nomul.hadamard(nomul.hadamard(x, signs, order), signs, order, True), order * x)
    assert torch.equal(nomul.hadamard(nomul.hadamard(x, signs, order, True), signs, order), order * x)


def test_a_weight_turned_by_it_undoes_the_rotation() -> None:
    generator = torch.Generator().manual_seed(3)
    scales = 10.0 ** (12 * torch.rand(40, 576, generator=generator, dtype=F64) - 6)
    weight = torch.randn(40, 576, generator=generator, dtype=F64) * scales
    x, signs = torch.randn(5, 576, generator=generator, dtype=F64), pack_bits(signs_of(576), 1)
    wanted = x @ weight.T
    found = nomul.hadamard(x, signs, 576) @ (nomul.hadamard(weight, signs, 576) / 576).T
    assert float((found - wanted).norm() / wanted.norm()) < 1e-12
    wrong = nomul.hadamard(x, signs, 288) @ (nomul.hadamard(weight, signs, 576) / 576).T
    assert float((wrong - wanted).norm() / wanted.norm()) > 0.1


def test_rows_do_not_depend_on_how_many_are_turned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, signs = whole(11, 2, 64), pack_bits(signs_of(64), 1)
    together = nomul.hadamard(x, signs, 64)
    monkeypatch.setattr("ir.ops.hadamard._AT_ONCE", 100)
    assert torch.equal(nomul.hadamard(x, signs, 64), together)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.tensor([2048.0, 1.0, -2048.0, 1.0]).half()
    found = nomul.hadamard(x, pack_bits(torch.ones(4, dtype=torch.uint8), 1), 4)
    assert found.dtype == torch.float16 and found[0] == 2  # in float16 2048 + 1 is 2048


def cases() -> list[Any]:
    x = torch.randn(2, 3, 24, dtype=F64)
    strided = torch.randn(2, 24, 3, dtype=F64).transpose(1, 2)
    empty = torch.randn(0, 24, dtype=F64)
    return [
        pytest.param(value, order, transposed, id=f"{name}-{order}-{transposed}")
        for name, value in (("plain", x), ("strided", strided), ("empty", empty))
        for order, transposed in ((24, False), (12, True), (1, False))
    ]


@pytest.mark.parametrize(("x", "order", "transposed"), cases())
def test_opcheck(x: Tensor, order: int, transposed: bool) -> None:
    leaf = x.detach().clone().requires_grad_()
    torch.library.opcheck(nomul.hadamard, (leaf, pack_bits(signs_of(24), 1), order, transposed))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_is_the_other_form(transposed: bool) -> None:
    signs = pack_bits(signs_of(24), 1)
    x = torch.randn(3, 24, dtype=F64, requires_grad=True)
    turn: Callable[[Tensor], Tensor] = lambda v: nomul.hadamard(v, signs, 12, transposed)  # noqa: E731
    assert torch.autograd.gradcheck(turn, (x,)) and torch.autograd.gradgradcheck(turn, (x,))
    grad = whole(3, 24)
    (found,) = torch.autograd.grad(turn(x), x, grad)
    assert torch.equal(found, nomul.hadamard(grad, signs, 12, not transposed))


def test_fake_shape_dtype_and_strides() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 24, 3).transpose(1, 2)
        found = nomul.hadamard(x, torch.empty(3, dtype=torch.uint8), 24)
    assert found.shape == (2, 3, 24) and found.is_contiguous() and found.dtype == torch.float32


def test_cost_is_additions_alone() -> None:
    assert hadamard_cost(64, 64, tokens=1) == Cost(8 + 2 * 64 * 4, 0, 64 * 6)
    assert hadamard_cost(576, 576, tokens=10).adds == 10 * 576 * (1 + 1 + 11 + 11)
    assert hadamard_cost(24, 12, tokens=1, element=2).adds == 24 * 11
    assert hadamard_cost(9, 1, tokens=3).adds == 0


def sketch(order: object = 12, signs: int = 3, out: int = 24) -> Program:
    s = Sketch()
    x, bits = s.input("x", hidden(24)), s.param("signs", s.bytes(signs))
    return s.program(s.call(nomul.hadamard.default, x, bits, order, type=hidden(out)))


def problems(program: Program) -> str:
    site = site_of(program.outputs[0])
    assert site is not None
    return "\n".join(check_site(site))


def test_the_verifier_sees_what_does_not_fit() -> None:
    assert problems(sketch()) == ""
    assert "known Hadamard matrix" in problems(sketch(order=6))
    assert "divide the 24 channels" in problems(sketch(order=16))
    assert "dims of signs" in problems(sketch(signs=4))
    assert "result's dims" in problems(sketch(out=12))
    wrong = sketch()
    wrong.outputs[0].args[1].meta["type"] = TensorType(F32, (3,))  # type: ignore[union-attr]
    assert "signs must be u8" in problems(wrong)
    wrong = sketch()
    wrong.outputs[0].meta["type"] = hidden(24, dtype=F64)
    assert "input's dtype" in problems(wrong)
