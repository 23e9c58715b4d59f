"""Binary coding of rows: exact steps, keep-best, equivariance and the degenerate groups."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import UsageError
from ir.ops.powerterms import round_power_terms
from passes.shiftcode import value_fit
from passes.shiftcode.bcq import BcqFit, fit_bcq
from passes.shiftcode.design import design_of
from passes.shiftcode.levels import How, solve_rounded
from passes.shiftcode.rounding import limits_of, round_value, rounding_table

F64 = torch.float64
NOTHING = rounding_table(-1)
CODES = [("planes", 1), ("planes", 3), ("planes", 5), ("trits", 2), ("trits31", 2)]
ANYWHERE = np.array([-1000, 1000, -1000, 1000])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def levels(fit: BcqFit) -> Tensor:
    """Return all values that the codes of each row can stand for, by adding up digits."""
    if fit.design.code == "planes":
        digits = torch.tensor([d[::-1] for d in product((-1.0, 1.0), repeat=fit.design.bits)], dtype=F64)
    else:
        digits = torch.tensor([d[::-1] for d in product((-1.0, 0.0, 1.0), repeat=fit.design.bits)], dtype=F64)
    if fit.design.code == "trits31":
        digits = 3 * digits[:, :1] + digits[:, 1:]
    return fit.z[:, None] + fit.alpha @ digits.T


def how(code: str, bits: int, offset: bool, terms: int = -1, feedback: bool = True) -> How:
    design = design_of(code, bits, 1)
    first = 0 if offset else 1
    return How(design.matrix, design.starts, *rounding_table(terms), first, 0, feedback, design.sortable, 0)


@settings(max_examples=40)
@given(
    code=st.sampled_from(CODES),
    rows=st.integers(1, 5),
    n=st.integers(1, 30),
    terms=st.integers(-1, 4),
    offset=st.booleans(),
    quarters=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_codes_are_those_of_the_nearest_of_all_levels(
    code: tuple[str, int], rows: int, n: int, terms: int, offset: bool, quarters: bool, seed: int
) -> None:
    w = draw(rows, n, seed=seed)
    # Quarters tie with each other and with the middles.
    w = torch.round(4 * w) / 4 if quarters else w
    fit = fit_bcq(w, code[1], rounding=rounding_table(terms), code=code[0], offset=offset, starts=2)
    nearest = (levels(fit)[:, None, :] - w[:, :, None]).abs().amin(2)
    torch.testing.assert_close((fit.values - w).abs(), nearest, rtol=1e-13, atol=1e-14)
    digits = fit.design.digits(fit.codes)
    assert digits.shape == (code[1], rows, n)
    plane = digits.to(F64) if code[0] != "planes" else digits.to(F64) * 2 - 1
    alpha = fit.alpha * torch.tensor([3.0, 1.0], dtype=F64) if code[0] == "trits31" else fit.alpha
    torch.testing.assert_close(fit.z[:, None] + torch.einsum("rs,srn->rn", alpha, plane), fit.values)
    assert offset or not fit.z.any()


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("code", "bits"), [("planes", 3), ("trits", 2), ("trits31", 2)])
def test_scales_of_fixed_cells_are_weighted_least_squares(code: str, bits: int, offset: bool) -> None:
    w, weight = draw(6, 40) * 2.0**-30, draw(6, 40, seed=1).square() * 2.0**40
    options, start = how(code, bits, offset), 0 if offset else 1
    count, size = options.design.shape[0], options.design.shape[1] + 1
    codes = torch.randint(0, count, w.shape, generator=torch.Generator().manual_seed(2))
    for x, m, c in zip(w.numpy(), weight.numpy(), codes.numpy(), strict=True):
        mass, moment = (np.bincount(c, v, count) for v in (m, m * x))
        normal, right, found = np.empty((size, size)), np.empty(size), np.empty(size)
        value_fit.cell_normal(mass, moment, options.design, normal, right)
        design = np.column_stack([np.ones(len(x)), options.design[c]])
        np.testing.assert_allclose(normal, design.T @ (m[:, None] * design), rtol=1e-12, atol=1e-6 * m.min())
        solve_rounded(normal, right, found, ANYWHERE, options)
        root = np.sqrt(m)[:, None]
        expected = np.linalg.lstsq(design[:, start:] * root, x * root[:, 0], rcond=None)[0]
        np.testing.assert_allclose(found[start:], expected, rtol=1e-7, atol=1e-9 * abs(x).max())
        assert found[0] != 0.0 if offset else found[0] == 0.0


@pytest.mark.parametrize("offset", [False, True])
def test_rounding_with_feedback_beats_rounding_the_solution(offset: bool) -> None:
    w, first = draw(300, 32), 0 if offset else 1
    options = [how("planes", 3, offset, 1, feedback) for feedback in (True, False)] + [how("planes", 3, offset)]
    losses = np.zeros((300, 2))
    for r, (x, c) in enumerate(
        zip(w.numpy(), fit_bcq(w, 3, rounding=NOTHING, offset=offset).codes.numpy(), strict=True)
    ):
        design = np.column_stack([np.full(32, float(offset)), options[0].design[c]])
        fed, plain, exact = np.empty((3, 4))
        for option, unknowns in zip(options, (fed, plain, exact), strict=True):
            solve_rounded(design.T @ design, design.T @ x, unknowns, ANYWHERE, option)
        rounded = round_power_terms(torch.from_numpy(exact), 1).numpy()
        np.testing.assert_array_equal(plain, rounded)
        assert fed[first] == rounded[first]
        losses[r] = [np.square(x - design @ u).sum() for u in (fed, plain)]
    assert (losses[:, 0] <= losses[:, 1] * (1 + 1e-12)).mean() >= 0.9
    assert losses[:, 0].sum() < 0.98 * losses[:, 1].sum()


@pytest.mark.parametrize("terms", [-1, 0, 1, 2])
@pytest.mark.parametrize(("code", "bits"), [("planes", 3), ("trits", 2), ("trits31", 2)])
def test_more_rounds_never_raise_a_loss(terms: int, code: str, bits: int) -> None:
    w, weight = draw(60, 40) * 2.0**-8, draw(1, 40, seed=1).square()
    found = [
        fit_bcq(w, bits, weight, rounding=rounding_table(terms), code=code, offset=True, rounds=rounds).loss
        for rounds in range(8)
    ]
    for before, after in pairwise(found):
        assert bool((after <= before).all())
    assert float(found[-1].sum()) < 0.999 * float(found[0].sum())


def test_each_unrounded_step_lowers_the_loss_or_has_converged() -> None:
    w, weight = draw(1, 200)[0].numpy(), draw(1, 200, seed=1).square()[0].numpy()
    options, before = how("planes", 3, True), np.inf
    unknowns = np.array([0.3, 1.0, 0.5, 0.25])
    for _ in range(12):
        level = unknowns[0] + options.design @ unknowns[1:]
        codes = np.abs(w[:, None] - level).argmin(1)
        now = float((weight * (w - level[codes]) ** 2).sum())
        assert now <= before * (1 + 1e-9)
        mass, moment = (np.bincount(codes, v, 8) for v in (weight, weight * w))
        normal, right = np.empty((4, 4)), np.empty(4)
        value_fit.cell_normal(mass, moment, options.design, normal, right)
        solve_rounded(normal, right, unknowns, ANYWHERE, options)
        fixed = float((weight * (w - unknowns[0] - options.design[codes] @ unknowns[1:]) ** 2).sum())
        assert fixed <= now * (1 + 1e-9)
        before = fixed


@pytest.mark.parametrize("terms", [-1, 0, 2])
def test_the_reported_loss_is_the_loss_of_the_returned_values(terms: int) -> None:
    w, weight = draw(50, 21), draw(50, 21, seed=3).square()
    fit = fit_bcq(w, 2, weight, rounding=rounding_table(terms), offset=True, starts=4)
    torch.testing.assert_close((weight * (w - fit.values) ** 2).sum(1), fit.loss, rtol=1e-10, atol=1e-13)
    if terms == 2:
        for values in (fit.alpha, fit.z):
            assert torch.equal(round_power_terms(values, 2), values)
    if terms == 0:
        assert torch.equal(fit.alpha.half().double(), fit.alpha) and torch.equal(fit.z.half().double(), fit.z)


def test_more_starts_never_raise_the_loss_of_a_row() -> None:
    w = draw(60, 48, seed=4)
    for code, bits in CODES[1:]:
        for terms in (-1, 1):
            found = [
                fit_bcq(w, bits, rounding=rounding_table(terms), code=code, offset=True, starts=n).loss
                for n in (1, 2, 3, 4)
            ]
            assert all(bool((after <= before).all()) for before, after in pairwise(found))
            assert code == "trits31" or float(found[-1].sum()) < float(found[0].sum())


def test_more_planes_terms_and_an_offset_lower_the_loss() -> None:
    w = draw(80, 64)
    by_planes = [fit_bcq(w, q, rounding=NOTHING).loss for q in (1, 2, 3, 4, 5, 6)]
    for before, after in pairwise(by_planes):
        assert bool((after < before).all()) and float(after.sum()) < 0.5 * float(before.sum())
    shifted = fit_bcq(w + 0.3, 2, rounding=NOTHING), fit_bcq(w + 0.3, 2, rounding=NOTHING, offset=True)
    assert float(shifted[1].loss.sum()) < 0.95 * float(shifted[0].loss.sum())
    by_terms = [float(fit_bcq(w, 3, rounding=rounding_table(t)).loss.sum()) for t in (1, 2, 3)]
    by_terms.append(float(by_planes[2].sum()))
    assert by_terms == sorted(by_terms, reverse=True) and by_terms[2] < 1.05 * by_terms[3] < 0.95 * by_terms[0]


def test_a_further_plane_from_the_residual_is_never_beaten_by_fewer() -> None:
    w = draw(80, 40, seed=5)
    for q in (1, 2, 3):
        few, many = fit_bcq(w, q, rounding=NOTHING), fit_bcq(w, q + 1, rounding=NOTHING, rounds=0)
        residual = (w - few.values).abs()
        bound = (residual - residual.mean(1, keepdim=True)).square().sum(1)
        assert bool((bound < few.loss).all())
        assert bool((fit_bcq(w, q + 1, rounding=NOTHING, starts=4).loss < bound).float().mean() > 0.9)
        assert bool((many.loss < few.loss).float().mean() > 0.5)


@pytest.mark.parametrize("terms", [-1, 2])
def test_constant_weights_equal_no_weights(terms: int) -> None:
    w, rounding = draw(20, 33), rounding_table(terms)
    plain = fit_bcq(w, 3, rounding=rounding, offset=True)
    weighted = fit_bcq(w, 3, torch.full((33,), 4.0), rounding=rounding, offset=True)
    assert torch.equal(plain.codes, weighted.codes) and torch.equal(plain.alpha, weighted.alpha)
    assert torch.equal(plain.loss * 4, weighted.loss)
    other = fit_bcq(w, 3, torch.linspace(0.1, 4, 33), rounding=rounding, offset=True)
    assert not torch.equal(plain.alpha, other.alpha)


def test_one_plane_is_the_mean_magnitude() -> None:
    w, weight = draw(9, 30) * 2.0**-50, draw(30, seed=1).square()
    fit = fit_bcq(w, 1, rounding=NOTHING)
    torch.testing.assert_close(fit.alpha[:, 0], w.abs().mean(1), rtol=1e-9, atol=0)
    assert torch.equal(fit.codes, (w > 0).to(torch.uint8))
    fit = fit_bcq(w, 1, weight, rounding=NOTHING)
    torch.testing.assert_close(fit.alpha[:, 0], (weight * w.abs()).sum(1) / weight.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("terms", [-1, 1, 2])
@pytest.mark.parametrize("power", [-90, -3, 17])
@pytest.mark.parametrize(("code", "bits"), CODES[1:])
def test_scale_equivariance_is_bit_exact(terms: int, power: int, code: str, bits: int) -> None:
    w = draw(20, 24)
    limits, rounding = limits_of(w, 1), rounding_table(terms)
    base = fit_bcq(w, bits, rounding=rounding, code=code, offset=True, starts=4, limits=limits)
    moved = fit_bcq(
        w * 2.0**power, bits, rounding=rounding, code=code, offset=True, starts=4, limits=limits_of(w * 2.0**power, 1)
    )
    assert torch.equal(moved.codes, base.codes) and torch.equal(moved.loss, base.loss * 4.0**power)
    assert torch.equal(moved.alpha, base.alpha * 2.0**power) and torch.equal(moved.z, base.z * 2.0**power)


@pytest.mark.parametrize(("code", "bits"), CODES)
@pytest.mark.parametrize("offset", [False, True])
def test_sign_equivariance(code: str, bits: int, offset: bool) -> None:
    w = draw(20, 24)
    one, other = (fit_bcq(x, bits, rounding=rounding_table(2), code=code, offset=offset) for x in (w, -w))
    torch.testing.assert_close(other.values, -one.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("terms", [-1, 0, 1, 3])
@pytest.mark.parametrize("starts", [1, 4])
@pytest.mark.parametrize(("code", "bits"), CODES)
@pytest.mark.parametrize("offset", [False, True])
def test_degenerate_rows_converge(terms: int, starts: int, code: str, bits: int, offset: bool) -> None:
    w = torch.zeros(4, 16, dtype=F64)
    w[1], w[2, 5], w[3, ::2] = -0.75, 100.0, 2.0**-20
    fit = fit_bcq(w, bits, rounding=rounding_table(terms), code=code, offset=offset, starts=starts)
    assert bool(torch.isfinite(fit.values).all() and torch.isfinite(fit.loss).all())
    assert not fit.values[0].any() and float(fit.loss[0]) == 0.0
    # One power of two is within a third of any value; nine levels without an offset reach a third of their step.
    assert bool((fit.loss <= w.square().sum(1) * (1 if code == "trits31" or bits == 1 else 1 / 8)).all())
    if bits > 1 and terms in (-1, 3) and code != "trits31":
        assert float((fit.values[1] + 0.75).abs().max()) <= 0.75 * (1e-8 if terms < 0 else 0.03)


@pytest.mark.parametrize("terms", [-1, 1, 2])
@pytest.mark.parametrize("starts", [1, 4])
@pytest.mark.parametrize("power", [-30, 0])
def test_rows_whose_values_the_code_book_reaches_have_no_error(terms: int, starts: int, power: int) -> None:
    w = torch.tensor([[-1.5, -0.5, 0.5, 1.5] * 4, [-1.25, -0.75, 0.75, 1.25] * 4], dtype=F64) * 2.0**power
    for offset in (False, True):
        fit = fit_bcq(w, 2, rounding=rounding_table(terms), offset=offset, starts=starts)
        torch.testing.assert_close(fit.values, w, rtol=1e-9, atol=0)
        assert bool((fit.loss <= 1e-14 * w.square().sum(1)).all())


@pytest.mark.parametrize("terms", [-1, 3])
@pytest.mark.parametrize("code", ["trits", "trits31"])
def test_nine_equidistant_values_are_two_trits(terms: int, code: str) -> None:
    w = torch.arange(-4, 5, dtype=F64).repeat(2, 3) * torch.tensor([[2.0**-40], [0.75]], dtype=F64)
    fit = fit_bcq(w, 2, rounding=rounding_table(terms), code=code, starts=3)
    torch.testing.assert_close(fit.values, w, rtol=1e-9, atol=0)
    assert fit.alpha.shape[1] == (1 if code == "trits31" else 2)


def test_columns_of_weight_zero_do_not_matter() -> None:
    w, weight = draw(10, 20), torch.ones(20, dtype=F64)
    weight[12:] = 0.0
    loud, cut = w.clone(), w[:, :12]
    loud[:, 12:] = 1e3
    rounding = rounding_table(2)
    one, two, three = (
        fit_bcq(x, 2, m, rounding=rounding, offset=True, starts=3)
        for x, m in ((w, weight), (loud, weight), (cut, weight[:12]))
    )
    assert torch.equal(one.alpha, two.alpha) and torch.equal(one.codes[:, :12], two.codes[:, :12])
    torch.testing.assert_close(one.values[:, :12], three.values, rtol=1e-12, atol=0)
    nothing = fit_bcq(w, 2, weight * 0, rounding=rounding, offset=True)
    assert bool(torch.isfinite(nothing.values).all()) and not nothing.loss.any()


@pytest.mark.parametrize("terms", [-1, 2])
def test_rows_are_independent(terms: int) -> None:
    w = torch.cat([draw(17, 48), draw(20, 48, seed=9) * 50])
    options = {"rounding": rounding_table(terms), "offset": True, "starts": 4}
    whole, part = fit_bcq(w, 3, **options), fit_bcq(w[:17], 3, **options)  # type: ignore[arg-type]
    assert torch.equal(whole.codes[:17], part.codes) and torch.equal(whole.alpha[:17], part.alpha)


def test_limits_hold_every_scale_and_offset_within_its_octaves() -> None:
    w = draw(30, 64) * torch.logspace(-1.5, 1.5, 30, dtype=F64)[:, None]
    limits = np.tile(np.array([-2, 0, -1, 1]), (30, 1))
    fit = fit_bcq(w, 4, rounding=rounding_table(1), offset=True, limits=limits)
    assert set(fit.alpha.unique().tolist()) == {0.0, 0.5, 1.0, 2.0}
    assert {0.0, 0.25, 0.5, 1.0} >= set(fit.z.abs().unique().tolist()) > {0.0, 0.25}
    free = fit_bcq(w, 4, rounding=rounding_table(1), offset=True)
    assert float(free.loss.sum()) < 0.5 * float(fit.loss.sum())


NASTY = [0.0, -0.0, 1.0, 1.5, 0.75, 3.0, 1e-30, -1e30, 2.0**-127, 2.0**-14, 2.0**-15, 65504.0, 2.0**-24, 2.0**-25]


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_compiled_rounding_is_rounding_to_power_terms(terms: int) -> None:
    table = rounding_table(terms)
    middles = torch.from_numpy(table[1])
    # At a middle, one step below and one above it.
    around = torch.cat([middles, torch.nextafter(middles, middles * 0), torch.nextafter(middles, middles * 9)])
    x = torch.cat([draw(300) * torch.exp2(draw(300, seed=1) * 9), torch.tensor(NASTY, dtype=F64), around, -around * 8])
    for low, high in ((-1000, 1000), (-3, 2), (0, 0), (-40, -30)):
        expected = round_power_terms(x, terms, torch.tensor(low), torch.tensor(high))
        found = torch.tensor([round_value(float(v), *table, low, high) for v in x], dtype=F64)
        assert torch.equal(found, expected)
        again = torch.tensor([round_value(float(v), *table, low, high) for v in found], dtype=F64)
        assert torch.equal(again, found)


def test_compiled_rounding_to_float16_is_that_of_torch() -> None:
    exponents = torch.linspace(-26, 15.9, 400, dtype=F64)
    x = torch.cat([draw(400).sign() * torch.exp2(exponents), torch.tensor(NASTY, dtype=F64)])
    x = x[x.abs() < 65520]
    halves = torch.arange(1, 3000, 7, dtype=F64) * 2.0**-25
    x = torch.cat([x, halves, -halves, torch.arange(2047.5, 4100, 0.5, dtype=F64)])
    found = torch.tensor([round_value(float(v), *rounding_table(0), 0, 0) for v in x], dtype=F64)
    assert torch.equal(found, x.half().double()) and not torch.equal(found, x)


def test_nothing_is_rounded_where_nothing_is_asked_for() -> None:
    for value in (1 / 3, -1e-200, 1e200):
        assert round_value(value, *NOTHING, -3, 3) == value


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(UsageError, match="planes, trits or trits31"):
        design_of("levels", 2, 1)
