"""Gram accumulation and the damped factor of its inverse."""

import pytest
import torch

from ir.errors import UnsupportedError, UsageError
from passes.quantize.hessian import empty_gram, inverse_factor, prepare, update


def samples(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    return torch.randn(tokens, inputs, dtype=torch.float64, generator=generator) @ mix


def test_streamed_gram_is_the_whole_product() -> None:
    x = samples(60, 7)
    gram = empty_gram(7, torch.float64)
    update(gram, x[:24].reshape(2, 3, 4, 7))
    update(gram, x[24:])
    assert gram.tokens == 60
    torch.testing.assert_close(gram.matrix, x.T @ x, rtol=1e-13, atol=1e-12)
    with pytest.raises(UsageError):
        update(gram, torch.zeros(2, 6))


def test_factor_is_upper_and_inverts() -> None:
    x = samples(90, 11)
    prepared = prepare(x.T @ x, 0.01)
    assert prepared.damp == 0.01 and not prepared.dead.any()
    assert torch.equal(prepared.upper, prepared.upper.triu())
    assert bool((prepared.upper.diagonal() > 0).all())
    identity = prepared.upper.T @ prepared.upper @ prepared.matrix
    torch.testing.assert_close(identity, torch.eye(11, dtype=torch.float64), rtol=0, atol=1e-10)
    reference = torch.linalg.cholesky(torch.linalg.inv(prepared.matrix), upper=True)
    torch.testing.assert_close(prepared.upper, reference, rtol=1e-8, atol=1e-10)


def test_damping_is_relative_to_the_live_diagonal() -> None:
    x = samples(50, 6)
    x[:, 2] = 0.0
    h = x.T @ x
    prepared = prepare(h, 0.1)
    assert prepared.dead.tolist() == [False, False, True, False, False, False]
    mean = float(h.diagonal()[~prepared.dead].mean())
    added = prepared.matrix.diagonal() - h.diagonal()
    expected = torch.full((6,), 0.1 * mean, dtype=torch.float64)
    expected[2] += 0.01 * mean
    torch.testing.assert_close(added, expected, rtol=1e-12, atol=0)
    assert bool((prepared.matrix[2, [0, 1, 3, 4, 5]] == 0).all())
    scaled = prepare(h * 2.0**-20, 0.1)
    torch.testing.assert_close(scaled.upper, prepared.upper * 2.0**10, rtol=1e-12, atol=0)


def test_all_dead_inputs_stay_finite() -> None:
    prepared = prepare(torch.zeros(4, 4), 0.01)
    assert bool(prepared.dead.all()) and bool(torch.isfinite(prepared.upper).all())


def test_damping_climbs_until_the_factor_exists() -> None:
    h = torch.eye(5, dtype=torch.float64)
    h[0, 1] = h[1, 0] = 1.05
    assert inverse_factor(h) is None
    assert prepare(h, 0.01).damp == 0.1


def test_hopeless_matrices_are_refused_with_a_reason() -> None:
    h = torch.eye(4, dtype=torch.float64)
    h[0, 1] = h[1, 0] = 9.0
    with pytest.raises(UnsupportedError, match="12 tokens for 4 inputs"):
        prepare(h, 0.01, tokens=12, site="block.0.q")
    for bad in (torch.full((3, 3), float("nan")), torch.ones(3, 4)):
        with pytest.raises(UsageError):
            prepare(bad)
