"""`rtn`: what is stored is what runs, plans are exact, and nothing is left alone silently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ir.analysis import linear_sites
from ir.errors import UnsupportedError
from ir.ops.packing import unpack_bits
from ir.ops.shiftcode import decode_scales, encode, round_power_terms
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from passes.base import Context, Diagnostic, Log, OptionError
from passes.pipeline import parse
from passes.rtn import Rtn
from tests.coded_sites import coded, decoded, parts, same_parts, stored_bytes
from tests.golden import check_golden
from tests.shiftadd_runs import SITES
from tests.test_shiftadd_pass import heavy_tailed
from tests.watch import batches, values


def compress(program: Program, **options: Any) -> tuple[Program, Log]:
    """A compressed copy of a program and what the pass said; groups of 16 unless told otherwise."""
    program, log = program.clone(), Log("rtn")
    Rtn(**{"group": 16, **options}).run(program, Context(log=log))
    return program, log


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_codes_that_are_stored_are_what_runs(tiny_model: Program, symmetric: bool) -> None:
    program, log = compress(tiny_model, bits=3, symmetric=symmetric)
    program.level = "compressed"
    verify(program, full=True)
    assert sorted(coded(program)) == sorted(SITES) == sorted(r.site for r in log.reports)
    ids = batches((2, 9))[0]
    seen = values(program, ids)
    for node in coded(program).values():
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ decoded(program, node).T, rtol=1e-5, atol=1e-5)
        assert (parts(program, node)[2] is None) == symmetric


def test_weights_are_within_half_a_step_of_their_codes(tiny_model: Program) -> None:
    program, _ = compress(tiny_model, bits=4)
    for site in linear_sites(tiny_model, tiny_model.graph.nodes)[0]:
        node = coded(program)[site.name]
        scales = parts(program, node)[1]
        assert scales is not None
        error = (tiny_model.params.get(site.weight).double() - decoded(program, node)).abs()
        step = scales.double().repeat_interleave(16, 1)
        # The zero point and the scale are rounded too, which costs the ends of the range up to half a step more.
        assert bool((error <= 1.01 * step).all()) and float((error <= 0.51 * step).double().mean()) > 0.95


def test_reported_figures_are_those_of_the_stored_codes(tiny_model: Program) -> None:
    program, log = compress(tiny_model, bits=3)
    sites = linear_sites(tiny_model, tiny_model.graph.nodes)[0]
    weights = {site.name: tiny_model.params.get(site.weight).double() for site in sites}
    for row in log.reports:
        node, weight = coded(program)[row.site], weights[row.site]
        error = float((weight - decoded(program, node)).norm() / weight.norm())
        assert row.figures["rel_error"] == pytest.approx(error, rel=1e-9)
        assert row.figures["bytes"] == stored_bytes(program, node)
        assert row.figures["bits"] == 8 * stored_bytes(program, node) / weight.numel()


# A uniform grid over the range of 32 Gaussian weights; symmetric ranges waste what the two ends differ by.
FLOORS = {
    ("gaussian", False): {2: 6.5, 3: 14.2, 4: 20.5, 6: 33.0, 8: 45.0},
    ("gaussian", True): {2: 5.0, 3: 12.8, 4: 19.2, 6: 31.5, 8: 43.5},
    ("heavy", False): {2: 6.0, 3: 12.5, 4: 19.0, 6: 31.5, 8: 43.5},
    ("heavy", True): {2: 4.2, 3: 10.4, 4: 15.8, 6: 28.5, 8: 40.0},
}


@pytest.mark.parametrize(("shape", "symmetric"), FLOORS)
def test_signal_to_noise_grows_with_bits(tiny_model: Program, shape: str, symmetric: bool) -> None:
    program = tiny_model if shape == "gaussian" else heavy_tailed(tiny_model)
    last: dict[str, float] = {}
    for bits, floor in FLOORS[shape, symmetric].items():
        _, log = compress(program, bits=bits, group=32, symmetric=symmetric)
        found = {r.site: r.figures["sqnr_db"] for r in log.reports}
        assert min(found.values()) >= floor
        assert all(found[site] > last.get(site, 0.0) + 4 for site in found)
        last = found


def test_a_weight_on_the_grid_is_kept_exactly(tiny_model: Program) -> None:
    program = tiny_model.clone()
    name = f"{SITES[0]}.weight"
    grid = torch.arange(32 * 32).remainder(16).view(32, 32).float() * 0.125 - 1
    program.params.put(name, grid, "test")
    found, log = compress(program, bits=4)
    assert torch.equal(decoded(found, coded(found)[SITES[0]]), grid.double())
    assert next(r for r in log.reports if r.site == SITES[0]).figures["sqnr_db"] == float("inf")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_scales_of_few_powers_of_two(tiny_model: Program, terms: int, symmetric: bool) -> None:
    program = tiny_model.clone()
    weight = program.params.get(f"{SITES[0]}.weight").clone()
    # A group of zeros, one far below its row, one below what float16 holds, and one far above.
    weight[0, :16], weight[1, :16], weight[2], weight[3, :16] = 0.0, weight[1, :16] * 2**-20, 2.0**-30, 1e4
    program.params.put(f"{SITES[0]}.weight", weight, "test")
    _, float_log = compress(program, bits=4, symmetric=symmetric)
    found, log = compress(program, bits=4, symmetric=symmetric, terms=terms)
    for node in coded(found).values():
        scales = parts(found, node)[1]
        assert scales is not None and scales.dtype == torch.float16
        exact = scales.double()
        assert torch.equal(round_power_terms(exact, terms), exact) and bool((exact > 0).all())
        # Within the window of one row's scale codes, so that they can be stored as such.
        ones = torch.ones(1, exact.shape[0], 16 * exact.shape[1])
        assert torch.equal(decode_scales(encode(ones, exact[..., None], None, 16, terms))[..., 0], exact)
        assert bool(torch.isfinite(decoded(found, node)).all())
    # One power of two costs up to a bit of resolution, two little, three nothing to speak of.
    loss = {1: 6.1, 2: 1.5, 3: 0.5}[terms]
    fine = {r.site: r.figures["sqnr_db"] for r in float_log.reports}
    assert all(r.figures["sqnr_db"] > fine[r.site] - loss for r in log.reports if r.site != SITES[0])


def test_codes_are_chosen_under_the_rounded_scale(tiny_model: Program) -> None:
    found, _ = compress(tiny_model, bits=4, terms=1)
    for site in linear_sites(tiny_model, tiny_model.graph.nodes)[0]:
        node = coded(found)[site.name]
        _, scales, zeros = parts(found, node)
        assert scales is not None and zeros is not None
        points = unpack_bits(zeros, 4, scales.shape[1]).double()
        levels = (torch.arange(16.0).double() - points[..., None]) * scales.double()[..., None]
        weight = tiny_model.params.get(site.weight).double()
        nearest = (weight[..., None] - levels.repeat_interleave(16, 1)).abs().amin(-1)
        torch.testing.assert_close((weight - decoded(found, node)).abs(), nearest, rtol=0, atol=1e-6)


def test_a_weight_of_zeros_is_kept(tiny_model: Program) -> None:
    program = tiny_model.clone()
    program.params.put(f"{SITES[2]}.weight", torch.zeros(16, 32), "test")
    found, _ = compress(program, bits=2)
    assert not decoded(found, coded(found)[SITES[2]]).any()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group": 16},
        {"bits": 3, "group": 8},
        {"bits": 3, "group": 32, "symmetric": True},
        {"bits": 4, "group": 16, "terms": 1},
        {"bits": 5, "group": 32, "skip": ("v_proj", "model.layers.1.mlp.*")},
    ],
)
def test_planned_bytes_are_the_bytes_that_get_stored(tiny_model: Program, options: dict[str, Any]) -> None:
    planned = {row.site: row.figures for row in Rtn(**options).plan(tiny_model)}
    program, log = compress(tiny_model, **options)
    reports = {r.site: r.figures for r in log.reports}
    assert set(planned) == set(reports) == set(coded(program))
    for name, node in coded(program).items():
        assert planned[name]["bytes"] == reports[name]["bytes"] == stored_bytes(program, node)
        assert planned[name]["bits"] == reports[name]["bits"]
        assert planned[name]["weights"] == reports[name]["weights"]


def test_sites_left_alone_are_recorded(tiny_model: Program) -> None:
    program, log = compress(tiny_model, skip=("down_proj",))
    left = [s for s in SITES if "down_proj" in s]
    expected = [Diagnostic(s, "skip=down_proj names it", "rtn", asked=True) for s in left]
    head = Diagnostic("lm_head", "its weight model.embed_tokens.weight is shared with another reader", "rtn")
    assert log.diagnostics == [*expected, head]
    assert {s.name for s in linear_sites(program, program.graph.nodes)[0]} == set(left)


def test_a_second_pass_takes_what_the_first_left(tiny_model: Program) -> None:
    program, _ = compress(tiny_model, bits=4, skip=("down_proj",))
    both, log = compress(program, bits=8, group=64)
    assert {r.site for r in log.reports} == {s for s in SITES if "down_proj" in s}
    assert all(same_parts(both, program, name) for name in coded(program))


def test_a_group_must_divide_every_input(tiny_model: Program) -> None:
    with pytest.raises(UnsupportedError, match="group 64 of pass rtn does not divide the inputs of 12 of 14") as caught:
        compress(tiny_model, group=64)
    assert "32, 16, 8" in caught.value.fix


@pytest.mark.parametrize(("option", "value"), [("bits", 1), ("bits", 9), ("group", 0), ("terms", 4)])
def test_options_out_of_range(option: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"option {option} of pass rtn"):
        parse(f"rtn{{{option}={value}}}")


def test_a_weight_that_is_not_finite_is_named(tiny_model: Program) -> None:
    program = tiny_model.clone()
    name = f"{SITES[9]}.weight"
    program.params.put(name, program.params.get(name) * float("nan"), "test")
    with pytest.raises(UnsupportedError, match="not finite") as caught:
        compress(program)
    assert caught.value.where == name


def test_golden_dump(tiny_model: Program, request: pytest.FixtureRequest) -> None:
    program, _ = compress(tiny_model, bits=3)
    program = replace(program, level="compressed", history=(*program.history, "rtn{bits=3 group=16}"))
    check_golden("rtn.ir", dump(program), request)
