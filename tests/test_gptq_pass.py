"""`gptq`: what is stored is what runs, runs repeat and resume, and nothing is left alone silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ir.analysis import linear_sites
from ir.errors import UsageError
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from passes.base import Calib, Context, Log, OptionError
from passes.gptq import Gptq
from passes.pipeline import parse
from passes.rtn import Rtn
from tests.coded_sites import coded, decoded, parts, same_parts, stored_bytes
from tests.golden import check_golden
from tests.shiftadd_runs import DATA, SITES, error
from tests.watch import values


def compress(
    program: Program, *, bits: int, data: Any = DATA, work: Path | None = None, **options: Any
) -> tuple[Program, Log]:
    """A compressed copy of a program and what the pass said, with groups of 16."""
    program, log = program.clone(), Log("gptq")
    chosen = Gptq(bits=bits, group=16, **options)
    chosen.validate()
    chosen.run(program, Context(log=log, calibration=data, work=work))
    return program, log


@pytest.fixture(scope="module")
def plain(tiny_model: Program) -> tuple[Program, Log]:
    return compress(tiny_model, bits=3)


def test_the_codes_that_are_stored_are_what_runs(plain: tuple[Program, Log]) -> None:
    program, log = plain
    program = program.clone()
    program.level = "compressed"
    verify(program, full=True)
    assert sorted(coded(program)) == sorted(SITES) == sorted(r.site for r in log.reports)
    seen = values(program, DATA[0])
    for node in coded(program).values():
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ decoded(program, node).T, rtol=1e-5, atol=1e-5)


def test_figures_and_plans_are_those_of_the_stored_codes(tiny_model: Program, plain: tuple[Program, Log]) -> None:
    program, log = plain
    planned = {row.site: row.figures["bytes"] for row in Gptq(bits=3, group=16).plan(tiny_model)}
    for row in log.reports:
        node = coded(program)[row.site]
        assert planned[row.site] == row.figures["bytes"] == stored_bytes(program, node)
        assert row.figures["bits"] == 8 * stored_bytes(program, node) / row.figures["weights"]
        assert 0 < row.figures["rel_error"] < 0.5


def test_the_error_is_measured_on_the_inputs(tiny_model: Program) -> None:
    program, log = compress(tiny_model, bits=3, target="own")
    site = next(s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0] if s.name == SITES[0])
    weight = tiny_model.params.get(site.weight).double()
    # The inputs of the first block's q_proj are the float model's own.
    x = torch.cat([values(tiny_model, ids)[site.node.args[0].name].flatten(0, 1) for ids in DATA]).double()  # type: ignore[union-attr]
    off = x @ (weight - decoded(program, coded(program)[site.name])).T
    figures = {r.site: r.figures for r in log.reports}[site.name]
    assert figures["rel_error"] == pytest.approx(float(off.norm() / (x @ weight.T).norm()), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_comes_closer_than_rounding_to_nearest(tiny_model: Program, bits: int) -> None:
    nearest = tiny_model.clone()
    Rtn(bits=bits, group=16).run(nearest, Context(log=Log("rtn")))
    assert error(compress(tiny_model, bits=bits)[0], tiny_model) < 0.8 * error(nearest, tiny_model)


def test_later_blocks_are_fitted_to_what_earlier_ones_left(plain: tuple[Program, Log], tiny_model: Program) -> None:
    alone, _ = compress(tiny_model, bits=3, skip=("model.layers.0.*",))
    assert not same_parts(alone, plain[0], "model.layers.1.self_attn.q_proj")
    assert sorted(coded(alone)) == sorted(SITES[7:])


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, plain: tuple[Program, Log], tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(tiny_model, bits=3, work=tmp_path)
    for index in range(done, 2):
        (tmp_path / f"block-{index:04d}.json").unlink()
    fitted: list[str] = []
    fit = Gptq.fit

    def counting(self: Gptq, p: Program, site: Any, *rest: Any, **more: Any) -> Any:
        fitted.append(site.name)
        return fit(self, p, site, *rest, **more)

    monkeypatch.setattr(Gptq, "fit", counting)
    again, log = compress(tiny_model, bits=3, work=tmp_path)
    assert sorted(fitted) == sorted(SITES[7 * done :])
    assert all(same_parts(again, plain[0], name) for name in SITES)
    assert [r.figures for r in log.reports] == [r.figures for r in plain[1].reports]


def test_in_sequence_sites_see_the_codes_before_them(tiny_model: Program, plain: tuple[Program, Log]) -> None:
    together = plain[0]
    found, _ = compress(tiny_model, bits=3, sequential=True)
    first = [same_parts(found, together, site) for site in SITES[:7]]
    # Queries, keys and values read what nothing in the block has touched yet.
    assert first[:3] == [True] * 3 and first[3:] == [False] * 4
    one, _ = compress(tiny_model, bits=3, sequential=True, target="own", skip=("model.layers.1.*",))
    seen = values(one, DATA[0])
    node = coded(one)[SITES[3]]
    own, _ = compress(tiny_model, bits=3, target="own", skip=("model.layers.1.*",))
    assert not torch.equal(seen[node.args[0].name], values(tiny_model, DATA[0])[node.args[0].name])  # type: ignore[union-attr]
    assert not same_parts(one, own, SITES[3])


@pytest.mark.parametrize("symmetric", [False, True])
def test_options_reach_the_codes(tiny_model: Program, plain: tuple[Program, Log], symmetric: bool) -> None:
    program, _ = compress(tiny_model, bits=3, symmetric=symmetric, terms=1, order="inputs", search=False)
    for node in coded(program).values():
        scales = parts(program, node)[1]
        assert scales is not None and (parts(program, node)[2] is None) == symmetric
        assert torch.equal(torch.log2(scales.double()).round(), torch.log2(scales.double()))
    assert not same_parts(program, plain[0], SITES[0]) or symmetric


def test_widths_that_bits_chose_are_taken(tiny_model: Program) -> None:
    program = tiny_model.clone()
    program.attributes["bits"] = {SITES[0]: 2, SITES[1]: 5}
    Gptq(bits=3, group=16).run(program, Context(log=Log("gptq"), calibration=DATA))
    found = [coded(program)[name].args[-2] for name in SITES[:3]]
    assert found == [2, 5, 3]


def test_sites_that_only_read_zeros_are_rounded_alone_and_named(tiny_model: Program) -> None:
    program = tiny_model.clone()
    name = next(n for n in program.params if n.endswith("layers.1.input_layernorm.weight"))
    program.params.put(name, torch.zeros_like(program.params.get(name)), by="test")
    found, log = compress(program, bits=3)
    named = {d.site: d.reason for d in log.diagnostics if "rounded without them" in d.reason}
    assert sorted(named) == sorted(SITES[7:11]) and sorted(coded(found)) == sorted(SITES)


def test_what_it_needs() -> None:
    alone = Calib("compressed", original=True)
    assert Gptq().needs() == Calib("both", original=True) and Gptq(target="own").needs() == alone
    assert Gptq(share=0).needs() == alone


def test_it_needs_text(tiny_model: Program) -> None:
    with pytest.raises(UsageError, match="needs calibration text"):
        compress(tiny_model, bits=3, data=None)


@pytest.mark.parametrize(
    ("option", "value"), [("bits", 1), ("bits", 9), ("terms", 4), ("share", 2.0), ("group", 0), ("damp", 0.0)]
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"option {option} of pass gptq"):
        parse(f"gptq{{{option}={value}}}")


def test_golden_dump(plain: tuple[Program, Log], request: pytest.FixtureRequest) -> None:
    check_golden("gptq.ir", dump(plain[0]), request)
