"""Weights trained with their scales: gradients against autograd, what is kept for the way back, what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from passes.quantize.uniform import packed, rtn
from passes.training import trained_codes
from passes.training.rounded import Merged, RoundedLinear
from passes.training.trained_codes import DOWN, OFFSETS, SCALES, UP, Grid, TrainedCodes, flipped
from tests.solver_problems import draw

F64 = torch.float64
GRIDS = [("none", 0), ("zero", 0), ("float", 0), ("none", 1), ("zero", 2), ("float", 3)]
HOWS: list[dict[str, Any]] = [
    {"rank": 3, "factor": 2.0},
    {"whole": True, "keep": True},
    {"rank": 3, "domain": "code", "keep": True},
    {"rank": 3, "domain": "group"},
]
# Only float offsets can be added to.
CASES = [(how, *grid) for how in HOWS for grid in GRIDS if how.get("domain") != "group" or grid[0] == "float"]


def weight_of(
    bits: int, offset: Any, terms: int, rows: int = 6, inputs: int = 32, group: int = 8, dtype: Any = F64, **how: Any
) -> TrainedCodes:
    """A weight whose levels do not cover its range, so that some are clipped; scales differ between groups."""
    base = draw(rows, inputs, seed=1).to(dtype)
    groups = inputs // group
    octaves = torch.tensor([-3.0, 0.0, 2.0, 5.0], dtype=dtype).repeat(groups)[:groups]
    base = (base.unflatten(1, (groups, group)) * octaves.exp2()[:, None]).flatten(1)
    scales = octaves.exp2().expand(rows, -1) * 2.0 / 2**bits * (1 + 0.2 * draw(rows, groups, seed=2).abs().to(dtype))
    start = None
    if offset == "zero":
        start = 2 ** (bits - 1) + draw(rows, groups, seed=3).to(dtype)
    if offset == "float":
        start = 0.7 * draw(rows, groups, seed=3).to(dtype) * octaves.exp2()
    return TrainedCodes(base, Grid(bits, group, offset, terms), scales, start, **how)


def moved(weight: TrainedCodes, seed: int = 9) -> dict[str, Tensor]:
    """A state away from the start, whose tensors want gradients."""
    found = weight.start()
    return {
        name: (t + 0.1 * draw(*t.shape, seed=seed + i).to(t.dtype)).requires_grad_()
        for i, (name, t) in enumerate(found.items())
    }


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def by_autograd(weight: TrainedCodes, state: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """The same product with rounding as the identity on the way back, and nothing written by hand."""
    scales, centers, offsets = (t[..., None] for t in weight._levels(state))
    whole = state.get("base", weight.base)
    if DOWN in state and weight.domain != "group":
        whole = whole + weight.factor * state[UP] @ state[DOWN]
    parts = whole.unflatten(1, (-1, weight.grid.group))
    places = parts if weight.domain != "weight" else (parts - offsets) / scales + centers
    codes = _Round.apply(places.clamp(0, weight.grid.top))
    if weight.domain == "group":
        codes = codes.detach()
    return functional.linear(x, ((codes - centers) * scales + offsets).flatten(1), bias)


@pytest.mark.parametrize(("how", "offset", "terms"), CASES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_those_of_rounding_passed_straight_through(
    bits: int, offset: Any, terms: int, how: dict[str, Any]
) -> None:
    weight = weight_of(bits, offset, terms, **how)
    state, x = moved(weight), draw(3, 5, 64, seed=20)[..., ::2].requires_grad_()
    bias, way = draw(6, seed=21).requires_grad_(), draw(3, 5, 6, seed=22)
    leaves = [x, bias, *state.values()]
    found, expected = weight.bound(state).linear(x, bias), by_autograd(weight, state, x, bias)
    assert float((found - expected).detach().abs().max()) <= 1e-13 * float(expected.detach().abs().max())
    ours, theirs = (torch.autograd.grad(y, leaves, way) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))
    with torch.no_grad():
        places = weight.merged.places(*weight._parts(state), *weight._levels(state))
    clipped = float(((places < 0) | (places > weight.grid.top)).float().mean())
    assert 0.02 < clipped < 0.9


def surrogate(weight: TrainedCodes, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The product with what rounding added held fixed, whose derivative is the gradient asked for."""
    scales, centers, offsets = (t[..., None] for t in weight._levels(state))
    whole = weight.base + weight.factor * state[UP] @ state[DOWN]
    places = ((whole.unflatten(1, (-1, weight.grid.group)) - offsets) / scales + centers).clamp(0, weight.grid.top)
    return functional.linear(x, ((places + state["rest"] - centers) * scales + offsets).flatten(1))


def test_finite_differences_of_the_frozen_remainder_agree() -> None:
    weight = weight_of(3, "none", 0, rank=2, factor=0.5)
    state, x = moved(weight), draw(4, 32, seed=20).requires_grad_()
    scales, centers, offsets = weight._levels(state)
    with torch.no_grad():
        places = weight.merged.places(*weight._parts(state), scales, centers, offsets).clamp(0, 7)
        rest = places.round() - places

    def product(down: Tensor, up: Tensor, steps: Tensor, x: Tensor) -> Tensor:
        whole = weight.base + weight.factor * up @ down
        at = ((whole.unflatten(1, (-1, 8))) / steps[..., None] + 4.0).clamp(0, 7)
        return functional.linear(x, ((at + rest - 4.0) * steps[..., None]).flatten(1))

    args = (state[DOWN], state[UP], scales.detach().requires_grad_(), x)
    assert torch.autograd.gradcheck(product, args)
    way = draw(4, 6, seed=3)
    expected = torch.autograd.grad(product(*args), args, way)
    y = RoundedLinear.apply(
        x, weight.base, args[0], args[1], args[2], centers, offsets, None, weight.merged,
        lambda: weight.merged.codes(places), False,
    )  # fmt: skip
    for a, b in zip(torch.autograd.grad(y, args, way), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def gradients(weight: TrainedCodes, x: Tensor, way: Tensor) -> dict[str, Tensor]:
    state = moved(weight)
    found = torch.autograd.grad(weight.bound(state).linear(x, None), [x, *state.values()], way)
    return dict(zip(["x", *state], found, strict=True))


def test_every_row_of_a_batch_counts_and_their_order_does_not() -> None:
    # One published kernel takes the first row of a batch alone.
    weight, x, way = weight_of(3, "float", 0, rank=2), draw(4, 5, 32).requires_grad_(), draw(4, 5, 6, seed=7)
    turned, order = x.detach()[[2, 0, 3, 1]].requires_grad_(), [2, 0, 3, 1]
    a, b = gradients(weight, x, way), gradients(weight, turned, way[order])
    for name in (DOWN, UP, SCALES, OFFSETS):
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    once = gradients(weight, x, way * torch.tensor([1.0, 0, 0, 0], dtype=F64)[:, None, None])
    assert not torch.allclose(once[UP], a[UP])


def test_inputs_see_the_offset() -> None:
    # Another leaves the offset out of what the inputs get.
    weight, x, way = weight_of(3, "float", 0, rank=2), draw(5, 32).requires_grad_(), draw(5, 6, seed=7)
    state = moved(weight)
    dense = weight.bound(state).dense().detach()
    torch.testing.assert_close(gradients(weight, x, way)["x"], way @ dense)


def test_offsets_learn_from_their_own_group_where_it_clips() -> None:
    # Another sums over the wrong axis: shapes fit, groups do not.
    weight = weight_of(4, "float", 0, rank=2)
    wide = TrainedCodes(weight.base, weight.grid, 8 * weight.scales, 0 * weight.scales, 2)
    x, way = draw(5, 32).requires_grad_(), draw(5, 6, seed=7)
    assert float(gradients(wide, x, way)[OFFSETS].abs().max()) == 0
    scales = 8 * weight.scales
    scales[4, 2] /= 64
    one = gradients(TrainedCodes(weight.base, weight.grid, scales, 0 * scales, 2), x, way)[OFFSETS]
    assert one[4, 2] != 0 and int((one != 0).sum()) == 1


def test_clipped_weights_pass_nothing_on() -> None:
    # Another forgets that for queries, keys and values.
    weight = weight_of(3, "none", 0, rank=2)
    tight = TrainedCodes(weight.base, weight.grid, weight.scales / 1e6, None, 2)
    found = gradients(tight, draw(5, 32).requires_grad_(), draw(5, 6, seed=7))
    assert float(found[UP].abs().max()) < 1e-9 and float(found[DOWN].abs().max()) < 1e-9
    assert float(found[SCALES].abs().max()) > 0


def test_any_number_of_rows_and_bias_is_taken() -> None:
    # Another wants as many keys as queries.
    for rows in (1, 3, 9):
        weight = weight_of(3, "zero", 0, rows=rows, rank=2)
        assert gradients(weight, draw(2, 3, 32).requires_grad_(), draw(2, 3, rows, seed=7))[UP].shape == (rows, 2)


@pytest.mark.parametrize(
    "how", [{"rank": 4}, {"rank": 4, "domain": "code"}, {"whole": True}, {"rank": 4, "keep": True}]
)
def test_no_second_weight_is_kept_for_the_way_back(how: dict[str, Any]) -> None:
    weight = weight_of(3, "float", 0, rows=64, inputs=128, group=32, dtype=torch.float32, **how)
    state, x, kept = moved(weight), torch.randn(2, 5, 128), []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        y = weight.bound(state).linear(x.requires_grad_(), None)
    whole = [t for t in kept if t.numel() >= weight.base.numel()]
    base = state.get("base", weight.base)
    assert {t.data_ptr() for t in whole} == {base.data_ptr()}
    others = sum(t.numel() * t.element_size() for t in kept) - sum(t.numel() * t.element_size() for t in whole)
    small = x.numel() + sum(t.numel() for n, t in state.items() if n != "base") + 4 * 3 * weight.scales.numel()
    assert others <= 4 * small
    y.sum().backward()
    # Where codes are kept, it is a byte a weight from step to step.
    assert (weight._kept.codes is None) == (not weight.keep)
    assert weight._kept.codes is None or weight._kept.codes.dtype == torch.uint8


def test_kept_codes_are_found_once_a_step() -> None:
    weight = weight_of(3, "float", 0, rank=2, keep=True)
    state = moved(weight)
    leaves = [state[name] for name in (DOWN, UP, SCALES, OFFSETS)]
    optimiser = torch.optim.SGD(leaves, lr=1e-3)
    for step in range(1, 4):
        for x in (draw(5, 32, seed=step), draw(7, 32, seed=step + 1)):
            weight.bound(state).linear(x, None).sum().backward()
        assert weight.rounded == step
        before = weight.bound(state).dense().detach()
        optimiser.step()
        assert not torch.equal(weight.bound(state).dense(), before)
    other = {name: t.detach().clone() for name, t in state.items()}
    other[UP] += 1.0
    assert not torch.equal(weight.bound(other).dense(), weight.bound(state).dense())


@pytest.mark.parametrize(("how", "offset", "terms"), CASES)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_what_is_stored_is_what_was_trained_bit_for_bit(
    bits: int, offset: Any, terms: int, how: dict[str, Any]
) -> None:
    weight = weight_of(bits, offset, terms, rows=7, inputs=48, group=12, dtype=torch.float32, **how)
    state = moved(weight)
    codes = weight.stored(state)
    assert torch.equal(codes.dequantize(), weight.bound(state).dense())
    assert isinstance(codes, ShiftCodes if terms or offset == "float" else QuantCodes)
    assert int((codes.dequantize() != 0).sum()) > 0
    groups, rows = 4, 7
    sizes = {"none": 0, "zero": 8 * -(-groups * bits // 8), "float": 16 * groups}
    if terms == 0 and isinstance(codes, QuantCodes):
        assert codes.stored_bits == rows * (8 * -(-48 * bits // 8) + 16 * groups + sizes[offset])
    if terms == 0 and isinstance(codes, ShiftCodes):
        assert codes.stored_bits == rows * (bits * 48 + 16 * groups + sizes[offset])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_start_is_what_rounding_to_nearest_gives(bits: int) -> None:
    base = draw(5, 32, seed=4).float()
    codes = rtn(base, bits, 16, symmetric=False)
    weight = TrainedCodes(base, Grid(bits, 16, "zero"), codes.scales.float(), codes.zeros.float(), 2)
    found = weight.stored(weight.start())
    assert torch.equal(found.dequantize(), packed(codes, False).dequantize())
    again = TrainedCodes(found.dequantize(), weight.grid, weight.scales, weight.offsets, 2)
    assert flipped(found, again.stored(again.start())) == 0


def test_scales_too_small_to_be_stored_leave_their_group_at_its_offset() -> None:
    base = draw(4, 32, seed=4).float()
    scales = torch.tensor([[1.0, 2.0**-20]]).expand(4, -1)
    weight = TrainedCodes(base, Grid(3, 16, "none", 1), scales, None, 2)
    state = {name: t.requires_grad_() for name, t in weight.start().items()}
    y = weight.bound(state).linear(draw(3, 32).float(), None)
    y.sum().backward()
    assert bool((weight.bound(state).dense()[:, 16:] == 0).all()) and bool(torch.isfinite(y).all())
    assert all(torch.isfinite(t.grad).all() for t in state.values() if t.grad is not None)
    assert torch.equal(weight.stored(state).dequantize(), weight.bound(state).dense())


def test_codes_do_not_follow_scales_in_their_own_domain() -> None:
    weight = weight_of(3, "none", 0, rank=2, domain="code")
    state = moved(weight)
    codes = weight.bound(state)._codes().clone()
    state[SCALES] = state[SCALES] + 1.0
    assert torch.equal(weight.bound(state)._codes(), codes)
    assert Merged(8, 7, 1.0, "code").codes(torch.tensor([[-3.0, 0.4, 6.6, 99.0]])).tolist() == [[0, 0, 7, 7]]
    assert trained_codes.flipped(weight.stored(state), weight.stored(state)) == 0
