"""`lowrank` and `svd`: fitted to outputs, no branch or product of their rank does better, and what they count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import passes.svd as module
from ir.analysis import blocks, linear_sites
from ir.program import Program
from ir.verify import verify
from passes.base import OptionError
from passes.pipeline import parse
from passes.sparsify.lowrank import truncated, weighed_error, whitened
from tests.architectures import ids_for, traced
from tests.pipeline_runs import run
from tests.shiftadd_runs import DATA, SITES, error
from tests.solver_problems import draw
from tools.storage import storage


@pytest.mark.parametrize(("rows", "inputs"), [(24, 40), (40, 24)])
def test_nothing_of_its_rank_is_closer_for_outputs(rows: int, inputs: int) -> None:
    weight, x = draw(rows, inputs), draw(200, inputs, seed=2) @ draw(inputs, inputs, seed=3)
    up, down = whitened(weight, x.T @ x, 4)

    def lost(a: torch.Tensor) -> float:
        return float(((weight - a) @ x.T).square().sum())

    exact = torch.linalg.svdvals(weight @ x.T)[4:].square().sum()
    assert lost(up @ down) == pytest.approx(float(exact), rel=1e-6)
    by_energy = weighed_error(weight, x.square().sum(0), 4)
    assert lost(up @ down) < lost(by_energy[0] @ by_energy[1])
    assert lost(up @ down) < lost(torch.matmul(*truncated(weight, 4)))
    assert down.shape == (4, inputs) and torch.linalg.matrix_rank(up) == 4


def test_inputs_never_seen_leave_the_best_for_the_weight() -> None:
    weight = draw(12, 8)
    up, down = whitened(weight, torch.zeros(8, 8), 3)
    torch.testing.assert_close(up @ down, torch.matmul(*truncated(weight, 3)))
    partly = torch.zeros(8, 8, dtype=torch.float64)
    partly[0, 0] = 1.0
    assert all(bool(torch.isfinite(part).all()) for part in whitened(weight, partly, 3))


def test_it_gives_back_more_than_energies_alone(tiny_model: Program) -> None:
    codes = "rtn{bits=2 group=16}"
    plain, slim, found = (
        run(tiny_model, codes + more, DATA)[0] for more in ("", ",slim{ratio=0.25}", ",lowrank{ratio=0.25}")
    )
    verify(found, full=True)
    assert error(found, tiny_model) < error(slim, tiny_model) < error(plain, tiny_model)


def test_products_take_the_place_of_weights(tiny_model: Program) -> None:
    found, log = run(tiny_model, "svd{share=0.7 multiple=1}", DATA)
    verify(found, full=True)
    names = [s.name for s in linear_sites(found, [n for b in blocks(found) for n in b.nodes])[0]]
    assert sorted(names) == sorted(f"{s}.{part}" for s in SITES for part in ("down", "up"))
    before, after = storage(tiny_model, written=True), storage(found, written=True)
    assert after.total_weights == before.total_weights
    share = sum(s.rows * s.inputs for s in after.sites) / sum(s.rows * s.inputs for s in before.sites)
    assert 0.5 < share <= 0.7 and after.linear_bits == pytest.approx(32 * share)
    assert after.total_bytes < before.total_bytes
    assert not any(f"{s}.weight" in found.params for s in SITES)
    assert len([r for r in log.reports if "rank" in r.figures]) == len(SITES)


def test_products_can_be_coded(tiny_model: Program) -> None:
    found, _ = run(tiny_model, "svd{share=0.9 multiple=4},rtn{bits=8 group=4}", DATA)
    verify(found, full=True)
    stored = storage(found, written=True)
    assert stored.total_weights == storage(tiny_model).total_weights
    assert stored.compressed_bits is not None and stored.compressed_bits < 32 * 0.9


def test_more_numbers_lose_less(tiny_model: Program) -> None:
    lost = [error(run(tiny_model, f"svd{{share={s} multiple=2}}", DATA)[0], tiny_model) for s in (0.5, 0.9)]
    assert lost[1] < lost[0]


def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, log = run(tiny_model, "svd{multiple=4}", DATA)
    seen, fit = 0, module.whitened

    def failing(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > 9:
            raise KeyboardInterrupt
        return fit(*args)

    with monkeypatch.context() as patched:
        patched.setattr(module, "whitened", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, "svd{multiple=4}", DATA, tmp_path)
    again, said = run(tiny_model, "svd{multiple=4}", DATA, tmp_path)
    assert set(again.params) == set(whole.params)
    assert all(torch.equal(again.params.get(n), whole.params.get(n)) for n in whole.params)
    assert [(r.site, r.figures) for r in said.reports] == [(r.site, r.figures) for r in log.reports]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
@pytest.mark.parametrize("text", ["svd{multiple=4}", "rtn{bits=3 group=16},lowrank"])
def test_they_run_on_many_architectures(name: str, text: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, text, data)
    verify(found, full=True)
    assert log.reports


def test_what_does_not_fit_is_said(tiny_model: Program) -> None:
    _, log = run(tiny_model, "svd{share=0.01}", DATA)
    assert {d.site for d in log.diagnostics if "no product" in d.reason} == set(SITES)
    for text in ("svd{share=0}", "svd{share=1}", "svd{multiple=0}", "lowrank{ratio=2}"):
        with pytest.raises(OptionError):
            parse(text)
