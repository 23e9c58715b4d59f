"""Rounding token by token: rows decode to the nearest levels, types are checked, training passes gradients straight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ir.cost_model import program_cost
from ir.ops.tokens import row_bytes
from ir.program import Program
from ir.region import region
from ir.straight import pass_straight
from ir.verify import diagnose
from tests.programs import Sketch, hidden
from tests.solver_problems import draw

nomul = torch.ops.nomul


def both_ways(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """What a value decodes to."""
    rows = nomul.encode_tokens(x, bits, symmetric)
    assert rows.dtype == torch.uint8 and rows.shape == (*x.shape[:-1], row_bytes(x.shape[-1], bits))
    return nomul.decode_tokens(rows, bits, x.shape[-1], x.dtype)  # type: ignore[no-any-return]


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    width=st.integers(1, 70),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 99),
)
def test_every_value_is_within_half_a_step(bits: int, symmetric: bool, width: int, exponent: int, seed: int) -> None:
    x = draw(3, 2, width, seed=seed).float() * 2.0**exponent
    found = both_ways(x, bits, symmetric)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    wide = 2 * x.abs().amax(-1, keepdim=True) / (2**bits - 2) if symmetric else (high - low) / (2**bits - 1)
    # The ends lie off by what float16 rounds the step by, and by a zero point that is rounded too.
    assert bool(((found - x).abs() <= wide * (1.0 + 2.0**bits * 2.0**-11) + 2.0**-24).all())
    inside = (found - x).abs() <= 0.5 * wide * (1 + 1e-3) + 2.0**-24
    assert float(inside.float().mean()) >= (0.9 if width > 10 else 0.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_training_sees_what_is_stored_and_gradients_pass_straight(bits: int, symmetric: bool) -> None:
    x = draw(2, 5, 24).float().requires_grad_()
    found = nomul.straight_tokens(x, bits, symmetric)
    assert torch.equal(found, both_ways(x.detach(), bits, symmetric))
    weight = draw(2, 5, 24, seed=2).float()
    (grad,) = torch.autograd.grad((found * weight).sum(), x)
    assert torch.equal(grad, weight)
    torch.library.opcheck(nomul.straight_tokens, (x, bits, symmetric))


@pytest.mark.parametrize("value", [0.0, 1e-12, 3e4, 1e9])
def test_extreme_tokens_stay_finite(value: float) -> None:
    x = torch.full((1, 8), value)
    found = both_ways(x, 8, False)
    assert torch.isfinite(found).all()
    if value in (0.0, 3e4):
        torch.testing.assert_close(found, x, rtol=2e-3, atol=0)


def test_zero_is_exact_and_tokens_do_not_see_each_other() -> None:
    x = draw(4, 16).float()
    x[:, 3] = 0
    found = both_ways(x, 4, False)
    assert not found[:, 3].any()
    assert torch.equal(both_ways(x[1:2], 4, False), found[1:2])


def test_the_same_in_every_layout() -> None:
    x = draw(2, 3, 5, 8).float()
    moved = x.transpose(1, 2)
    assert torch.equal(both_ways(moved, 4, False), both_ways(x, 4, False).transpose(1, 2))


def coded_program(**change: int) -> Program:
    """x -> rows -> x, with some arguments or types changed."""
    s = Sketch()
    x = s.input("x", hidden(16))
    bits, width = change.get("bits", 4), change.get("width", 16)
    rows = s.call(nomul.encode_tokens.default, x, bits, False, type=hidden(change.get("bytes", 11), dtype=torch.uint8))
    back = s.call(nomul.decode_tokens.default, rows, 4, width, torch.float32, type=hidden(width))
    program = s.program(back)
    program.level = "compressed"
    return program


def test_the_verifier_knows_both_operators() -> None:
    assert not diagnose(coded_program(), full=True)
    for change, rule in (({"bits": 9}, "2 to 8"), ({"bytes": 12}, "dims"), ({"width": 20}, "dims of rows")):
        found = diagnose(coded_program(**change))
        assert found and any(rule in str(d) for d in found), change


def test_a_finished_program_must_not_round_in_floats() -> None:
    s = Sketch()
    x = s.input("x", hidden(16))
    program = s.program(s.call(nomul.straight_tokens.default, x, 4, False, type=hidden(16)))
    for level in ("model", "compressed"):
        program.level = level
        (found,) = diagnose(program)
        assert "only rounds for training" in str(found) and "encode_tokens" in str(found)


def test_pairs_become_straight_in_a_function_for_training() -> None:
    program = coded_program()
    whole = region(program, program.graph.nodes)
    x = draw(1, 3, 16).float().requires_grad_()
    found = whole.function(())(x)[0]
    assert torch.equal(found, whole.module()(x.detach())[0])
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_rows_from_elsewhere_stay_as_they_are() -> None:
    s = Sketch()
    rows = s.input("rows", hidden(11, dtype=torch.uint8))
    graph = s.program(s.call(nomul.decode_tokens.default, rows, 4, 16, torch.float32, type=hidden(16))).graph
    before = [str(n.target) for n in graph.nodes]
    pass_straight(graph)
    assert [str(n.target) for n in graph.nodes] == before


def test_costs_count_the_bytes_of_rows() -> None:
    program = coded_program()
    found = program_cost(program, tokens=6).by_operator()
    for name in ("nomul.encode_tokens", "nomul.decode_tokens"):
        assert found[name][1].bytes == 6 * (16 * 4 + 11)
