"""Learnable clipping: wide open it rounds to nearest, what it gives is what is stored, and its gradient is right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.quantize.clipping import START, clipped, clipped_codes
from passes.quantize.uniform import in_groups, ranges, rtn, steps_of
from tests.solver_problems import draw

SHAPES = [(5, 32, 16), (3, 40, 16), (7, 9, 64), (1, 64, 64)]


def open_wide(rows: int, groups: int) -> Tensor:
    return torch.full((2, rows, groups), 40.0)


def strengths_of(rows: int, groups: int, seed: int) -> Tensor:
    return 1.5 * draw(2, rows, groups, seed=seed) + 0.5


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "inputs", "group"), SHAPES)
def test_wide_open_it_is_rounding_to_nearest(rows: int, inputs: int, group: int, bits: int, symmetric: bool) -> None:
    weight = draw(rows, inputs).float()
    weight[0], weight[-1] = weight[0].abs(), 0.0 if rows > 1 else weight[-1]
    wanted = rtn(weight, bits, group, symmetric)
    strengths = open_wide(rows, -(-inputs // group))
    codes = clipped_codes(weight, strengths, bits, group, symmetric)
    assert torch.equal(codes.codes, wanted.codes) and torch.equal(codes.scales, wanted.scales)
    assert torch.equal(codes.zeros, wanted.zeros)
    assert torch.equal(clipped(weight, strengths, bits, group, symmetric), wanted.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "inputs", "group"), SHAPES)
def test_what_is_trained_is_what_is_stored(rows: int, inputs: int, group: int, bits: int, symmetric: bool) -> None:
    weight, strengths = draw(rows, inputs).float(), strengths_of(rows, -(-inputs // group), seed=bits).float()
    codes = clipped_codes(weight, strengths, bits, group, symmetric)
    assert torch.equal(clipped(weight, strengths, bits, group, symmetric), codes.dequantize())
    assert int(codes.codes.max()) < 2**bits and int(codes.zeros.max()) < 2**bits


def test_at_its_start_it_clips_a_little() -> None:
    weight = draw(4, 32).float()
    codes = clipped_codes(weight, torch.full((2, 4, 2), START), 4, 16)
    whole = rtn(weight, 4, 16).scales.float()
    torch.testing.assert_close(codes.scales.float() / whole, torch.full((4, 2), 0.982), rtol=2e-3, atol=0)


def passed(x: Tensor, rounded: Tensor) -> Tensor:
    """A rounded value with the gradient of what it was."""
    return x + (rounded - x).detach()


def by_autograd(weight: Tensor, strengths: Tensor, bits: int, group: int, symmetric: bool, zero_moves: bool) -> Tensor:
    """The same by automatic differentiation of the printed formulas."""
    top = 2**bits - 1
    low, high = ranges(weight, group)
    shares = torch.sigmoid(strengths)
    low, high = shares[1] * low, shares[0] * high
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    exact = steps_of(low, high, bits)
    step = passed(exact, exact.half().double())
    off = -low / step
    zero = torch.full_like(step, 2.0 ** (bits - 1)) if symmetric else passed(off * zero_moves, torch.round(off))
    ratio = in_groups(weight, group) / step[..., None]
    codes = (passed(ratio, torch.round(ratio)) + zero[..., None]).clamp(0, top)
    return ((codes - zero[..., None]) * step[..., None]).flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize(("symmetric", "zero_moves"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "inputs", "group"), SHAPES)
def test_the_gradient_is_that_of_automatic_differentiation(
    rows: int, inputs: int, group: int, bits: int, symmetric: bool, zero_moves: bool
) -> None:
    weight, upstream = draw(rows, inputs), draw(rows, inputs, seed=3)
    strengths = strengths_of(rows, -(-inputs // group), seed=7)
    found = []
    for function in (clipped, by_autograd):
        w, s = (t.clone().requires_grad_() for t in (weight, strengths))
        out = function(w, s, bits, group, symmetric, zero_moves)
        (out * upstream).sum().backward()
        found.append((out.detach(), w.grad, s.grad))
    for ours, wanted in zip(*found, strict=True):
        assert ours is not None and wanted is not None
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_a_clipped_weight_moves_with_its_own_end_of_the_range() -> None:
    weight = torch.tensor([[-4.0, -1.0, 0.5, 8.0]], dtype=torch.float64)
    strengths = torch.zeros(2, 1, 1, dtype=torch.float64, requires_grad=True)
    out = clipped(weight, strengths, 8, 4)
    grads = [torch.autograd.grad(out[0, i], strengths, retain_graph=True)[0].flatten() for i in (0, 3)]
    # At a strength of 0 a quarter of the end's weight: the slope of the sigmoid.
    torch.testing.assert_close(grads[0], torch.tensor([0.0, -1.0], dtype=torch.float64), rtol=0, atol=0.02)
    torch.testing.assert_close(grads[1], torch.tensor([2.0, 0.0], dtype=torch.float64), rtol=0, atol=0.02)


def test_constant_and_empty_groups_have_finite_gradients() -> None:
    weight = torch.cat([torch.zeros(1, 16), torch.full((1, 16), 0.3), torch.full((1, 16), -2.0)])
    w, strengths = weight.clone().requires_grad_(), torch.full((2, 3, 1), START, requires_grad=True)
    clipped(w, strengths, 3, 16).square().sum().backward()
    assert w.grad is not None and strengths.grad is not None
    assert torch.isfinite(w.grad).all() and torch.isfinite(strengths.grad).all()
