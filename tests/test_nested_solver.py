"""Nested precision: shared planes, each precision as good as its own scales let it be, none worse than a lower one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import UsageError
from ir.ops.nested import NestedCodes
from ir.ops.shiftcode import decode_planes, decode_scales
from passes.quantize.hessian import prepare
from passes.shiftcode import solver
from passes.shiftcode.nested import solve_nested
from passes.shiftcode.solver import metric_of
from passes.shiftcode.spec import ShiftSpec
from tests.solver_problems import draw, forms, nasty, problem
from tests.solver_problems import solved as alone

F64 = torch.float64
PRECISIONS = pytest.mark.parametrize("precisions", [(2, 3, 4), (2, 4), (3, 4), (1, 2), (1, 5), (3,)])


def nested(w: Tensor, h: Tensor | None, spec: ShiftSpec, precisions: tuple[int, ...]) -> NestedCodes:
    return solve_nested(w, None if h is None else metric_of(h, spec), spec, precisions)


def losses(w: Tensor, codes: NestedCodes, metric: Tensor, row_group: int = 1) -> list[Tensor]:
    """Return the quadratic forms of all tiles, precision by precision."""
    return [forms(w - codes.at(p).dequantize(F64), metric, row_group) for p in codes.precisions]


@PRECISIONS
@pytest.mark.parametrize("row_group", [1, 3])
@pytest.mark.parametrize("refit", [False, True])
def test_lower_precisions_are_the_first_planes_of_higher_ones(
    precisions: tuple[int, ...], row_group: int, refit: bool
) -> None:
    w, h, _ = problem(7, 29)
    spec = ShiftSpec(group=8, row_group=row_group, refit=refit)
    whole = nested(w, h, spec, precisions)
    assert whole.precisions == precisions and whole.signs.shape[0] == precisions[-1]
    for count in range(1, len(precisions)):
        part = nested(w, h, spec, precisions[:count])
        assert torch.equal(part.signs, whole.signs[: precisions[count - 1]])
        for p in part.precisions:
            stored = whole.at(p).tensors()
            assert all(torch.equal(t, stored[name]) for name, t in part.at(p).tensors().items())
            assert torch.equal(decode_planes(part.at(p)), decode_planes(whole.at(precisions[-1]))[:p])


@PRECISIONS
@pytest.mark.parametrize(
    ("row_group", "group", "terms", "offset"), [(1, 8, 2, True), (3, 5, 1, False), (0, 1, 0, True)]
)
def test_the_lowest_precision_is_what_it_is_by_itself(
    precisions: tuple[int, ...], row_group: int, group: int, terms: int, offset: bool
) -> None:
    w, h, _ = problem(7, 29, seed=1)
    spec = ShiftSpec(bits=precisions[0], group=group, row_group=row_group, terms=terms, offset=offset)
    codes = nested(w, h, spec, precisions)
    base = codes.at(precisions[0])
    assert torch.equal(base.dequantize(F64), alone(w, h, spec))
    order = decode_scales(base)
    assert torch.equal(order, order.sort(-1, descending=True).values)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    inputs=st.integers(2, 20),
    group=st.integers(1, 20),
    row_group=st.sampled_from([1, 3, 0]),
    terms=st.integers(0, 3),
    offset=st.booleans(),
    precisions=st.sampled_from([(1, 2, 3), (2, 3), (2, 4)]),
)
def test_no_tile_is_worse_at_a_higher_precision(
    seed: int,
    rows: int,
    inputs: int,
    group: int,
    row_group: int,
    terms: int,
    offset: bool,
    precisions: tuple[int, ...],
) -> None:
    w, h, _ = problem(rows, inputs, seed)
    spec = ShiftSpec(group=group, row_group=row_group, terms=terms, offset=offset, sweeps=1)
    found = losses(w, nested(w, h, spec, precisions), prepare(h, spec.damp).matrix, row_group or rows)
    for lower, higher in pairwise(found):
        assert bool((higher <= lower * (1 + 1e-9) + 1e-30).all())


@pytest.mark.parametrize(("group", "terms", "sweeps"), [(4, 1, 2), (16, 2, 0)])
def test_no_row_of_many_is_worse_at_a_higher_precision(group: int, terms: int, sweeps: int) -> None:
    w, h, _ = problem(40, 48)
    spec = ShiftSpec(group=group, terms=terms, sweeps=sweeps)
    for lower, higher in pairwise(losses(w, nested(w, h, spec, (2, 3, 4)), prepare(h, spec.damp).matrix)):
        assert bool((higher <= lower * (1 + 1e-9)).all())


def test_each_further_plane_buys_much_but_less_than_one_of_its_own() -> None:
    w, h, _ = problem(16, 64)
    spec = ShiftSpec(group=16)
    metric = prepare(h, spec.damp).matrix
    found = [float(x.sum()) for x in losses(w, nested(w, h, spec, (2, 3, 4)), metric)]
    assert found[1] < 0.6 * found[0] and found[2] < 0.6 * found[1]
    best = [float(forms(w - alone(w, h, ShiftSpec(bits=p, group=16)), metric).sum()) for p in (3, 4)]
    assert best[0] < found[1] and best[1] < found[2]


@pytest.mark.parametrize("terms", [0, 1, 3])
@pytest.mark.parametrize("offset", [False, True])
def test_scales_are_never_negative(terms: int, offset: bool) -> None:
    w, h, _ = problem(9, 21, seed=6)
    codes = nested(w, h, ShiftSpec(group=6, terms=terms, offset=offset, refit=True), (1, 2, 4))
    for p in codes.precisions:
        scales = decode_scales(codes.at(p))
        assert scales.shape[-1] == p and bool((scales >= 0).all()) and bool(scales.any())
        new = scales[..., p // 2 :]
        assert torch.equal(new, new.sort(-1, descending=True).values)


@pytest.mark.parametrize("row_group", [1, 2, 0])
@pytest.mark.parametrize(("inputs", "group"), [(3, 8), (17, 1), (20, 8)])
@pytest.mark.parametrize("hessian", ["none", "dead", "zero"])
def test_degenerate_rows_and_inputs_stay_finite(row_group: int, inputs: int, group: int, hessian: str) -> None:
    w, h = nasty(6, inputs), problem(1, inputs)[1]
    h[:, 1], h[1, :] = 0.0, 0.0
    metric = {"none": None, "dead": h, "zero": h * 0.0}[hessian]
    codes = nested(w, metric, ShiftSpec(group=group, row_group=row_group), (2, 3))
    for p in (2, 3):
        found = codes.at(p).dequantize(F64)
        assert bool(torch.isfinite(found).all())
        assert row_group != 1 or not found[0].any()


@pytest.mark.parametrize("loud", [0.0, 1e6])
def test_what_a_dead_input_weighs_does_not_matter_at_any_precision(loud: float) -> None:
    w, h, _ = problem(5, 20, seed=4)
    h[:, 6], h[6, :] = 0.0, 0.0
    spec = ShiftSpec(bits=2, group=8)
    codes = nested(w.index_fill(1, torch.tensor([6]), loud), h, spec, (2, 3))
    quiet = w.index_fill(1, torch.tensor([6]), 0.0)
    for p in (2, 3):
        assert torch.equal(codes.at(p).dequantize(F64), nested(quiet, h, spec, (2, 3)).at(p).dequantize(F64))
    assert torch.equal(codes.at(2).dequantize(F64), alone(w.index_fill(1, torch.tensor([6]), loud), h, spec))


def test_rows_solved_in_pieces_are_those_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h, _ = problem(11, 20)
    spec = ShiftSpec(group=8, row_group=3)
    whole = nested(w, h, spec, (2, 3))
    monkeypatch.setattr(solver, "_WEIGHTS_AT_ONCE", 100)
    pieces = nested(w, h, spec, (2, 3))
    for p in (2, 3):
        assert torch.equal(pieces.at(p).dequantize(F64), whole.at(p).dequantize(F64))


def test_power_of_two_scaling_is_exact_at_every_precision() -> None:
    w, h, _ = problem(6, 20)
    spec = ShiftSpec(group=8)
    base, moved = nested(w, h, spec, (2, 3)), nested(w * 2.0**17, h * 2.0**-30, spec, (2, 3))
    assert torch.equal(moved.signs, base.signs)
    for p in (2, 3):
        assert torch.equal(moved.at(p).dequantize(F64), base.at(p).dequantize(F64) * 2.0**17)


@pytest.mark.parametrize("precisions", [(), (3, 2), (2, 2), (0, 2), (2, 9)])
def test_precisions_that_cannot_be_nested_are_refused(precisions: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        nested(draw(2, 8), None, ShiftSpec(), precisions)


@pytest.mark.parametrize("code", ["trits", "trits31"])
def test_trits_cannot_be_nested(code: str) -> None:
    with pytest.raises(UsageError):
        nested(draw(2, 8), None, ShiftSpec(bits=1, code=code), (1, 2))


def test_a_weight_or_metric_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError):
        nested(torch.full((2, 4), float("nan")), None, ShiftSpec(), (2, 3))
    with pytest.raises(UsageError):
        nested(torch.ones(2, 4), torch.eye(5), ShiftSpec(), (2, 3))
