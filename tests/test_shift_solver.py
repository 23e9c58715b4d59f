"""The layer-wise solver: believed weights equal stored codes, the loop is GPTQ, and no stage makes a loss worse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.ops.shiftcode import ShiftCodes, decode_offsets, decode_planes, decode_scales, encode
from passes.quantize import order
from passes.quantize.hessian import prepare
from passes.shiftcode import solver
from passes.shiftcode.bcq import fit_bcq
from passes.shiftcode.group_fit import Fit, fit_tiles
from passes.shiftcode.rounding import limits_of, rounding_table
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.tiles import levels_of, tiles_of
from tests.solver_problems import (
    BARE,
    CODES,
    F64,
    METRICS,
    columns_of,
    draw,
    factors,
    forms,
    problem,
    random_codes,
    refit,
    solve,
    solved,
    unrounded,
)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("code", "bits"), CODES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_scale_solve_is_least_squares_in_the_metric(
    kind: str, offset: bool, code: str, bits: int, rows: int
) -> None:
    spec = ShiftSpec(bits=bits, code=code, offset=offset, row_group=rows, group=17)
    w, codes, metric = draw(rows, 17) * 2.0**-7, random_codes(rows, 17, spec), METRICS[kind](17)
    found, reported = refit(w, codes, metric, unrounded(w, spec))
    columns = columns_of(codes, spec)
    used = columns if offset else columns[..., 1:]
    if kind == "full":
        factor = factors(metric)[1]
        design, target = torch.einsum("rns,nk->rks", used, factor), w @ factor
    else:
        root = metric.diagonal().sqrt()
        design, target = used * root[:, None], w * root
    expected = np.linalg.lstsq(design.flatten(0, 1).numpy(), target.flatten().numpy(), rcond=None)[0]
    torch.testing.assert_close(found if offset else found[1:], torch.from_numpy(expected), rtol=1e-6, atol=1e-10)
    assert offset or float(found[0]) == 0.0
    error = w - columns @ found
    gradient = torch.einsum("rns,nk,rk->s", used, metric, error)
    bound = torch.einsum("rns,nk,rk->s", used.abs(), metric.abs(), w.abs())
    assert bool((gradient.abs() <= 1e-8 * bound).all())
    assert reported == pytest.approx(float(forms(error, metric).sum()), rel=1e-9)


STAGES = [
    {"iterations": 0, "polish": 0},
    {"iterations": 3, "polish": 0},
    {"iterations": 0, "polish": 3},
    {"iterations": 2, "polish": 2},
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("code", "bits"), CODES)
@pytest.mark.parametrize("row_group", [1, 3])
def test_the_error_of_a_group_is_what_its_returned_weights_leave(
    stage: dict[str, int], code: str, bits: int, row_group: int
) -> None:
    spec = ShiftSpec(bits=bits, code=code, row_group=row_group, **stage)
    w, hessian, _ = problem(7, 23, seed=2)
    full = prepare(hessian).matrix
    upper = factors(full)[0]
    for s, e in ((0, 9), (9, 23)):
        local = upper[s:e, s:e]
        fit = fit_tiles(w[:, s:e], local, torch.linalg.inv(local), tiles_of(w, spec))
        left = w[:, s:e] - levels_of(fit.unknowns, fit.codes, tiles_of(w, spec))
        torch.testing.assert_close(fit.error @ local, left, rtol=0, atol=1e-12)
        torch.testing.assert_close(fit.error, left @ torch.linalg.inv(local), rtol=1e-10, atol=1e-12)
        # The block step of optimal brain surgery, from the inverse Hessian of the columns that are still free.
        inverse = torch.linalg.inv(full[s:, s:])
        size = e - s
        step = left @ torch.linalg.solve(inverse[:size, :size], inverse[:size, size:])
        torch.testing.assert_close(fit.error @ upper[s:e, e:], step, rtol=1e-9, atol=1e-12)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fit]]:
    """Every fit of a group that the solver makes."""
    made: list[Fit] = []

    def spy(*args: object) -> Fit:
        made.append(fit_tiles(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(solver, "fit_tiles", spy)
    yield made


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("row_group", "group", "terms"), [(1, 8, 2), (3, 8, 1), (0, 1, 3), (1, 50, 0)])
def test_squared_errors_of_all_groups_sum_to_the_layers_loss(
    fits: list[Fit], ordered: bool, row_group: int, group: int, terms: int
) -> None:
    w, h, _ = problem(7, 43, seed=3)
    spec = ShiftSpec(bits=2, group=group, row_group=row_group, terms=terms, ordered=ordered, sweeps=0)
    left = w - solved(w, h, spec)
    assert len(fits) == -(-43 // group)
    total = sum(float(fit.error.square().sum()) for fit in fits)
    assert total == pytest.approx(float(forms(left, prepare(h, spec.damp).matrix).sum()), rel=1e-8)


def gptq(w: Tensor, metric: Tensor, spec: ShiftSpec, order: list[list[int]]) -> Tensor:
    """Optimal brain surgery by the book: one row and one column at a time on an explicit inverse, scales per group."""
    inverse, pivots = torch.linalg.inv(metric), {}
    for j in (j for group in order for j in group):
        pivots[j] = inverse[j].clone() / inverse[j, j].sqrt()
        inverse -= torch.outer(pivots[j], pivots[j])
    out = torch.zeros_like(w)
    for r in range(w.shape[0]):
        rest, done = w[r].clone(), set()
        for group in order:
            importance = torch.stack([1 / pivots[j][j] ** 2 for j in group])
            fit = fit_bcq(
                rest[None, group],
                spec.bits,
                importance if spec.weighted else None,
                rounding=rounding_table(spec.terms),
                code=spec.code,
                offset=spec.offset,
                limits=limits_of(w[r : r + 1], 1),
                rounds=spec.rounds,
                starts=spec.starts,
            )
            levels = fit.z + torch.from_numpy(fit.design.matrix) @ fit.alpha[0]
            for j in group:
                out[r, j] = levels[(levels - rest[j]).abs().argmin()]
                step = (rest[j] - out[r, j]) / pivots[j][j]
                done.add(j)
                for k in set(range(w.shape[1])) - done:
                    rest[k] -= step * pivots[j][k]
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("code", "bits", "terms", "offset"), [("planes", 2, 2, True), ("trits", 1, 1, False)])
def test_the_loop_is_gptq(weighted: bool, code: str, bits: int, terms: int, offset: bool) -> None:
    w, h, _ = problem(4, 21, seed=5)
    spec = replace(BARE, bits=bits, code=code, terms=terms, offset=offset, weighted=weighted, ordered=False)
    order = [list(range(s, min(s + 8, 21))) for s in (0, 8, 16)]
    expected = gptq(w, prepare(h).matrix, spec, order)
    torch.testing.assert_close(solved(w, h, spec), expected, rtol=1e-12, atol=0)


def test_groups_and_columns_are_taken_by_falling_curvature() -> None:
    w, h, _ = problem(4, 21, seed=6)
    diagonal = h.diagonal().tolist()
    groups = [list(range(s, min(s + 8, 21))) for s in (0, 8, 16)]
    groups = sorted(groups, key=lambda g: -sum(diagonal[j] for j in g) / len(g))
    order = [sorted(g, key=lambda j: -diagonal[j]) for g in groups]
    assert order != [sorted(g) for g in sorted(groups)]
    expected = gptq(w, prepare(h).matrix, BARE, order)
    torch.testing.assert_close(solved(w, h, BARE), expected, rtol=1e-12, atol=0)
    assert not torch.equal(solved(w, h, replace(BARE, ordered=False)), expected)


@pytest.mark.parametrize("columns", [1, 40, 1000])
@pytest.mark.parametrize("spec", [BARE, ShiftSpec(group=24, row_group=2)])
def test_lazy_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, columns: int, spec: ShiftSpec) -> None:
    w, h, _ = problem(3, 300, seed=7)
    expected = solved(w, h, spec)
    monkeypatch.setattr(order, "_LAZY_COLUMNS", columns)
    torch.testing.assert_close(solved(w, h, spec), expected, rtol=0, atol=1e-8)


def test_the_loop_is_gptq_across_lazy_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_LAZY_COLUMNS", 10)
    w, h, _ = problem(3, 37, seed=8)
    spec = replace(BARE, group=6, ordered=False)
    expected = gptq(w, prepare(h).matrix, spec, [list(range(s, min(s + 6, 37))) for s in range(0, 37, 6)])
    torch.testing.assert_close(solved(w, h, spec), expected, rtol=1e-12, atol=0)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 7),
    inputs=st.integers(2, 40),
    group=st.integers(1, 48),
    row_group=st.sampled_from([1, 3, 0]),
    code=st.sampled_from([("planes", 1), *CODES]),
    terms=st.integers(0, 4),
    offset=st.booleans(),
    free=st.booleans(),
    refit=st.booleans(),
    power=st.sampled_from([-60, -3, 0, 40]),
)
def test_codes_are_what_the_solver_believes(
    rows: int,
    inputs: int,
    group: int,
    row_group: int,
    code: tuple[str, int],
    terms: int,
    offset: bool,
    free: bool,
    refit: bool,
    power: int,
) -> None:
    w, h, _ = problem(rows, inputs, seed=inputs)
    w[0] *= 2.0**9
    w = w * 2.0 ** min(power, 0 if terms == 0 else power)
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def spy(digits: Tensor, alpha: Tensor, z: Tensor | None, *rest: int, **more: object) -> ShiftCodes:
        seen.append((digits, alpha, z))
        return encode(digits, alpha, z, *rest, **more)  # type: ignore[arg-type]

    spec = ShiftSpec(
        bits=code[1], code=code[0], group=group, row_group=row_group, terms=terms, offset=offset, refit=refit, sweeps=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "encode", spy)
        codes = solve(w, None if free else h, spec)
    [(digits, alpha, z)] = seen
    assert torch.equal(decode_scales(codes), alpha.abs())
    assert (decode_offsets(codes) is None) == (z is None) == (not offset)
    believed = torch.zeros_like(w)
    if z is not None:
        assert torch.equal(decode_offsets(codes), z)  # type: ignore[arg-type]
    tile, column = torch.arange(rows) // (row_group or rows), torch.arange(inputs) // group
    worth = [3.0, 1.0] if code[0] == "trits31" else [1.0] * code[1]
    values = digits.to(F64) if code[0] != "planes" else digits.to(F64) * 2 - 1
    for i, plane in enumerate(values):
        scale = alpha[tile][:, column][..., 0 if code[0] == "trits31" else i]
        assert torch.equal((decode_planes(codes, F64)[i] * scale.abs()), plane * scale)
        believed += worth[i] * scale * plane
    if z is not None:
        believed += z[tile][:, column]
    assert torch.equal(codes.dequantize(F64), believed)


def test_diagonal_hessian_is_a_weighted_fit_without_propagation() -> None:
    w = draw(20, 43) * 2.0**-5
    diagonal = torch.logspace(0, 2, 43, dtype=F64)
    spec = replace(BARE, bits=3, group=16, damp=1e-12, starts=4)
    parts = [
        fit_bcq(
            part,
            3,
            importance,
            rounding=rounding_table(2),
            offset=True,
            limits=limits_of(w, 1),
            starts=4,
        ).values
        for part, importance in zip(w.split(16, 1), diagonal.split(16), strict=True)
    ]
    torch.testing.assert_close(solved(w, torch.diag(diagonal), spec), torch.cat(parts, 1), rtol=1e-12, atol=0)
    assert not torch.equal(solved(w, torch.diag(diagonal), replace(spec, weighted=False)), torch.cat(parts, 1))


@pytest.mark.parametrize("hessian", [False, True])
@pytest.mark.parametrize(("row_group", "cut"), [(1, 29), (3, 27)])
def test_tiles_do_not_see_each_other(hessian: bool, row_group: int, cut: int) -> None:
    w, h, _ = problem(40, 40)
    w[cut:] *= 100
    spec = ShiftSpec(bits=2, group=16, row_group=row_group, refit=True)
    whole, alone = (solve(part, h if hessian else None, spec) for part in (w, w[:cut]))
    assert torch.equal(whole.dequantize(F64)[:cut], alone.dequantize(F64))
    assert torch.equal(whole.signs[:, :cut], alone.signs) and torch.equal(
        whole.scales[: cut // row_group], alone.scales
    )


def test_rows_solved_in_pieces_are_those_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h, _ = problem(11, 20)
    spec = ShiftSpec(bits=2, group=8, row_group=3)
    whole = solved(w, h, spec)
    monkeypatch.setattr(solver, "_WEIGHTS_AT_ONCE", 100)
    assert solver.rows_at_once(w, spec) == 3
    assert torch.equal(solved(w, h, spec), whole)


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("row_group", [1, 4])
def test_power_of_two_scaling_of_weight_and_hessian_is_exact(terms: int, row_group: int) -> None:
    w, h, _ = problem(10, 40)
    spec = ShiftSpec(bits=2, group=16, terms=terms, row_group=row_group, refit=True)
    base, moved = solve(w, h, spec), solve(w * 2.0**-31, h * 2.0**20, spec)
    assert torch.equal(moved.dequantize(F64), base.dequantize(F64) * 2.0**-31)
    assert torch.equal(moved.signs, base.signs) and torch.equal(moved.scales, base.scales)
    assert not torch.equal(solved(w * 3, h, spec), base.dequantize(F64) * 3)
