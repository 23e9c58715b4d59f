"""Choosing what stays: masks by score, exchanges, and the loop in which the rest makes up for what goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ir.errors import InvariantError
from ir.ops.nm import scatter_kept
from passes.quantize.gptq import GptqSpec, gptq, sparse_gptq
from passes.quantize.salience import row_energy
from passes.shiftcode.masked import solve_masked
from passes.shiftcode.solver import metric_of
from passes.shiftcode.spec import ShiftSpec
from passes.sparsify.dsnot import exchanged
from passes.sparsify.pattern import Pattern, nm_mask, pattern_of
from passes.sparsify.scores import kept_share, magnitude, mask_change, wanda
from passes.sparsify.sparsegpt import sparsegpt
from tests.solver_problems import draw

TWO_FOUR = Pattern(2, 4)
PATTERNS = [TWO_FOUR, Pattern(1, 4), Pattern(4, 8), Pattern(3, 4)]


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs of uneven strength, float64 [tokens, width]."""
    mixed = draw(tokens, width, seed=seed) @ (torch.eye(width).double() + 0.3 * draw(width, width, seed=seed + 1))
    return mixed * torch.linspace(0.2, 2.0, width).double()


def kept_of(mask: Tensor, pattern: Pattern) -> set[int]:
    return set(mask.unflatten(1, (-1, pattern.m)).sum(-1).flatten().tolist())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_keep_the_highest_scores(pattern: Pattern) -> None:
    score = draw(5, 6 * pattern.m).abs()
    mask = nm_mask(score, pattern)
    assert kept_of(mask, pattern) == {pattern.n}
    groups, kept = score.unflatten(1, (-1, pattern.m)), mask.unflatten(1, (-1, pattern.m))
    lowest = torch.where(kept, groups, torch.inf).amin(-1)
    highest_gone = torch.where(kept, -torch.inf, groups).amax(-1)
    assert bool((lowest >= highest_gone).all())


def test_ties_are_kept_by_place_on_every_run() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 2.0, 2.0]])
    assert nm_mask(score, TWO_FOUR).tolist() == [[True, True, False, False, False, True, True, False]]
    tied = torch.randint(0, 3, (64, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(nm_mask(tied, TWO_FOUR), nm_mask(tied.double(), TWO_FOUR))


@pytest.mark.parametrize("text", ["2:2", "0:4", "4:2", "2-4", "2:4:8", "", "2:65"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no pattern"):
        pattern_of(text)
    assert pattern_of("2:4") == TWO_FOUR and str(TWO_FOUR) == "2:4"


def test_inputs_of_one_strength_make_wanda_magnitude() -> None:
    weight = draw(6, 32)
    even = wanda(weight, torch.full((32,), 3.0))
    assert torch.equal(nm_mask(even, TWO_FOUR), nm_mask(magnitude(weight), TWO_FOUR))
    uneven = torch.arange(1, 33).double() ** 4
    torch.testing.assert_close(wanda(weight, uneven), weight.abs() * torch.arange(1, 33) ** 2)
    assert not torch.equal(nm_mask(wanda(weight, uneven), TWO_FOUR), nm_mask(magnitude(weight), TWO_FOUR))


def test_shares_and_changes_by_hand() -> None:
    mask = torch.tensor([[True, False, True, False]])
    assert kept_share(torch.tensor([[1.0, 1.0, 3.0, 2.0]]), mask) == pytest.approx(10 / 15)
    assert mask_change(mask, ~mask) == 1.0 and mask_change(mask, mask) == 0.0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_uncorrelated_inputs_make_sparsegpt_magnitude(pattern: Pattern) -> None:
    weight = draw(6, 32)
    found, mask = sparsegpt(weight, 2.0 * torch.eye(32).double(), pattern)
    assert torch.equal(mask, nm_mask(magnitude(weight), pattern))
    torch.testing.assert_close(found, torch.where(mask, weight, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_loses_less_than_wanda_on_seen_and_unseen_inputs(pattern: Pattern) -> None:
    weight, x, other = draw(24, 64), inputs(400, 64), inputs(400, 64, seed=0)[torch.randperm(400)][:200]
    gram = x.T @ x
    found, mask = sparsegpt(weight, gram, pattern)
    assert kept_of(mask, pattern) == {pattern.n} and not found[~mask].any()
    plain = torch.where(nm_mask(wanda(weight, gram.diagonal()), pattern), weight, 0.0)
    for seen in (x, other):
        losses = [float((seen @ (weight - w).T).square().sum()) for w in (found, plain)]
        assert losses[0] < 0.9 * losses[1]


def printed(weight: Tensor, gram: Tensor, pattern: Pattern, damp: float) -> Tensor:
    """SparseGPT as its Algorithm 1 reads, one input after another without blocks."""
    h = gram.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, keep = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % pattern.m == 0:
            part = slice(j, j + pattern.m)
            loss = (w[:, part] / upper.diagonal()[part]) ** 2
            order = loss.argsort(1)
            keep[:, part].scatter_(1, order[:, : pattern.m - pattern.n], False)
        new = torch.where(keep[:, j], w[:, j], 0.0)
        error = (w[:, j] - new) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[:, j] = new
    return w


@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 4)], ids=str)
def test_sparsegpt_is_the_printed_algorithm(pattern: Pattern) -> None:
    weight, x = draw(7, 320), inputs(900, 320)
    found, _ = sparsegpt(weight, x.T @ x, pattern)
    torch.testing.assert_close(found, printed(weight, x.T @ x, pattern, 0.01), rtol=1e-8, atol=1e-10)


def test_inputs_that_were_always_zero_go_first() -> None:
    weight, x = draw(5, 16), inputs(100, 16)
    x[:, [2, 5]] = 0.0
    found, mask = sparsegpt(weight, x.T @ x, TWO_FOUR)
    assert not mask[:, [2, 5]].any() and torch.isfinite(found).all()


def test_exchanges_lower_the_expected_error_and_keep_the_pattern() -> None:
    weight = draw(40, 64)
    mean, variance = 0.5 + draw(64, seed=3).abs(), 0.5 + draw(64, seed=4).square()
    score = wanda(weight, 100 * (mean.square() + variance))
    mask = nm_mask(score, TWO_FOUR)
    found = exchanged(weight, mask, score, mean, variance, TWO_FOUR)
    assert kept_of(found, TWO_FOUR) == {2}

    def expected(kept: Tensor) -> Tensor:
        return torch.where(kept, 0.0, weight * mean).sum(1).abs()

    before, after = expected(mask), expected(found)
    assert bool((after <= before).all()) and float(after.mean()) < 0.3 * float(before.mean())
    small = before <= 0.1
    assert torch.equal(found[small], mask[small])


def spec(bits: int = 4, group: int = 8, symmetric: bool = True) -> GptqSpec:
    return GptqSpec(bits, group, symmetric, 0, "groups", True, 0.01)


@pytest.mark.parametrize("order", ["groups", "stored", "inputs"])
def test_codes_under_a_mask_are_zero_outside_it(order: str) -> None:
    weight, x = draw(9, 32), inputs(200, 32)
    mask = nm_mask(magnitude(weight), TWO_FOUR)
    how = GptqSpec(4, 8, True, 0, order, True, 0.01)  # type: ignore[arg-type]
    codes, kept = sparse_gptq(weight, x.T @ x, how, mask)
    found = codes.dequantize()
    assert torch.equal(kept, mask) and not found[~mask].any()
    assert bool((codes.codes[~mask] == 8).all())
    # The rest makes up for what goes: less is lost than by rounding what the mask leaves.
    alone = gptq(torch.where(mask, weight, 0.0), x.T @ x, how).dequantize() * mask
    lost = [float((x @ (weight - w.double()).T).square().sum()) for w in (found, alone)]
    assert lost[0] < lost[1]


def test_a_mask_chosen_in_the_same_loop_is_no_worse_than_one_chosen_before() -> None:
    lost = []
    weight, x = draw(32, 64), inputs(500, 64)
    gram = x.T @ x
    joint, mask = sparse_gptq(weight, gram, spec(3, 16), TWO_FOUR)
    assert kept_of(mask, TWO_FOUR) == {2} and not joint.dequantize()[~mask].any()
    given, _ = sparse_gptq(weight, gram, spec(3, 16), nm_mask(wanda(weight, gram.diagonal()), TWO_FOUR))
    lost = [float(row_energy(weight - c.dequantize().double(), None).sum()) for c in (joint, given)]
    by_output = [float((x @ (weight - c.dequantize().double()).T).square().sum()) for c in (joint, given)]
    assert by_output[0] < by_output[1], (by_output, lost)


def test_a_mask_that_keeps_all_is_gptq() -> None:
    weight, x = draw(9, 32), inputs(200, 32)
    codes, _ = sparse_gptq(weight, x.T @ x, spec(), torch.ones(9, 32, dtype=torch.bool))
    assert torch.equal(codes.codes, gptq(weight, x.T @ x, spec()).codes)


def test_codes_of_a_sparse_weight_must_lie_around_zero() -> None:
    with pytest.raises(InvariantError, match="around zero"):
        sparse_gptq(draw(4, 8), None, spec(symmetric=False), TWO_FOUR)


@pytest.mark.parametrize(("code", "terms", "offset"), [("planes", 2, True), ("planes", 0, False), ("trits", 2, True)])
def test_planes_under_a_mask_make_up_for_what_goes(code: str, terms: int, offset: bool) -> None:
    weight, x = draw(24, 64), inputs(500, 64)
    gram = x.T @ x
    how = ShiftSpec(bits=2, group=16, code=code, terms=terms, offset=offset)
    mask = nm_mask(wanda(weight, gram.diagonal()), TWO_FOUR)
    metric = metric_of(gram, how)
    lost = []
    for known in (metric, None):
        codes = solve_masked(weight, mask, known, how, TWO_FOUR)
        assert (codes.rows, codes.in_features, codes.group, codes.planes) == (24, 32, 8, 2)
        whole = scatter_kept(codes.dequantize(torch.float64), mask)
        lost.append(float((x @ (weight - whole).T).square().sum()))
    assert lost[0] < 0.95 * lost[1], lost
    again = solve_masked(weight[5:9], mask[5:9], metric, how, TWO_FOUR)
    whole_run = solve_masked(weight, mask, metric, how, TWO_FOUR)
    assert torch.equal(again.dequantize(), whole_run.dequantize()[5:9])  # rows are independent
