"""The layer-wise solver: believed weights equal stored codes, the loop is GPTQ, and no stage makes a loss worse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import UsageError
from ir.ops.powerterms import round_power_terms
from ir.ops.shiftcode import ShiftCodes, decode_offsets, decode_planes, decode_scales, encode
from passes.quantize.hessian import inverse_factor, prepare
from passes.quantize.uniform import rtn
from passes.shiftcode import kernels, solver
from passes.shiftcode.bcq import fit_bcq
from passes.shiftcode.design import design_of
from passes.shiftcode.joint import refit_scales
from passes.shiftcode.rounding import limits_of, rounding_table
from passes.shiftcode.solver import loss, metric_of, relative_loss
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.tiles import Fit, Tiles, fit_tiles, levels_of, tiles_of

F64 = torch.float64
BARE = ShiftSpec(bits=2, group=8, starts=1, iterations=0, polish=0, sweeps=0)
CODES = [("planes", 3), ("trits", 2), ("trits31", 2)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def problem(rows: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight and the Grams of calibration and held-out tokens with strongly correlated features."""
    mix = draw(inputs, inputs, seed=seed) * torch.logspace(0, -1.2, inputs, dtype=F64)[:, None]
    mix = mix * torch.exp2(draw(inputs, seed=seed + 1))
    x, y = draw(512, inputs, seed=seed + 2) @ mix, draw(512, inputs, seed=seed + 3) @ mix
    return draw(rows, inputs, seed=seed + 4) * 0.05, x.T @ x, y.T @ y


def solve(weight: Tensor, hessian: Tensor | None, spec: ShiftSpec) -> ShiftCodes:
    return solver.solve(weight, None if hessian is None else metric_of(hessian, spec), spec)


def solved(weight: Tensor, hessian: Tensor | None, spec: ShiftSpec) -> Tensor:
    return solve(weight, hessian, spec).dequantize(F64)


def forms(error: Tensor, metric: Tensor, row_group: int = 1) -> Tensor:
    """Return the quadratic form of each tile of rows."""
    rows = ((error @ metric) * error).sum(1)
    return torch.stack([part.sum() for part in rows.split(row_group)])


def unrounded(weight: Tensor, spec: ShiftSpec) -> Tiles:
    """Return tiles that round nothing."""
    return Tiles(spec, spec.design(), rounding_table(-1), limits_of(weight, spec.row_group))


def factors(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and F = U^-1, upper triangular, with metric^-1 = U^T U."""
    upper = inverse_factor(metric)
    assert upper is not None
    return upper, torch.linalg.inv(upper)


def columns_of(codes: Tensor, spec: ShiftSpec) -> Tensor:
    """Return each weight's ones and design columns, [N, n, S+1]."""
    design = torch.from_numpy(spec.design().matrix)[codes.long()]
    return torch.cat([torch.full_like(design[..., :1], float(spec.offset)), design], -1)


def random_codes(rows: int, n: int, spec: ShiftSpec, seed: int = 0) -> Tensor:
    count = spec.design().matrix.shape[0]
    return torch.randint(0, count, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


METRICS = {
    "full": lambda n: prepare(problem(1, n, seed=n)[1]).matrix,
    "diagonal": lambda n: torch.diag(torch.logspace(-3, 2, n, dtype=F64)),
    "identity": lambda n: torch.eye(n, dtype=F64),
}


def refit(w: Tensor, codes: Tensor, metric: Tensor, tiles: Tiles) -> tuple[Tensor, float]:
    """Run the scale solve of one tile in a group's metric; return the unknowns and the loss it reports."""
    upper, factor = factors(metric)
    arrays = [t.contiguous().numpy() for t in (upper, factor, factor.sum(0), metric, torch.ones(w.shape[1]).double())]
    size, (rows, n) = tiles.scales + 1, w.shape
    found, designs, error = np.zeros(size), np.empty((rows, size, n)), np.empty((rows, n))
    reported = kernels._refit(
        (w @ factor).contiguous().numpy(),
        codes.numpy(),
        kernels.Frame(*arrays),
        tiles.limits[0],
        tiles.how(),
        found,
        designs,
        error,
    )
    return torch.from_numpy(found), reported


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
    monkeypatch.setattr(solver, "_LAZY_COLUMNS", columns)
    torch.testing.assert_close(solved(w, h, spec), expected, rtol=0, atol=1e-8)


def test_the_loop_is_gptq_across_lazy_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_LAZY_COLUMNS", 10)
    w, h, _ = problem(3, 37, seed=8)
    spec = replace(BARE, group=6, ordered=False)
    expected = gptq(w, prepare(h).matrix, spec, [list(range(s, min(s + 6, 37))) for s in range(0, 37, 6)])
    torch.testing.assert_close(solved(w, h, spec), expected, rtol=1e-12, atol=0)


def joint(rows: int, spec: ShiftSpec, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return targets [rows, 19], a metric, scattered groups of 7, 7 and 5 columns, and codes that nothing chose."""
    w, h, _ = problem(rows, 19, seed=seed)
    groups = (torch.arange(19) // 7)[torch.randperm(19, generator=torch.Generator().manual_seed(seed))]
    return w, prepare(h).matrix, groups, random_codes(rows, 19, spec, seed)


def spread(codes: Tensor, groups: Tensor, spec: ShiftSpec) -> Tensor:
    """Return each row's Z, [N, groups * (S+1), K]."""
    columns = columns_of(codes, spec)
    member = torch.nn.functional.one_hot(groups, int(groups.max()) + 1).to(F64)
    return torch.einsum("rks,kg->rgsk", columns, member).flatten(1, 2)


def decoded(unknowns: Tensor, codes: Tensor, groups: Tensor, spec: ShiftSpec) -> Tensor:
    z = spread(codes, groups, spec)
    tiles = unknowns.flatten(1).repeat_interleave(spec.row_group, 0)[: codes.shape[0]]
    return torch.einsum("ra,rak->rk", tiles, z)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("row_group", [1, 3])
@pytest.mark.parametrize(("code", "bits"), CODES)
def test_the_joint_refit_solves_the_layers_normal_equations(offset: bool, row_group: int, code: str, bits: int) -> None:
    spec = ShiftSpec(bits=bits, code=code, group=7, row_group=row_group, offset=offset)
    w, metric, groups, codes = joint(4, spec)
    tiles = unrounded(w, spec)
    start = torch.zeros(tiles.limits.shape[0], 3, tiles.scales + 1, dtype=F64)
    found = refit_scales(w, metric, groups, start, codes, tiles)
    z = spread(codes, groups, spec)
    for t, (part, target) in enumerate(zip(z.split(row_group), w.split(row_group), strict=True)):
        normal = torch.einsum("rak,kl,rbl->ab", part, metric, part)
        right = torch.einsum("rak,kl,rl->a", part, metric, target)
        gradient = normal @ found[t].flatten() - right
        assert float(gradient.abs().max()) <= 1e-7 * float(right.abs().max())
        best = torch.linalg.lstsq(normal, right[:, None], driver="gelsd").solution[:, 0]
        value = found[t].flatten() @ (normal @ found[t].flatten() - 2 * right)
        assert float(value) == pytest.approx(float(best @ (normal @ best - 2 * right)), rel=1e-7)
    assert offset or not found[..., 0].any()


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), terms=st.integers(0, 4), offset=st.booleans(), row_group=st.sampled_from([1, 3]))
def test_the_joint_refit_never_raises_the_loss_of_a_tile(seed: int, terms: int, offset: bool, row_group: int) -> None:
    spec = ShiftSpec(bits=2, group=7, row_group=row_group, terms=terms, offset=offset)
    w, metric, groups, codes = joint(5, spec, seed)
    tiles = tiles_of(w, spec)
    start = draw(tiles.limits.shape[0], 3, 3, seed=seed) * 0.05
    start[..., 0] *= float(offset)
    before = forms(w - decoded(start, codes, groups, spec), metric, row_group)
    found = refit_scales(w, metric, groups, start, codes, tiles)
    after = forms(w - decoded(found, codes, groups, spec), metric, row_group)
    assert bool((after <= before * (1 + 1e-12)).all()) and bool((after < before).any())
    again = refit_scales(w, metric, groups, found, codes, tiles)
    assert bool((forms(w - decoded(again, codes, groups, spec), metric, row_group) <= after * (1 + 1e-12)).all())


def test_feedback_rounding_beats_plain_rounding() -> None:
    won, spec = 0, ShiftSpec(bits=3, group=7, terms=1)
    for seed in range(60):
        w, metric, groups, codes = joint(1, spec, seed)
        losses = []
        for feedback in (True, False):
            tiles = tiles_of(w, replace(spec, feedback=feedback))
            huge = torch.full((1, 3, 4), 100.0, dtype=F64)
            found = refit_scales(w, metric, groups, huge, codes, tiles)
            losses.append(float(forms(w - decoded(found, codes, groups, spec), metric).sum()))
        won += losses[0] <= losses[1]
    assert won >= 54


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


def test_each_stage_lowers_calibration_and_held_out_loss() -> None:
    w, h, held = problem(24, 96)
    bare = replace(BARE, group=32)
    stages = [bare, replace(bare, starts=4), replace(bare, starts=4, iterations=4)]
    for more in ({"polish": 2}, {"refit": True}, {"sweeps": 1}, {"sweeps": 3}):
        stages.append(replace(stages[-1], **more))  # type: ignore[arg-type]
    codes = [solve(w, None, bare), *(solve(w, h, s) for s in stages)]
    values = [loss(w, c, h) for c in codes]
    # Within a group each stage keeps the best; what the groups after it make of that is no theorem.
    assert all(after < 1.02 * before for before, after in pairwise(values)) and len(set(values)) == len(values)
    assert values[-1] < 0.9 * values[1]
    assert values[-1] < 0.3 * values[0]
    assert loss(w, codes[-1], held) < 0.5 * loss(w, codes[0], held)
    assert loss(w, codes[-1], held) < 0.25 * relative_loss(w, rtn(w, 2, 32).dequantize(), held)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    row_group=st.sampled_from([1, 3]),
    group=st.integers(1, 20),
    terms=st.integers(0, 3),
    code=st.sampled_from(CODES),
    iterations=st.integers(0, 2),
)
def test_refit_and_sweeps_never_raise_any_tile(
    seed: int, row_group: int, group: int, terms: int, code: tuple[str, int], iterations: int
) -> None:
    w, h, _ = problem(7, 19, seed)
    spec = ShiftSpec(bits=code[1], code=code[0], group=group, row_group=row_group, terms=terms, iterations=iterations)
    damped = prepare(h, spec.damp).matrix
    bare = replace(spec, sweeps=0)
    chain = [bare, replace(bare, refit=True), *(replace(bare, refit=True, sweeps=n) for n in (1, 2, 3))]
    found = [forms(w - solved(w, h, s), damped, row_group) for s in chain]
    for before, after in pairwise(found):
        assert bool((after <= before * (1 + 1e-9)).all())
    swept = forms(w - solved(w, h, replace(spec, sweeps=1)), damped, row_group)
    assert bool((swept <= found[0] * (1 + 1e-9)).all())


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 24),
    row_group=st.sampled_from([1, 2]),
    terms=st.integers(0, 3),
    code=st.sampled_from(CODES),
)
def test_more_iterations_never_raise_the_loss_of_a_group(
    seed: int, n: int, row_group: int, terms: int, code: tuple[str, int]
) -> None:
    w, h, _ = problem(4, n, seed)
    upper, factor = factors(prepare(h).matrix)
    for option in ("iterations", "polish"):
        before = None
        for count in range(4):
            spec = ShiftSpec(bits=code[1], code=code[0], row_group=row_group, terms=terms, iterations=0, polish=0)
            fit = fit_tiles(w, upper, factor, tiles_of(w, replace(spec, **{option: count})))
            now = torch.stack([part.square().sum() for part in fit.error.split(row_group)])
            assert before is None or bool((now <= before).all())
            before = now


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), terms=st.integers(0, 3), code=st.sampled_from(CODES), polish=st.integers(0, 2))
def test_a_given_start_is_never_made_worse(seed: int, terms: int, code: tuple[str, int], polish: int) -> None:
    w, h, _ = problem(5, 13, seed)
    upper, factor = factors(prepare(h).matrix)
    spec = ShiftSpec(bits=code[1], code=code[0], row_group=2, terms=terms, iterations=1, polish=polish)
    tiles = tiles_of(w, spec)
    start = draw(3, tiles.scales + 1, seed=seed) * 0.03, random_codes(5, 13, spec, seed)
    before = ((w - levels_of(*start, tiles)) @ factor).square().sum(1)
    fit = fit_tiles(w, upper, factor, tiles, start)
    after = fit.error.square().sum(1)
    for b, a in zip(before.split(2), after.split(2), strict=True):
        assert float(a.sum()) <= float(b.sum()) * (1 + 1e-12)


def nasty(rows: int, inputs: int) -> Tensor:
    """Return a weight with rows of zeros, of one value, of one outlier, of two values, and of groups of zeros."""
    w = draw(max(rows, 6), inputs) * 0.05
    w[0], w[1], w[2] = 0.0, 0.25, 0.0
    w[2, inputs // 2] = 1e4
    w[3] = torch.where(w[3] > 0, 0.5, -0.25)
    w[4, : inputs // 2] = 0.0
    return w[:rows]


@pytest.mark.parametrize(("inputs", "group"), [(20, 8), (3, 8), (17, 1), (5, 2)])
@pytest.mark.parametrize("row_group", [1, 2, 0])
@pytest.mark.parametrize(("code", "bits"), CODES)
@pytest.mark.parametrize("terms", [0, 2])
def test_dead_inputs_and_degenerate_rows_stay_finite(
    inputs: int, group: int, row_group: int, code: str, bits: int, terms: int
) -> None:
    w, h = nasty(6, inputs), problem(1, inputs)[1]
    h[:, 1], h[1, :] = 0.0, 0.0
    spec = ShiftSpec(bits=bits, code=code, group=group, row_group=row_group, terms=terms, refit=True)
    for metric in (None, h, torch.zeros_like(h), torch.ones_like(h)):
        restored = solved(w, metric, spec)
        assert bool(torch.isfinite(restored).all())
        if row_group == 1:
            assert float(restored[0].abs().max()) == 0.0
            assert metric is None or bool(torch.isfinite(torch.tensor(loss(w, solve(w, metric, spec), metric))))


@pytest.mark.parametrize(("code", "bits", "off"), [("planes", 3, 0.03), ("trits", 2, 0.03), ("trits31", 2, 0.2)])
def test_a_row_of_one_outlier_keeps_it(code: str, bits: int, off: float) -> None:
    w, h = nasty(6, 20), problem(1, 20)[1]
    restored = solved(w, h, ShiftSpec(bits=bits, code=code, group=8))
    assert float((restored[2] - w[2]).abs().max()) < off * 1e4


def test_what_a_dead_input_weighs_does_not_matter() -> None:
    w, h, _ = problem(5, 20, seed=4)
    h[:, 6], h[6, :] = 0.0, 0.0
    loud = w.clone()
    loud[:, 6] = 1e6
    quiet = w.index_fill(1, torch.tensor([6]), 0.0)
    assert torch.equal(solved(loud, h, ShiftSpec(bits=2, group=8)), solved(quiet, h, ShiftSpec(bits=2, group=8)))


def test_a_hessian_that_ignores_an_input_still_leaves_it_small() -> None:
    w, h, _ = problem(5, 20, seed=4)
    h[:, 6], h[6, :] = 0.0, 0.0
    assert float(solved(w, h, ShiftSpec(bits=3, group=8))[:, 6].abs().max()) <= 4 * float(w.abs().max())


def test_data_free_solution_fits_groups_alone() -> None:
    w = draw(12, 50) * 2.0**-20
    spec = ShiftSpec(group=16, starts=3)
    tail = fit_bcq(w[:, 48:], 3, rounding=rounding_table(2), offset=True, limits=limits_of(w, 1), starts=3)
    assert torch.equal(solved(w, None, spec)[:, 48:], tail.values)
    assert 0 < loss(w, solve(w, None, spec), None) < 0.05


def released(w: np.ndarray, metric: Tensor, group: int, row_group: int, planes: int) -> np.ndarray:
    """The rule of ShiftAddLLM's release: greedy start, least squares, sorted scales, rounding, nearest levels."""
    upper = factors(metric)[0].numpy()
    w, out = w.copy(), np.zeros_like(w)
    high = limits_of(torch.from_numpy(w), row_group)

    def rounded(alpha: np.ndarray, tile: int) -> np.ndarray:
        low, top = (torch.tensor(x) for x in high[tile, 2:])
        return round_power_terms(torch.from_numpy(alpha), 3, low, top).numpy()

    signs = np.array([[(code >> i & 1) * 2.0 - 1.0 for i in range(planes)] for code in range(2**planes)])
    for s in range(0, w.shape[1], group):
        e = min(s + group, w.shape[1])
        for tile, top in enumerate(range(0, w.shape[0], row_group)):
            rows = slice(top, top + row_group)
            values = w[rows, s:e].flatten()
            residual, alpha = values.copy(), np.zeros(planes)
            for i in range(planes):
                alpha[i] = np.abs(residual).mean()
                residual -= np.where(residual >= 0, alpha[i], -alpha[i])
            alpha, best, lowest = rounded(alpha, tile), None, np.inf
            for _ in range(51):
                chosen = np.abs(values[:, None] - signs @ alpha).argmin(1)
                found = np.square(values - (signs @ alpha)[chosen]).sum()
                if found < lowest:
                    best, lowest = alpha, found
                alpha = np.linalg.lstsq(signs[chosen], values, rcond=None)[0]
                alpha = np.sort(np.abs(rounded(alpha, tile)))[::-1]
            levels = signs @ best
            for j in range(s, e):
                out[rows, j] = levels[np.abs(w[rows, j, None] - levels).argmin(1)]
                # Later columns of the tile are coded on weights that have made up for this one.
                error = (w[rows, j] - out[rows, j]) / upper[j, j]
                w[rows, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    return out


@pytest.mark.parametrize(("group", "row_group", "rows", "inputs"), [(8, 9, 25, 20), (1, 5, 12, 9), (1, 0, 14, 7)])
@pytest.mark.parametrize("bits", [2, 3])
def test_released_settings_are_the_releases_rule(group: int, row_group: int, rows: int, inputs: int, bits: int) -> None:
    w, h, _ = problem(rows, inputs, seed=9)
    spec = ShiftSpec(
        bits=bits,
        group=group,
        row_group=row_group,
        terms=3,
        offset=False,
        weighted=False,
        rounds=50,
        starts=1,
        iterations=0,
        polish=0,
        sweeps=0,
        ordered=False,
        feedback=False,
    )
    expected = released(w.numpy(), prepare(h).matrix, group, row_group or rows, bits)
    torch.testing.assert_close(solved(w, h, spec), torch.from_numpy(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"terms": 5}, {"terms": -1}, {"bits": 9}, {"bits": 0}, {"group": 0}, {"row_group": -1}, {"code": "levels"}],
)
def test_options_that_no_code_has_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        solve(torch.ones(2, 4), None, ShiftSpec(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "hessian"),
    [
        (torch.full((2, 4), float("nan")), None),
        (torch.full((2, 4), float("inf")), torch.eye(4)),
        (torch.ones(2, 4), torch.eye(5)),
        (torch.ones(2, 4, 1), None),
        (torch.ones(2, 4), torch.full((4, 4), float("nan"))),
        (torch.ones(2, 4), torch.ones(4, 5)),
    ],
)
def test_misuse_is_refused(weight: Tensor, hessian: Tensor | None) -> None:
    with pytest.raises(UsageError):
        solve(weight, hessian, ShiftSpec())


def test_more_trits_than_a_byte_holds_are_refused() -> None:
    assert design_of("trits", 5, 1).matrix.shape[0] == 243
    with pytest.raises(UsageError):
        solve(draw(2, 8), None, ShiftSpec(code="trits", bits=6))


@pytest.mark.parametrize("row_group", [1, 3])
def test_bytes_do_not_depend_on_the_run_or_on_the_threads(row_group: int) -> None:
    w, h, _ = problem(16, 40)
    spec = ShiftSpec(group=16, row_group=row_group, refit=True)
    found, threads = [solve(w, h, spec), solve(w, h, spec)], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found.append(solve(w, h, spec))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(t, other.tensors()[name]) for name, t in found[0].tensors().items())
