"""The shift-add solver on degenerate layers, against the release it improves on, and on options no code has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.powerterms import round_power_terms
from passes.quantize.hessian import prepare
from passes.shiftcode.bcq import fit_bcq
from passes.shiftcode.design import design_of
from passes.shiftcode.rounding import limits_of, rounding_table
from passes.shiftcode.solver import loss
from passes.shiftcode.spec import ShiftSpec
from tests.solver_problems import (
    CODES,
    draw,
    factors,
    nasty,
    problem,
    solve,
    solved,
)


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
