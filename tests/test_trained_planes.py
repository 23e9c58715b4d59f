"""Planes of signs in training: their gradients, what is kept for them, and that what is stored is what was trained."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from passes.quantize.planes import fitted_scales, residual_signs
from passes.training.trained_codes import BASE, SCALES, flipped
from passes.training.trained_planes import Planes, TrainedPlanes
from tests.solver_problems import draw


def weight_of(
    planes: int, group: int, terms: int, dtype: torch.dtype, rows: int = 7, inputs: int = 48
) -> TrainedPlanes:
    base = draw(rows, inputs, seed=planes).to(dtype)
    scales = fitted_scales(base.unflatten(1, (-1, group)), planes, None)
    return TrainedPlanes(base, Planes(planes, group, terms), scales)


def moved(weight: TrainedPlanes) -> dict[str, Tensor]:
    state = weight.start()
    state[SCALES] = state[SCALES] + 0.3 * draw(*state[SCALES].shape, seed=5).to(weight.base.dtype)
    state[BASE] = weight.base + 0.2 * draw(*weight.base.shape, seed=6).to(weight.base.dtype)
    return {name: t.detach().requires_grad_() for name, t in state.items()}


class _Sign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def by_autograd(weight: TrainedPlanes, state: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """The same product from what the definition says: constant signs, and one straight way to the weight."""
    scales, parts = weight._stored_scales(state), state[BASE].unflatten(1, (-1, weight.form.group))
    left, total = parts.detach(), torch.zeros_like(parts)
    for scale in scales.unbind(-1):
        sign = _Sign.apply(left)
        total = total + scale[..., None] * sign
        left = left - scale.detach()[..., None] * sign
    through = total + (parts - parts.detach())
    return functional.linear(x, through.flatten(1), bias)


@pytest.mark.parametrize(("planes", "group", "terms"), list(product((1, 2, 3, 4), (8, 48), (0, 1, 3))))
def test_gradients_are_those_of_signs_passed_straight_through(planes: int, group: int, terms: int) -> None:
    weight = weight_of(planes, group, terms, torch.float64)
    state, x = moved(weight), draw(3, 5, 96, seed=20)[..., ::2].requires_grad_()
    bias, way = draw(7, seed=21).requires_grad_(), draw(3, 5, 7, seed=22)
    leaves = [x, bias, *state.values()]
    found, expected = weight.bound(state).linear(x, bias), by_autograd(weight, state, x, bias)
    assert float((found - expected).detach().abs().max()) <= 1e-13 * float(expected.detach().abs().max())
    for a, b in zip(*(torch.autograd.grad(y, leaves, way) for y in (found, expected)), strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize(("planes", "group", "terms"), list(product((1, 2, 3, 4), (12, 48), (0, 1, 2, 3))))
def test_what_is_stored_is_what_was_trained_bit_for_bit(planes: int, group: int, terms: int) -> None:
    weight = weight_of(planes, group, terms, torch.float32)
    state = moved(weight)
    codes = weight.stored(state)
    assert torch.equal(codes.dequantize(), weight.bound(state).dense())
    assert codes.stored_bits == 8 * weight.form.stored_bytes(7, 48)
    if terms == 0:
        assert codes.stored_bits == 7 * (planes * 48 + 16 * planes * (48 // group))
    again = weight.settled(state)
    assert torch.equal(again.bound(again.start()).dense(), weight.bound(state).dense())
    assert flipped(codes, again.stored(again.start())) == 0 < flipped(weight.stored(weight.start()), codes)


def test_two_planes_are_the_nearest_of_their_four_levels() -> None:
    weight = weight_of(2, 16, 0, torch.float64)
    bound = weight.bound(weight.start())
    a, b = bound.scales.unbind(-1)
    levels = torch.stack([s * a + t * b for s, t in product((-1, 1), repeat=2)], -1)[:, :, None]
    parts = weight.base.unflatten(1, (-1, 16))
    nearest = torch.gather(levels.expand(*parts.shape, 4), -1, (levels - parts[..., None]).abs().argmin(-1)[..., None])
    assert torch.equal(bound.dense(), nearest[..., 0].flatten(1))


def test_planes_of_one_weight_are_those_of_what_is_left() -> None:
    parts, scales = draw(3, 2, 8, seed=1), torch.tensor([[[1.0, 0.5, 0.25]]]).expand(3, 2, 3).double()
    first, second, third = residual_signs(parts, scales)
    assert torch.equal(first, parts >= 0)
    left = parts - torch.where(first, 1.0, -1.0)
    assert torch.equal(second, left >= 0)
    assert torch.equal(third, left - torch.where(second, 0.5, -0.5) >= 0)


def test_only_the_weight_itself_is_kept_for_the_way_back() -> None:
    weight = weight_of(3, 32, 0, torch.float32, 64, 128)
    state, kept = moved(weight), list[Tensor]()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        weight.bound(state).linear(torch.randn(2, 5, 128, requires_grad=True), None)
    whole = {t.data_ptr() for t in kept if t.numel() >= weight.base.numel()}
    assert whole == {state[BASE].data_ptr()}


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_first_scales_are_better_than_those_found_plane_by_plane(planes: int) -> None:
    parts, energy = draw(5, 4, 32, seed=8), draw(4, 32, seed=9).square()

    def error(scales: Tensor, weight: Tensor) -> Tensor:
        signs = residual_signs(parts, scales)
        total = sum(torch.where(s, a[..., None], -a[..., None]) for s, a in zip(signs, scales.unbind(-1), strict=True))
        return ((parts - total).square() * weight).sum(-1)

    for weight in (torch.ones_like(energy), energy):
        greedy, left = [], parts.clone()
        for _ in range(planes):
            greedy.append((left.abs() * weight).sum(-1) / weight.sum(-1))
            left = left - torch.where(left >= 0, greedy[-1][..., None], -greedy[-1][..., None])
        found = fitted_scales(parts, planes, weight)
        before, after = error(torch.stack(greedy, -1), weight), error(found, weight)
        assert bool((after <= before * (1 + 1e-9)).all())
        if planes == 1:
            torch.testing.assert_close(found, torch.stack(greedy, -1), rtol=1e-5, atol=0)
        else:
            assert float(after.sum()) < 0.99 * float(before.sum())


def test_weights_of_zeros_have_scales() -> None:
    found = fitted_scales(torch.zeros(2, 3, 8), 2, None)
    assert bool((found > 0).all()) and bool(torch.isfinite(found).all())
    weight = TrainedPlanes(torch.zeros(2, 24), Planes(2, 8), found)
    assert float(weight.stored(weight.start()).dequantize().abs().max()) <= 1e-6
