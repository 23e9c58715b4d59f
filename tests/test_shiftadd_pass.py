"""`shiftadd`: what is stored is what runs, siblings do not mix, nothing is left alone silently, and runs repeat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.shiftadd
from ir.analysis import blocks, linear_sites
from ir.errors import UsageError
from ir.params import Entry, MemorySource
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from passes.base import Diagnostic, Log, OptionError
from passes.shiftadd import ShiftAdd
from passes.shiftcode.siblings import fit_siblings
from tests.coded_sites import coded, decoded, same_parts, stored_bytes
from tests.golden import check_golden
from tests.shiftadd_runs import DATA, QUICK, SITES, compress, error
from tests.watch import values


@pytest.fixture(scope="module")
def plain(tiny_model: Program) -> tuple[Program, Log]:
    return compress(tiny_model)


def test_every_linear_of_the_blocks_is_coded(plain: tuple[Program, Log]) -> None:
    program, log = plain
    assert sorted(coded(program)) == sorted(SITES) == sorted(r.site for r in log.reports)
    assert {n.args[-2:] for n in coded(program).values()} == {(16, 2)}
    assert not any(f"{name}.weight" in program.params for name in SITES)
    verify(replace(program, level="compressed"), full=True)


def test_the_codes_that_are_stored_are_what_runs(plain: tuple[Program, Log], tiny_model: Program) -> None:
    program, _ = plain
    seen = values(program, DATA[0])
    originals = {s.name: tiny_model.params.get(s.weight) for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0]}
    for name, node in coded(program).items():
        weight = decoded(program, node)
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)
        assert weight.shape == originals[name].shape and not torch.equal(weight, originals[name].double())


def test_reported_figures_are_those_of_the_stored_codes(tiny_model: Program) -> None:
    program, log = compress(tiny_model, basis="plain", target="own")
    figures = {r.site: r.figures for r in log.reports}
    originals = {s.name: s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0]}
    for name, node in coded(program).items():
        rows, inputs = originals[name].rows, originals[name].inputs
        assert figures[name]["bytes"] == stored_bytes(program, node)
        assert figures[name]["bits"] == 8 * stored_bytes(program, node) / (rows * inputs)
    # The inputs of the first block's q_proj are the float model's own, so its error can be measured from outside.
    name = SITES[0]
    node, weight = originals[name].node, tiny_model.params.get(originals[name].weight).double()
    x = torch.cat([values(tiny_model, ids)[node.args[0].name].flatten(0, 1) for ids in DATA]).double()  # type: ignore[union-attr]
    error = x @ (weight - decoded(program, coded(program)[name])).T
    found = float(error.norm() / (x @ weight.T).norm())
    assert figures[name]["rel_error"] == pytest.approx(found, rel=1e-4)
    assert figures[name]["sqnr_db"] == pytest.approx(-20 * torch.log10(torch.tensor(found)).item(), abs=1e-3)


def test_blocks_stay_blocks_when_only_one_of_them_is_compressed(tiny_model: Program) -> None:
    program, _ = compress(tiny_model, skip=("model.layers.1.*",))
    assert sorted(coded(program)) == sorted(SITES[:7])
    assert len(blocks(program)) == len(blocks(tiny_model)) == 2


def test_siblings_solved_together_are_solved_as_if_alone(tiny_model: Program) -> None:
    together, _ = compress(tiny_model, sequential=False)
    for name in (SITES[0], SITES[1], SITES[4]):
        others = tuple(s for s in SITES if s != name)
        alone, _ = compress(tiny_model, skip=others)
        assert list(coded(alone)) == [name] and same_parts(alone, together, name)


def test_later_blocks_are_fitted_to_what_earlier_ones_left(plain: tuple[Program, Log], tiny_model: Program) -> None:
    name = "model.layers.1.self_attn.q_proj"
    first_float, _ = compress(tiny_model, skip=("model.layers.0.*",))
    assert not same_parts(first_float, plain[0], name)


def test_sites_of_a_block_see_what_those_before_them_changed(tiny_model: Program) -> None:
    """Together they are fitted as one would be after another, each in a run of its own."""
    alone: dict[str, Any] = {"basis": "plain", "target": "own"}
    inner = [SITES[:3], SITES[3:4], SITES[4:6], SITES[6:7]]
    sequential, at_once = (compress(tiny_model, sequential=s, **alone)[0] for s in (True, False))
    program = tiny_model
    for names in inner:
        later = tuple(n for n in SITES if n not in names and n not in coded(program))
        program, _ = compress(program, skip=later, **alone)
        assert all(same_parts(program, sequential, name) for name in names)
    assert all(same_parts(sequential, at_once, name) for name in inner[0])
    assert not any(same_parts(sequential, at_once, name) for name in SITES[3:7])


def test_data_free_sites_do_not_depend_on_each_other_or_on_data(tiny_model: Program) -> None:
    free, _ = compress(tiny_model, calib="none", data=None)
    other, _ = compress(tiny_model, calib="none", skip=("model.layers.0.*",))
    assert sorted(coded(free)) == sorted(SITES)
    assert all(same_parts(free, other, name) for name in coded(other))
    assert ShiftAdd(calib="none").needs() is None and ShiftAdd().needs() is not None


def test_it_needs_text_unless_told_otherwise(tiny_model: Program) -> None:
    with pytest.raises(UsageError, match="needs calibration text"):
        compress(tiny_model, data=None)


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("v_proj", [s for s in SITES if "v_proj" in s]),
        ("model.layers.1.*", SITES[7:]),
        ("*.0.*_proj", SITES[:7]),
    ],
)
def test_sites_named_by_skip_stay_float_and_are_recorded(tiny_model: Program, pattern: str, left: list[str]) -> None:
    program, log = compress(tiny_model, skip=(pattern,), calib="none", rounds=0)
    found = {d.site: d for d in log.diagnostics if d.site != "lm_head"}
    assert found == {s: Diagnostic(s, f"skip={pattern} names it", "shiftadd", asked=True) for s in left}
    assert sorted(coded(program)) == sorted(set(SITES) - set(left))
    kept = {s.name for s in linear_sites(program, program.graph.nodes)[0]}
    assert kept == set(left)


def test_a_part_of_a_name_is_no_pattern(tiny_model: Program) -> None:
    with pytest.raises(OptionError, match="q matches none of the 15 linears"):
        compress(tiny_model, skip=("q",), calib="none", rounds=0)


def test_a_tied_head_is_recorded(plain: tuple[Program, Log]) -> None:
    reason = "its weight model.embed_tokens.weight is shared with another reader"
    assert plain[1].diagnostics == [Diagnostic("lm_head", reason, "shiftadd")]


def test_a_head_of_its_own_is_outside_the_blocks(untied_model: Program) -> None:
    program, log = compress(untied_model, calib="none", rounds=0)
    assert [d.site for d in log.diagnostics] == ["lm_head"]
    assert "outside the repeated blocks" in log.diagnostics[0].reason
    assert "lm_head" not in coded(program)


def heavy_tailed(program: Program) -> Program:
    """A copy with weights of Student's t with four degrees of freedom."""
    program, generator = program.clone(), torch.Generator().manual_seed(1)
    for site in linear_sites(program, program.graph.nodes)[0]:
        normal, spread = (torch.randn(site.rows, site.inputs, n, generator=generator) for n in (1, 4))
        weight = 0.1 * normal[..., 0] / spread.square().mean(-1).sqrt()
        kind = program.params.type_of(site.weight)
        program.params.enter(site.weight, Entry(MemorySource({site.weight: weight}), site.weight, kind))
    return program


# What optimal scalar quantisers of the whole distribution reach on Gaussian weights: 4.4, 9.3, 14.6 dB and so on.
FLOORS = {
    ("gaussian", "none"): {1: 4.4, 2: 9.3, 3: 15.0, 4: 20.2},
    ("gaussian", "stream"): {2: 10.5, 3: 16.0},
    ("heavy", "none"): {2: 8.5, 4: 19.5},
}


@pytest.mark.parametrize(("shape", "calib"), FLOORS)
def test_signal_to_noise_grows_with_bits(tiny_model: Program, shape: str, calib: str) -> None:
    program = tiny_model if shape == "gaussian" else heavy_tailed(tiny_model)
    last: dict[str, float] = {}
    for bits, floor in FLOORS[shape, calib].items():
        _, log = compress(program, bits=bits, group=32, rounds=2, calib=calib, target="own")
        found = {r.site: r.figures["sqnr_db"] for r in log.reports}
        assert min(found.values()) >= floor
        assert all(found[site] > last.get(site, 0.0) + 3 for site in found)
        last = found


def test_looking_at_the_inputs_pays(tiny_model: Program) -> None:
    errors = [error(compress(tiny_model, **o)[0], tiny_model) for o in ({}, {"target": "own"}, {"calib": "none"})]
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[2]


@pytest.mark.parametrize("options", [{}, {"mode": "lat", "group": 64}, {"code": "trits", "bits": 1}])
def test_float_targets_bring_the_blocks_closer_to_the_float_model(tiny_model: Program, options: dict[str, Any]) -> None:
    own, half, full = (
        compress(tiny_model, **options, **o)[0] for o in ({"target": "own"}, {"share": 0.5}, {"share": 1.0})
    )
    errors = [error(p, tiny_model) for p in (own, half, full)]
    assert errors[2] < 0.95 * errors[0] and errors[1] < errors[0]
    assert all(same_parts(own, full, name) for name in SITES[:3])
    assert not any(same_parts(own, full, name) for name in SITES[7:])


def test_no_share_of_the_correction_is_the_weights_own_target(tiny_model: Program) -> None:
    own, none = compress(tiny_model, target="own")[0], compress(tiny_model, share=0.0)[0]
    assert all(same_parts(own, none, name) for name in SITES)
    needs = [ShiftAdd(**o).needs() for o in ({}, {"share": 0.0}, {"target": "own"})]  # type: ignore[arg-type]
    assert [n.stream for n in needs if n is not None] == ["both", "compressed", "compressed"]


def test_the_result_is_the_same_every_time(plain: tuple[Program, Log], tiny_model: Program) -> None:
    again, log = compress(tiny_model)
    assert dump(again) == dump(plain[0]) and log.reports == plain[1].reports
    assert all(torch.equal(again.params.get(n), plain[0].params.get(n)) for n in again.params)


RESUMED: list[dict[str, Any]] = [
    {},
    {"mode": "acc", "group": 0, **QUICK},
    {"nested": (2, 3), **QUICK},
    {"nested": (2, 4), "terms": 0, "offset": False, **QUICK},
    {"code": "trits31", **QUICK},
    {"terms": 0, **QUICK},
]


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("options", RESUMED)
def test_finished_blocks_are_taken_from_the_work_folder(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, options: dict[str, Any]
) -> None:
    first, first_log = compress(tiny_model, work=tmp_path, **options)
    for index in range(2 - lost, 2):
        (tmp_path / f"block-{index:04d}.json").unlink()
    solved: list[str] = []

    def fit(weight: Tensor, sites: Any, *rest: Any) -> Any:
        solved.extend(site.name for site in sites)
        return fit_siblings(weight, sites, *rest)

    monkeypatch.setattr(passes.shiftadd, "fit_siblings", fit)
    again, log = compress(tiny_model, work=tmp_path, **options)
    assert sorted(solved) == sorted(SITES[7 * (2 - lost) :])
    assert dump(again) == dump(first) and log.reports == first_log.reports
    assert all(torch.equal(again.params.get(n), first.params.get(n)) for n in again.params)


def test_two_sites_of_one_path_are_kept_apart_on_disk(tiny_model: Program, tmp_path: Path) -> None:
    program = tiny_model.clone()
    for site in linear_sites(program, program.graph.nodes)[0]:
        site.node.meta["path"] = site.name.rpartition(".")[0]
    first, _ = compress(program, work=tmp_path)
    again, _ = compress(program, work=tmp_path)
    assert dump(first) == dump(again)
    assert all(torch.equal(again.params.get(n), first.params.get(n)) for n in again.params)


def test_golden_dump(plain: tuple[Program, Log], request: pytest.FixtureRequest) -> None:
    program = plain[0].clone()
    program = replace(program, level="compressed", history=(*program.history, "shiftadd{bits=2 group=16 rounds=2}"))
    check_golden("shiftadd.ir", dump(program), request)
