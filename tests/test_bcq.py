"""Binary coding of one group: exact steps, keep-best, equivariance and the degenerate groups."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.ops.shiftcode import round_power_terms
from passes.shiftcode.bcq import (
    Rounding,
    cell_normal,
    code_cells,
    code_levels,
    codebook,
    fit_bcq,
    greedy_start,
    nearest_cells,
    nearest_codes,
    pattern,
    row_window,
    solve_rounded,
    sorted_rows,
    weighted_loss,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(planes=st.integers(1, 4), rows=st.integers(1, 5), n=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_nearest_codes_equal_brute_force(planes: int, rows: int, n: int, seed: int) -> None:
    w, alpha, z = normal(rows, n, seed=seed), normal(rows, planes, seed=seed + 1).abs(), normal(rows, seed=seed + 2)
    levels = code_levels(alpha, z)
    torch.testing.assert_close(levels, torch.cat([z[:, None], alpha], 1) @ pattern(planes, "cpu").T)
    codes = nearest_codes(codebook(alpha, z), w)
    chosen = (levels.gather(1, codes) - w).abs()
    brute = (levels[:, None, :] - w[:, :, None]).abs().amin(2)
    torch.testing.assert_close(chosen, brute, rtol=1e-14, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(planes=st.integers(1, 4), rows=st.integers(1, 5), n=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_cells_of_sorted_rows_are_those_of_the_codes(planes: int, rows: int, n: int, seed: int) -> None:
    w, alpha, z = normal(rows, n, seed=seed), normal(rows, planes, seed=seed + 1).abs(), normal(rows, seed=seed + 2)
    # Quarters tie with each other and with the middles.
    w, alpha, z = (torch.round(4 * x) / 4 for x in (w, alpha, z))
    weight = normal(rows, n, seed=seed + 3).square()
    book = codebook(alpha, z)
    expected = code_cells(nearest_codes(book, w), w, weight, planes)
    found = nearest_cells(sorted_rows(w, weight), book)
    torch.testing.assert_close(found.mass, expected.mass, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.moment, expected.moment, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [False, True])
def test_scales_equal_weighted_lstsq(offset: bool) -> None:
    w, weight = normal(6, 25), normal(6, 25, seed=1).square()
    codes = torch.randint(0, 8, (6, 25), generator=torch.Generator().manual_seed(2))
    z, alpha = solve_rounded(*cell_normal(code_cells(codes, w, weight, 3)), None, offset)
    for r in range(6):
        design = pattern(3, "cpu")[codes[r]]
        design = design if offset else design[:, 1:]
        root = weight[r].sqrt()[:, None]
        expected = torch.linalg.lstsq(design * root, w[r, :, None] * root).solution[:, 0]
        got = torch.cat([z[r : r + 1], alpha[r]]) if offset else alpha[r]
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_sequential_rounding_beats_rounding_the_solution() -> None:
    w, weight = normal(400, 32), torch.ones(400, 32, dtype=torch.float64)
    fit = fit_bcq(w, 3, offset=True)
    equations = cell_normal(code_cells(fit.codes, w, weight, 3))
    z0, a0 = solve_rounded(*equations, None, True)
    z1, a1 = solve_rounded(*equations, Rounding(1), True)
    assert torch.equal(z1, round_power_terms(z0, 1)), "the first unknown is rounded at its optimum"
    plain = weighted_loss(w, weight, round_power_terms(a0, 1), round_power_terms(z0, 1), fit.codes)
    fed = weighted_loss(w, weight, a1, z1, fit.codes)
    assert float(fed.sum()) < 0.97 * float(plain.sum())


def test_real_alternation_never_rises_and_keeps_the_best() -> None:
    w, weight = normal(200, 40), normal(1, 40, seed=1).square().expand(200, 40)
    losses = [fit_bcq(w, 3, weight, offset=True, rounds=r).loss for r in range(8)]
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-9)).all())
    rounded = [fit_bcq(w, 3, weight, offset=True, rounds=r, rounding=Rounding(1)).loss for r in range(8)]
    for before, after in pairwise(rounded):
        assert bool((after <= before).all())
    assert float(rounded[-1].sum()) < float(rounded[0].sum())


def test_reported_loss_is_the_loss_of_the_returned_values() -> None:
    w, weight = normal(50, 21), normal(50, 21, seed=3).square()
    fit = fit_bcq(w, 2, weight, offset=True, rounding=Rounding(2), starts=4)
    torch.testing.assert_close((weight * (w - fit.values) ** 2).sum(1), fit.loss, rtol=1e-13, atol=0)
    rebuilt = fit.z[:, None] + ((fit.signs.double() * 2 - 1) * fit.alpha.T[:, :, None]).sum(0)
    assert torch.equal(rebuilt, fit.values)
    assert torch.equal(round_power_terms(fit.alpha, 2), fit.alpha) and torch.equal(round_power_terms(fit.z, 2), fit.z)


def test_more_planes_starts_terms_and_an_offset_lower_the_loss() -> None:
    w = normal(80, 64)
    by_planes = [float(fit_bcq(w, q).loss.sum()) for q in (1, 2, 3, 4)]
    assert by_planes == sorted(by_planes, reverse=True)
    assert float(fit_bcq(w, 3, starts=4).loss.sum()) < 0.99 * float(fit_bcq(w, 3).loss.sum())
    assert float(fit_bcq(w, 2, offset=True).loss.sum()) < 0.98 * by_planes[1]
    by_terms = [float(fit_bcq(w, 3, rounding=Rounding(t)).loss.sum()) for t in (1, 2, 3)]
    assert by_terms == sorted(by_terms, reverse=True)


def test_constant_weights_equal_no_weights() -> None:
    w = normal(20, 33)
    plain, weighted = fit_bcq(w, 3), fit_bcq(w, 3, torch.full((33,), 4.0))
    assert torch.equal(plain.codes, weighted.codes) and torch.equal(plain.alpha, weighted.alpha)


def test_one_plane_is_the_mean_magnitude() -> None:
    w = normal(9, 30)
    torch.testing.assert_close(fit_bcq(w, 1).alpha[:, 0], w.abs().mean(1), rtol=1e-9, atol=0)


def test_greedy_start_codes_exact_zeros() -> None:
    alpha, z = greedy_start(torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64), 3, False)
    assert float(alpha.abs().max()) == 0.0 and float(z.abs().max()) == 0.0


@pytest.mark.parametrize("rounding", [None, Rounding(1), Rounding(2)])
@pytest.mark.parametrize("power", [-40, -3, 17])
def test_scale_equivariance_is_bit_exact(rounding: Rounding | None, power: int) -> None:
    w = normal(40, 24)
    base = fit_bcq(w, 3, offset=True, rounding=rounding, starts=4)
    scaled = fit_bcq(w * 2.0**power, 3, offset=True, rounding=rounding, starts=4)
    assert torch.equal(scaled.codes, base.codes)
    assert torch.equal(scaled.alpha, base.alpha * 2.0**power) and torch.equal(scaled.z, base.z * 2.0**power)


def test_sign_equivariance() -> None:
    w = normal(40, 24)
    torch.testing.assert_close(fit_bcq(-w, 3, offset=True).values, -fit_bcq(w, 3, offset=True).values)


@pytest.mark.parametrize("rounding", [None, Rounding(1), Rounding(3)])
@pytest.mark.parametrize("starts", [1, 4])
def test_degenerate_groups(rounding: Rounding | None, starts: int) -> None:
    w = torch.zeros(4, 16, dtype=torch.float64)
    w[1] = 0.75
    w[2, 5] = 100.0
    w[3] = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64).repeat(4)
    fit = fit_bcq(w, 2, offset=True, rounding=rounding, starts=starts)
    assert bool(torch.isfinite(fit.values).all())
    assert float(fit.loss[0]) == 0.0
    # The single outlier keeps at least the accuracy of one rounded scale: 1/3 of it at one term, squared.
    assert bool((fit.loss[[1, 2, 3]] <= torch.tensor([16 * 0.0625, 1e4 / 9, 0.51])).all())
    if starts == 1 and rounding is None:
        torch.testing.assert_close(fit.values[[1, 3]], w[[1, 3]], rtol=1e-8, atol=0)
        torch.testing.assert_close(fit.values[2], w[2], rtol=1e-6, atol=1e-6)


def test_columns_of_weight_zero_do_not_matter() -> None:
    w = normal(10, 20)
    weight = torch.ones(20, dtype=torch.float64)
    weight[12:] = 0.0
    disturbed = w.clone()
    disturbed[:, 12:] = 1e3
    one, two = fit_bcq(w, 2, weight, offset=True, starts=3), fit_bcq(disturbed, 2, weight, offset=True, starts=3)
    assert torch.equal(one.alpha, two.alpha) and torch.equal(one.codes[:, :12], two.codes[:, :12])


def test_rows_are_independent() -> None:
    w = torch.cat([normal(37, 48), normal(64, 48, seed=9) * 50])
    whole = fit_bcq(w, 3, offset=True, rounding=Rounding(2), starts=4)
    part = fit_bcq(w[:37], 3, offset=True, rounding=Rounding(2), starts=4)
    assert torch.equal(whole.codes[:37], part.codes) and torch.equal(whole.alpha[:37], part.alpha)


def test_windows_hold_every_scale_within_its_octaves() -> None:
    w = normal(30, 64) * torch.exp2(normal(30, 64, seed=1) * 4)
    rounding = Rounding(2, row_window(w, 2))
    alpha = torch.exp2(normal(30, 50, seed=2) * 12)
    rounded = rounding.scale(alpha)
    assert torch.equal(rounding.scale(rounded), rounded)
    assert bool((rounded <= torch.exp2(rounding.window.scale_high + 1.0)).all())  # type: ignore[union-attr]
    offsets = rounding.offset(normal(30, 50, seed=3))
    assert torch.equal(rounding.offset(offsets), offsets)
