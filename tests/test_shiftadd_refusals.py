"""`shiftadd` where the inputs tell too little or an option cannot be used: fallbacks by name, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ir.analysis import linear_sites
from ir.errors import UnsupportedError, UsageError
from ir.program import Program
from ir.text import dump
from passes.base import OptionError
from passes.pipeline import parse
from passes.quantize.hessian import Gram
from passes.quantize.targets import Moments
from passes.shiftadd import ShiftAdd
from passes.shiftcode.siblings import Fitting, fit_siblings
from passes.shiftcode.solver import solve
from tests.coded_sites import coded, same_parts
from tests.shiftadd_runs import SITES, compress
from tests.watch import batches


def silenced(program: Program, place: str) -> Program:
    """A copy in which a norm gives zeros."""
    program = program.clone()
    program.params.put(place, torch.zeros_like(program.params.get(place)), "test")
    return program


@pytest.mark.parametrize("options", [{}, {"target": "own", "mode": "lat"}, {"nested": (2, 3)}])
def test_sites_that_only_read_zeros_are_fitted_to_their_weights_and_named(
    tiny_model: Program, tmp_path: Path, options: dict[str, Any]
) -> None:
    program = silenced(tiny_model, "model.layers.0.post_attention_layernorm.weight")
    found, log = compress(program, work=tmp_path, **options)
    reasons = {d.site: d.reason for d in log.diagnostics if d.site != "lm_head"}
    assert sorted(reasons) == sorted(SITES[4:7])
    assert set(reasons.values()) == {"its inputs were zero for all 256 tokens, so it is fitted to its weights alone"}
    assert sorted(coded(found)) == sorted(SITES)
    if "nested" not in options:
        free, _ = compress(program, **{**options, "calib": "none"})
        assert [n for n in SITES if same_parts(found, free, n)] == SITES[4:7]
    again, log_again = compress(program, work=tmp_path, **options)
    assert log_again.diagnostics == log.diagnostics and all(same_parts(again, found, n) for n in SITES)


def test_a_hessian_that_cannot_be_factored_falls_back_to_the_weights(tiny_model: Program) -> None:
    site = linear_sites(tiny_model, tiny_model.graph.nodes)[0][0]
    weight = tiny_model.params.get(site.weight).double()
    spec = ShiftAdd(group=16).spec(site, 2)
    hopeless = torch.eye(site.inputs)
    hopeless[0, 1] = hopeless[1, 0] = 9.0
    how = Fitting(lambda _: spec)
    [row] = fit_siblings(weight, [site], Moments(Gram(hopeless, 77), None), how)
    assert "77 tokens" in row.fallback and "fitted to its weights alone" in row.fallback
    assert torch.equal(row.codes.signs, solve(weight, None, spec).signs)
    [fine] = fit_siblings(weight, [site], Moments(Gram(torch.eye(site.inputs), 77), None), how)
    assert fine.fallback == ""


def test_a_singular_hessian_is_damped_until_it_can_be_factored(tiny_model: Program) -> None:
    few = batches((1, 7))
    program, log = compress(tiny_model, data=few, damp=1e-14)
    assert [d.site for d in log.diagnostics] == ["lm_head"]
    assert sorted(coded(program)) == sorted(SITES)
    found = [r.figures["rel_error"] for r in log.reports]
    assert all(0 <= f < 0.5 for f in found[:3])
    free, _ = compress(tiny_model, calib="none")
    assert not any(same_parts(program, free, name) for name in SITES)


def test_planning_changes_nothing(tiny_model: Program) -> None:
    program = tiny_model.clone()
    ShiftAdd(group=16).plan(program)
    assert program.version == tiny_model.version and dump(program) == dump(tiny_model)


def test_a_group_must_divide_every_input(tiny_model: Program) -> None:
    with pytest.raises(UnsupportedError, match="group 48 of pass shiftadd does not divide") as caught:
        compress(tiny_model, group=48)
    assert "has 32 inputs" in caught.value.where and "32, 16, 8" in caught.value.fix


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("bits", 0), ("bits", 9), ("terms", -1), ("terms", 5), ("group", -1), ("rounds", -1), ("damp", 0.0)),
        *(("damp", 1.5), ("damp", "nan"), ("starts", 0), ("starts", 5), ("iterations", -1), ("polish", -1)),
        *(("sweeps", -1), ("share", -0.1), ("share", 1.1), ("share", "nan"), ("mode", "column"), ("code", "levels")),
        *(("basis", "turned"), ("target", "other"), ("calib", "float"), ("nested", "[3 2]"), ("nested", "[2 2]")),
        *(("nested", "[0 2]"), ("nested", "[2 9]"), ("offset", "maybe")),
    ],
)
def test_options_out_of_range(option: str, value: float | str) -> None:
    with pytest.raises(UsageError, match=f"option {option} of pass shiftadd"):
        parse(f"shiftadd{{{option}={value}}}")


@pytest.mark.parametrize(
    "options",
    ["code=trits31 bits=3", "nested=[2 3] code=trits", "nested=[2 3] calib=none", "code=trits bits=6"],
)
def test_options_that_exclude_each_other(options: str) -> None:
    with pytest.raises(OptionError, match="shiftadd"):
        parse(f"shiftadd{{{options}}}")


@pytest.mark.parametrize("options", ["terms=0 group=0", "code=trits bits=5", "nested=[1 8] mode=lat", "share=0"])
def test_options_at_the_edge(options: str) -> None:
    assert str(parse(f"shiftadd{{{options}}}")).startswith("shiftadd{")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_model: Program, bad: float) -> None:
    program = tiny_model.clone()
    name = f"{SITES[9]}.weight"
    program.params.put(name, program.params.get(name).index_fill(0, torch.tensor([1]), bad), "test")
    with pytest.raises(UnsupportedError, match="not finite") as caught:
        compress(program, calib="none", rounds=0)
    assert caught.value.where == name and "32 of its" in caught.value.why
