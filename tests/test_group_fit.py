"""Fitting a group of columns: chunks and pieces change nothing, and every kind of code finds the nearest level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.quantize.hessian import prepare
from passes.shiftcode import group_fit
from passes.shiftcode.group_fit import Fit, Group, fit_tiles
from passes.shiftcode.spec import ShiftSpec
from passes.shiftcode.tiles import Tiles, code_levels, tiles_of
from tests.solver_problems import CODES, draw, factors, problem, random_codes

# More than 4 planes are searched by halving, fewer level by level.
BOOKS = [*CODES, ("planes", 1), ("planes", 6), ("trits", 4)]


def group_of(w: Tensor, metric: Tensor, tiles: Tiles, prefix: Tensor) -> Group:
    upper, factor = factors(metric)
    return Group(w, upper, factor, metric, prefix, tiles)


@pytest.mark.parametrize(
    ("row_group", "frozen", "given"), [(1, 0, False), (3, 0, False), (1, 0, True), (3, 0, True), (1, 1, True)]
)
def test_chunks_of_columns_and_pieces_of_rows_do_not_change_the_fit(
    monkeypatch: pytest.MonkeyPatch, row_group: int, frozen: int, given: bool
) -> None:
    w, h, _ = problem(8, 37, seed=3)
    upper, factor = factors(prepare(h).matrix)
    tiles = tiles_of(w, ShiftSpec(bits=3, row_group=row_group), frozen)
    start = (draw(tiles.count, 4, seed=1).abs() * 0.03, random_codes(8, 37, tiles.spec)) if given else None
    whole = fit_tiles(w, upper, factor, tiles, start)
    monkeypatch.setattr(group_fit, "_CHUNK", 5)
    monkeypatch.setattr(group_fit, "_WEIGHTS", 3 * 37)
    monkeypatch.setattr(group_fit, "_ROWS", 3)
    parts = fit_tiles(w, upper, factor, tiles, start)
    assert torch.equal(parts.codes, whole.codes)
    torch.testing.assert_close(parts.unknowns, whole.unknowns, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.error, whole.error, rtol=0, atol=1e-10)


def by_hand(w: Tensor, upper: Tensor, levels: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Walk the columns one weight at a time; levels [N, codes], allowed: bool [N, n, codes]."""
    rest, codes, error = w.clone(), torch.zeros(w.shape, dtype=torch.uint8), torch.zeros_like(w)
    for r in range(w.shape[0]):
        for j in range(w.shape[1]):
            distance = (levels[r] - rest[r, j]).abs().masked_fill(~allowed[r, j], torch.inf)
            code = int(distance.argmin())
            codes[r, j], error[r, j] = code, (rest[r, j] - levels[r, code]) / upper[j, j]
            rest[r, j + 1 :] -= error[r, j] * upper[j, j + 1 :]
    return codes, error


@pytest.mark.parametrize(
    ("code", "bits", "frozen"), [*((*book, 0) for book in BOOKS), ("planes", 3, 1), ("planes", 6, 4)]
)
def test_the_walk_takes_the_nearest_code_in_every_book(
    monkeypatch: pytest.MonkeyPatch, code: str, bits: int, frozen: int
) -> None:
    monkeypatch.setattr(group_fit, "_CHUNK", 7)
    w, h, _ = problem(5, 16, seed=4)
    metric = prepare(h).matrix
    tiles = tiles_of(w, ShiftSpec(bits=bits, code=code), frozen)
    unknowns = draw(5, tiles.scales + 1, seed=2) * 0.02
    prefix = random_codes(5, 16, tiles.spec) & ((1 << frozen) - 1)
    group = group_of(w, metric, tiles, prefix)
    levels = code_levels(unknowns, tiles)
    allowed = (torch.arange(levels.shape[1]) & ((1 << frozen) - 1)) == prefix[..., None]
    codes, error = by_hand(w, group.upper, levels, allowed)
    fit = group_fit._walked(group, unknowns)
    chosen, wanted = (levels.gather(1, c.long()) for c in (fit.codes, codes))
    torch.testing.assert_close(chosen, wanted, rtol=0, atol=0)
    torch.testing.assert_close(fit.error, error, rtol=1e-9, atol=1e-12)
    assert torch.equal(fit.codes & ((1 << frozen) - 1), prefix)


@pytest.mark.parametrize(("code", "bits"), BOOKS)
def test_a_descent_ends_where_no_single_code_is_better(monkeypatch: pytest.MonkeyPatch, code: str, bits: int) -> None:
    monkeypatch.setattr(group_fit, "_CHUNK", 5)
    w, h, _ = problem(4, 12, seed=6)
    metric = prepare(h).matrix
    tiles = tiles_of(w, ShiftSpec(bits=bits, code=code))
    group = group_of(w, metric, tiles, torch.zeros(4, 12, dtype=torch.uint8))
    unknowns, codes = draw(4, tiles.scales + 1, seed=2) * 0.02, random_codes(4, 12, tiles.spec)
    fit = group_fit._state(group, unknowns, codes)
    losses = [fit.error.square().sum(1)]
    for _ in range(30):
        fit = group_fit._descended(group, fit)
        losses.append(fit.error.square().sum(1))
        assert bool((losses[-1] <= losses[-2] * (1 + 1e-12)).all())
    assert bool((losses[-1] < losses[0]).all())
    levels, best = code_levels(unknowns, tiles), losses[-1]
    for j in range(12):
        for other in range(levels.shape[1]):
            changed = fit.codes.clone()
            changed[:, j] = other
            found: Fit = group_fit._state(group, unknowns, changed)
            assert bool((found.error.square().sum(1) >= best * (1 - 1e-9)).all())
