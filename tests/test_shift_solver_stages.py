"""What refits, iterations, sweeps and feedback do to the loss of a layer solved in shift-add codes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.quantize.hessian import prepare
from passes.quantize.uniform import rtn
from passes.shiftcode.group_fit import fit_tiles
from passes.shiftcode.joint import refit_scales
from passes.shiftcode.solver import loss, relative_loss
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.tiles import levels_of, tiles_of
from tests.solver_problems import (
    BARE,
    CODES,
    F64,
    columns_of,
    draw,
    factors,
    forms,
    problem,
    random_codes,
    solve,
    solved,
    unrounded,
)


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
