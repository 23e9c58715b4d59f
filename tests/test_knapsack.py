"""Bit allocation as a multiple-choice knapsack: exact against brute force and an integer program."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import UsageError
from passes.quantize.knapsack import Choice, allocate

choices = st.lists(st.builds(Choice, st.integers(0, 30), st.floats(0, 10, width=16)), min_size=1, max_size=4)


def total(sites: list[list[Choice]], picked: list[int] | tuple[int, ...]) -> tuple[int, float]:
    chosen = [site[i] for site, i in zip(sites, picked, strict=True)]
    return sum(c.size for c in chosen), sum(c.loss for c in chosen)


@settings(max_examples=200, deadline=None)
@given(sites=st.lists(choices, min_size=1, max_size=6), share=st.floats(0, 1.2))
def test_equals_brute_force(sites: list[list[Choice]], share: float) -> None:
    least, most = (sum(f(c.size for c in site) for site in sites) for f in (min, max))
    budget = least + int(share * (most - least))
    size, loss = total(sites, allocate(sites, budget))
    everything = (total(sites, picked) for picked in product(*(range(len(site)) for site in sites)))
    best = min(found for fits, found in everything if fits <= budget)
    assert size <= budget
    assert loss == pytest.approx(best, abs=1e-9)


def model_like(sites: int, seed: int) -> list[list[Choice]]:
    """Sites of a few shapes at 2, 3 and 4 planes, with losses that fall about sixfold a plane."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(sites):
        weights = (331776, 110592, 884736)[index % 3]
        scale = float(np.exp(generator.normal())) * weights
        losses = [scale * 6.0**-bits * float(np.exp(0.3 * generator.normal())) for bits in (2, 3, 4)]
        found.append([Choice(weights * bits // 8 + 1000, loss) for bits, loss in zip((2, 3, 4), losses, strict=True)])
    return found


@pytest.mark.parametrize(("seed", "bits"), [(0, 2.2), (1, 2.5), (2, 3.3)])
def test_equals_an_integer_program(seed: int, bits: float) -> None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    sites = model_like(60, seed)
    budget = int(sum(site[0].size for site in sites) * bits / 2)
    flat = [c for site in sites for c in site]
    one_each = np.kron(np.eye(len(sites)), np.ones(3))
    sizes = np.array([[c.size for c in flat]], float)
    solved = milp(
        [c.loss for c in flat],
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, 0, budget)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    size, loss = total(sites, allocate(sites, budget))
    assert solved.success and size <= budget
    assert loss == pytest.approx(solved.fun, rel=1e-7)


def test_a_whole_large_model_is_allocated() -> None:
    sites = model_like(600, seed=3)
    least = sum(site[0].size for site in sites)
    losses = [total(sites, allocate(sites, int(least * share)))[1] for share in (1.0, 1.1, 1.3, 1.6, 3.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(sum(site[0].loss for site in sites))
    assert losses[-1] == pytest.approx(sum(min(c.loss for c in site) for site in sites))


def test_what_cannot_be_met_is_refused_with_the_least_that_can() -> None:
    with pytest.raises(UsageError, match="cannot be met") as caught:
        allocate([[Choice(10, 1.0), Choice(7, 2.0)], [Choice(5, 0.0)]], 11)
    assert "12 bytes" in caught.value.why
    with pytest.raises(UsageError):
        allocate([[]], 5)
    with pytest.raises(UsageError):
        allocate([[Choice(1, float("nan"))]], 5)
