"""Targets corrected for what earlier layers did to the inputs: the closed form, its limits and its streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import UsageError
from passes.quantize.hessian import Gram, prepare
from passes.quantize.targets import Moments, corrected, empty_moments

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def streams(tokens: int, inputs: int, seed: int = 0, off: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return the float inputs of a layer, features of very different sizes, and what compression made of them."""
    original = draw(tokens, inputs, seed=seed) * torch.logspace(-3, 2, inputs, dtype=F64)
    return original, original + off * original @ draw(inputs, inputs, seed=seed + 1) / inputs


def moments_of(original: Tensor, x: Tensor) -> Moments:
    return Moments(Gram(x.T @ x, x.shape[0]), (original - x).T @ x)


@given(rows=st.integers(1, 6), inputs=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_without_damping_it_is_least_squares_of_the_float_outputs(rows: int, inputs: int, seed: int) -> None:
    original, x = draw(60, inputs, seed=seed), draw(60, inputs, seed=seed + 1)
    x, w = original + 0.4 * x, draw(rows, inputs, seed=seed + 2) * 2.0**-9
    expected = torch.linalg.lstsq(x, original @ w.T).solution.T
    torch.testing.assert_close(corrected(w, moments_of(original, x), 0.0), expected, rtol=1e-8, atol=1e-12)


def test_it_comes_closer_to_the_float_outputs_than_the_weight_and_than_half_of_it() -> None:
    original, x = streams(200, 12)
    w, moments = draw(5, 12, seed=3), moments_of(*streams(200, 12))
    errors = [float((original @ w.T - x @ corrected(w, moments, 1e-9, s).T).norm()) for s in (0.0, 0.5, 1.0)]
    assert errors[2] < errors[1] < errors[0]
    wrong = moments_of(x, original)
    assert float((original @ w.T - x @ corrected(w, wrong, 1e-9).T).norm()) > errors[0]


@pytest.mark.parametrize("damp", [1e-6, 0.01, 1.0])
def test_damping_is_that_of_the_solver_and_pulls_to_the_weight(damp: float) -> None:
    original, x = streams(100, 7)
    w, moments = draw(4, 7, seed=4), moments_of(original, x)
    metric = prepare(moments.gram.matrix, damp).matrix
    found = corrected(w, moments, damp)
    # The minimiser of |W x_float - V x|^2 + lambda |V - W|^2: its gradient is zero.
    assert moments.drift is not None
    gradient = found @ metric - w @ (moments.drift + metric)
    assert float(gradient.abs().max()) <= 1e-9 * float((w @ metric).abs().max())
    weaker, stronger = (float((corrected(w, moments, d) - w).norm()) for d in (damp, 100 * damp))
    assert stronger < weaker


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_share_scales_the_correction(share: float) -> None:
    moments, w = moments_of(*streams(50, 6)), draw(3, 6, seed=5)
    whole = corrected(w, moments, 0.01) - w
    torch.testing.assert_close(corrected(w, moments, 0.01, share) - w, share * whole, rtol=1e-9, atol=1e-14)
    assert float(whole.abs().max()) > 1e-3


def test_no_share_or_no_float_stream_is_the_weight_itself() -> None:
    original, x = streams(50, 6)
    w, moments = draw(3, 6, seed=5), moments_of(original, x)
    assert torch.equal(corrected(w, moments, 0.01, 0.0), w)
    assert torch.equal(corrected(w, Moments(moments.gram, None), 0.01), w)
    assert not torch.equal(corrected(w, moments, 0.01), w)


@pytest.mark.parametrize("tokens", [3, 50])
def test_equal_streams_give_the_weight_back(tokens: int) -> None:
    x, w = streams(tokens, 8)[0], draw(3, 8, seed=6) * 2.0**40
    found = moments_of(x, x)
    assert torch.equal(corrected(w, found, 0.01), w)
    accumulated = empty_moments(8, both=True)
    accumulated.add(x.float(), x.float())
    assert torch.equal(corrected(w, accumulated, 0.01), w)


@pytest.mark.parametrize("tokens", [2, 40])
def test_inputs_that_are_always_zero_keep_their_weights(tokens: int) -> None:
    original, x = streams(tokens, 8)
    x[:, 5] = 0.0
    w = draw(3, 8, seed=7)
    found = corrected(w, moments_of(original, x), 0.01)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[:, 5], w[:, 5]) and not torch.equal(found[:, 4], w[:, 4])


def test_moments_of_batches_are_those_of_all_tokens() -> None:
    original, x = (v.float() for v in streams(24, 5))
    found, alone = empty_moments(5, both=True), empty_moments(5, both=False)
    for part in (slice(0, 6), slice(6, 24)):
        found.add(x[part].reshape(2, -1, 5), original[part].reshape(2, -1, 5))
        alone.add_alone(x[part].reshape(3, -1, 5))
    assert found.gram.tokens == alone.gram.tokens == 24 and alone.drift is None
    torch.testing.assert_close(found.drift, (original - x).T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gram.matrix, x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gram.matrix, alone.gram.matrix, rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError):
        found.add(torch.zeros(2, 4), torch.zeros(2, 4))
