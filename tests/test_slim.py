"""`slim`: branches beside coded linears, what they give back, how they count, and where none can be fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import passes.slim as module
from ir.analysis import is_branch, site_name
from ir.errors import UsageError
from ir.program import Program
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.pipeline import parse
from passes.slim import Slim
from passes.sparsify.lowrank import truncated, weighed_error
from tests.architectures import ids_for, traced
from tests.pipeline_runs import run as run_text
from tests.shiftadd_runs import DATA, SITES, error
from tests.solver_problems import draw
from tools.storage import storage


def run(program: Program, text: str, data: Any = DATA, work: Path | None = None) -> tuple[Program, Log]:
    """A pipeline's program and log, on the data that most tests here take."""
    return run_text(program, text, data, work)


def test_strong_inputs_count_more() -> None:
    missing, energy = draw(24, 40), torch.linspace(0.05, 9, 40).double()
    up, down = weighed_error(missing, energy, 4)
    plain_up, plain_down = truncated(missing, 4)

    def lost(a: torch.Tensor) -> float:
        return float(((missing - a).square() * energy).sum())

    assert lost(up @ down) < lost(plain_up @ plain_down) < lost(torch.zeros(24, 40))
    whole = torch.linalg.svdvals(missing * energy.sqrt())[4:].square().sum()
    assert lost(up @ down) == pytest.approx(float(whole))


@pytest.mark.parametrize("codes", ["rtn{bits=2 group=16}", "sparse{method=wanda},rtn{bits=4 group=16}", "sparse"])
def test_it_gives_some_of_the_error_back(tiny_model: Program, codes: str) -> None:
    if codes == "sparse":  # floats are packed after it
        with pytest.raises(Exception, match="slim"):
            run(tiny_model, "sparse,slim")
        return
    plain, _ = run(tiny_model, codes)
    found, log = run(tiny_model, f"{codes},slim{{ratio=0.25}}")
    verify(found, full=True)
    assert error(found, tiny_model) < 0.95 * error(plain, tiny_model)
    rows = [r for r in log.reports if r.by == "slim" and "error_left" in r.figures]
    assert sorted(r.site for r in rows) == sorted(SITES) and all(r.figures["error_left"] < 1 for r in rows)
    assert {site_name(n).removesuffix(".branch") for n in found.graph.nodes if is_branch(n)} == set(SITES)


def test_its_bytes_count_and_its_weights_do_not(tiny_model: Program) -> None:
    plain, _ = run(tiny_model, "rtn{bits=3 group=16}")
    found, log = run(tiny_model, "rtn{bits=3 group=16},slim")
    extra = sum(r.figures["bytes"] for r in log.reports if r.by == "slim" and "bytes" in r.figures)
    before, after = storage(plain, written=True), storage(found, written=True)
    assert extra > 0 and after.total_bytes == before.total_bytes + extra
    assert after.total_weights == before.total_weights
    assert after.compressed_bits is not None and before.compressed_bits is not None
    assert after.compressed_bits > before.compressed_bits


def test_more_rank_leaves_less(tiny_model: Program) -> None:
    lost = [error(run(tiny_model, f"rtn{{bits=2 group=16}},slim{{ratio={r}}}")[0], tiny_model) for r in (0.1, 0.5)]
    assert lost[1] < lost[0]


def test_turned_inputs_and_sites_with_a_branch_are_named(tiny_model: Program) -> None:
    _, log = run(tiny_model, "shiftadd{bits=2 group=16 rounds=1 iterations=0 polish=0 sweeps=0 starts=1},slim")
    assert {d.site for d in log.diagnostics if "weights were turned" in d.reason} == set(SITES)
    plain = run(tiny_model, "fold,rotate,rtn{bits=2 group=16}")[0]
    found, log = run(tiny_model, "fold,rotate,rtn{bits=2 group=16},slim{ratio=0.25}")
    assert error(found, tiny_model) < error(plain, tiny_model)
    _, log = run(tiny_model, "sparse{method=magnitude},slorb{k=8},rtn{bits=4 group=16},slim")
    assert {d.site for d in log.diagnostics if "branch already" in d.reason} == set(SITES)
    _, log = run(tiny_model, "rtn{bits=3 group=16},slim{skip=[down_proj]}")
    asked = {d.site for d in log.diagnostics if d.by == "slim" and d.asked}
    assert asked == {s for s in SITES if "down_proj" in s}


def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "rtn{bits=3 group=16},slim"
    whole, log = run(tiny_model, text)
    seen, fit = 0, module.weighed_error

    def failing(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > 9:
            raise KeyboardInterrupt
        return fit(*args)

    with monkeypatch.context() as patched:
        patched.setattr(module, "weighed_error", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, text, work=tmp_path)
    again, said = run(tiny_model, text, work=tmp_path)
    assert set(again.params) == set(whole.params)
    assert all(torch.equal(again.params.get(n), whole.params.get(n)) for n in whole.params)
    assert [(r.site, r.figures) for r in said.reports] == [(r.site, r.figures) for r in log.reports]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_it_runs_on_many_architectures(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, "rtn{bits=3 group=16},slim", data)
    verify(found, full=True)
    assert [r for r in log.reports if r.by == "slim"]


def test_it_needs_the_float_weights_and_options_in_range(tiny_model: Program) -> None:
    program, _ = run(tiny_model, "rtn{bits=3 group=16}")
    with pytest.raises(UsageError, match="before they were coded"):
        Slim().run(program, Context(calibration=DATA))
    for text in ("slim{ratio=0}", "slim{ratio=2}", "slim{branches=1}"):
        with pytest.raises(OptionError):
            parse(text)
