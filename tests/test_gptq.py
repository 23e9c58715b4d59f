"""GPTQ's loop against the algorithm as printed, and what it promises, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ir.errors import UnsupportedError, UsageError
from passes.quantize import order
from passes.quantize.gptq import GptqSpec, gptq
from passes.quantize.hessian import prepare
from passes.quantize.uniform import UniformCodes, rtn, searched
from tests.solver_problems import draw, problem

PLAIN = GptqSpec(bits=3, group=16, symmetric=False, terms=0, order="stored", search=False, damp=0.01)
ORDERS = ["groups", "inputs", "stored"]


def energy(error: Tensor, hessian: Tensor) -> float:
    return float(((error @ hessian) * error).sum())


def lost(weight: Tensor, codes: UniformCodes, hessian: Tensor) -> float:
    return energy(weight - codes.dequantize().double(), hessian)


def as_printed(weight: Tensor, hessian: Tensor, spec: GptqSpec) -> Tensor:
    """Algorithm 1 with one column at a time and the inverse updated by elimination, without a Cholesky factor."""
    h = prepare(hessian, spec.damp).matrix
    w, out, inverse = weight.clone(), torch.zeros_like(weight), torch.linalg.inv(h)
    for j in range(w.shape[1]):
        if j % spec.group == 0:
            levels = rtn(w[:, j : j + spec.group], spec.bits, spec.group, spec.symmetric)
            step, zero = levels.scales[:, 0].double(), levels.zeros[:, 0].double()
        out[:, j] = ((torch.round(w[:, j] / step) + zero).clamp(0, 2**spec.bits - 1) - zero) * step
        w[:, j:] -= torch.outer((w[:, j] - out[:, j]) / inverse[j, j], inverse[j, j:])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [10, 32, 128])
def test_it_is_the_printed_algorithm_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch, columns: int, symmetric: bool
) -> None:
    monkeypatch.setattr(order, "_LAZY_COLUMNS", columns)
    weight, hessian, _ = problem(12, 96)
    spec = replace(PLAIN, symmetric=symmetric)
    found = gptq(weight, hessian, spec).dequantize().double()
    torch.testing.assert_close(found, as_printed(weight, hessian, spec), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uncorrelated_inputs_leave_rounding_to_nearest(bits: int, how: str) -> None:
    weight = draw(33, 80).float().double()
    spec = replace(PLAIN, bits=bits, order=how)
    found, wanted = gptq(weight, 7.0 * torch.eye(80, dtype=torch.float64), spec), rtn(weight, bits, 16)
    assert torch.equal(found.scales, wanted.scales) and torch.equal(found.zeros, wanted.zeros)
    # Ties may fall either way between float32, in which rtn divides, and float64.
    assert float((found.codes != wanted.codes).double().mean()) < 1e-3


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_of_outputs_fall_on_seen_and_unseen_tokens(bits: int, how: str) -> None:
    weight, seen, unseen = problem(48, 96)
    spec = replace(PLAIN, bits=bits, order=how)
    found, nearest = gptq(weight, seen, spec), rtn(weight, bits, 16)
    assert lost(weight, found, seen) < 0.7 * lost(weight, nearest, seen)
    assert lost(weight, found, unseen) < 0.8 * lost(weight, nearest, unseen)


def test_what_matters_most_goes_first() -> None:
    """Later inputs make up for earlier ones, so that little is lost where most would be."""
    losses = {how: sum(lost(w, gptq(w, h, replace(PLAIN, order=how)), h) for w, h, _ in PROBLEMS) for how in ORDERS}
    assert losses["groups"] < losses["stored"] and losses["inputs"] < losses["stored"], losses


PROBLEMS = [problem(24, 96, seed=10 * seed) for seed in range(4)]


@pytest.mark.parametrize("bits", [2, 3])
def test_a_searched_range_is_better_by_its_own_measure_and_after_the_loop(bits: int) -> None:
    spec = replace(PLAIN, bits=bits, order="groups")
    whole = cut = 0.0
    for weight, hessian, _ in PROBLEMS:
        plain, found = rtn(weight, bits, 16), searched(weight, bits, 16, importance=hessian.diagonal())
        errors = [(weight - c.dequantize().double()).square() * hessian.diagonal() for c in (plain, found)]
        groups = [e.unflatten(1, (-1, 16)).sum(-1) for e in errors]
        assert bool((groups[1] <= groups[0] * (1 + 1e-5)).all()) and float(groups[1].sum()) < float(groups[0].sum())
        whole += lost(weight, gptq(weight, hessian, spec), hessian)
        cut += lost(weight, gptq(weight, hessian, replace(spec, search=True)), hessian)
    assert cut < whole


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize("search", [False, True])
def test_rows_do_not_depend_on_each_other(how: str, search: bool) -> None:
    weight, hessian, _ = problem(9, 40)
    spec = replace(PLAIN, order=how, search=search)
    whole = gptq(weight, hessian, spec)
    for rows in (slice(0, 1), slice(3, 9)):
        part = gptq(weight[rows], hessian, spec)
        assert torch.equal(part.codes, whole.codes[rows]) and torch.equal(part.scales, whole.scales[rows])
        assert torch.equal(part.zeros, whole.zeros[rows])


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize("group", [16, 7, 1000])
def test_groups_may_be_ragged_or_the_whole_row(how: str, group: int) -> None:
    weight, hessian, _ = problem(8, 40)
    found = gptq(weight, hessian, replace(PLAIN, order=how, group=group, search=True))
    groups = -(-40 // min(group, 40))
    assert found.scales.shape == found.zeros.shape == (8, groups) and found.codes.shape == (8, 40)
    assert lost(weight, found, hessian) < lost(weight, rtn(weight, 3, min(group, 40)), hessian)


@pytest.mark.parametrize("how", ORDERS)
def test_inputs_that_were_always_zero_are_zero_and_touch_no_other(how: str) -> None:
    weight, hessian, _ = problem(8, 32)
    dead = torch.tensor([3, 20])
    hessian[dead, :] = 0.0
    hessian[:, dead] = 0.0
    found = gptq(weight, hessian, replace(PLAIN, order=how, group=8)).dequantize()
    assert torch.isfinite(found).all() and not found[:, dead].any()


def test_zero_rows_and_groups_are_kept() -> None:
    weight, hessian, _ = problem(6, 32)
    weight[2] = 0.0
    weight[:, 8:16] = 0.0
    found = gptq(weight, hessian, replace(PLAIN, group=8)).dequantize()
    assert torch.isfinite(found).all() and not found[2].any()


def test_without_data_it_rounds_each_weight_alone() -> None:
    weight = draw(6, 48)
    found = gptq(weight, None, PLAIN)
    assert torch.equal(found.codes, rtn(weight, 3, 16).codes)


def test_what_does_not_fit_is_refused() -> None:
    weight, hessian, _ = problem(4, 32)
    for bad in (weight[0], weight * float("nan")):
        with pytest.raises(UsageError, match="finite matrix"):
            gptq(bad, hessian, PLAIN)
    with pytest.raises(UsageError, match="Hessian of 32 inputs"):
        gptq(weight, hessian[:16, :16], PLAIN)
    with pytest.raises(UsageError, match="finite square matrix"):
        gptq(weight, hessian * float("inf"), PLAIN)
    with pytest.raises(UnsupportedError, match="cannot be factored"):
        gptq(weight, torch.full((32, 32), 9.0, dtype=torch.float64) - 8.9 * 40 * torch.eye(32).flip(0), PLAIN)
