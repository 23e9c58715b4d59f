"""`slorb`: branches beside masked linears, how they start, what kept weights do beside them, how they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ir.analysis import is_branch, linear_sites
from ir.decode import codes_of
from ir.errors import UsageError
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes
from ir.program import PATH, Program
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.pipeline import parse
from passes.slorb import Slorb
from passes.sparsify.branches import BRANCHES, branch_of
from passes.sparsify.lowrank import beside, completed, group_means, spread_sums, truncated
from passes.sparsify.pattern import Pattern, nm_mask
from passes.sparsify.sparsegpt import sparsegpt, under_mask
from tests.architectures import ids_for, traced
from tests.coded_sites import coded
from tests.pipeline_runs import LONG
from tests.pipeline_runs import run as run_text
from tests.shiftadd_runs import DATA, SITES, error
from tests.solver_problems import draw
from tools.storage import storage

TWO_FOUR = Pattern(2, 4)


def run(program: Program, text: str, data: Any = DATA, work: Path | None = None) -> tuple[Program, Log]:
    """A pipeline's program and log, on the data that most tests here take."""
    return run_text(program, text, data, work)


def masked(rows: int = 12, inputs: int = 64) -> tuple[Tensor, Tensor]:
    weight = draw(rows, inputs)
    return weight, nm_mask(weight.abs(), TWO_FOUR)


def test_means_as_published_keep_the_sum_of_what_is_dropped() -> None:
    weight, mask = masked()
    up = group_means(weight, mask, 16, dropped_only=False)
    lost = torch.where(mask, 0.0, weight)
    torch.testing.assert_close(spread_sums(up, 16).unflatten(1, (-1, 16)).sum(-1), lost.unflatten(1, (-1, 16)).sum(-1))
    x = draw(5, 64, seed=4)
    sums = x.unflatten(1, (-1, 16)).sum(-1)
    torch.testing.assert_close(sums @ up.T, x @ spread_sums(up, 16).T)


def test_the_best_sums_beside_weights_that_give_way_leave_less() -> None:
    weight, mask = masked()

    def left(dropped_only: bool, kept_gives_way: bool) -> float:
        branch = spread_sums(group_means(weight, mask, 8, dropped_only), 8)
        kept = beside(weight, mask, branch) if kept_gives_way else torch.where(mask, weight, 0.0)
        return float((weight - kept - branch).square().sum())

    published, ours = left(False, False), left(True, True)
    nothing = float(torch.where(mask, 0.0, weight).square().sum())
    assert ours < published < nothing
    up = group_means(weight, mask, 8, True)
    for step in (1e-3, -1e-3):  # the best fit: any other sum leaves more
        other = spread_sums(up + step, 8)
        assert float((weight - beside(weight, mask, other) - other).square().sum()) > ours


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_the_closest_matrix_of_a_rank(shape: tuple[int, int]) -> None:
    matrix = draw(*shape)
    up, down = truncated(matrix, 5)
    assert up.shape == (shape[0], 5) and down.shape == (5, shape[1])
    values = torch.linalg.svdvals(matrix)
    assert float((matrix - up @ down).square().sum()) == pytest.approx(float(values[5:].square().sum()))


def test_rounds_of_completion_leave_less_where_nothing_is_kept() -> None:
    weight, mask = masked(24, 64)
    energy = torch.linspace(0.1, 4, 64).double()
    lost = []
    for rounds in (0, 2, 8):
        up, down = completed(weight, mask, 4, energy, rounds)
        off = torch.where(mask, 0.0, weight - up @ down)
        lost.append(float((off.square() * energy).sum()))
    nothing = float((torch.where(mask, 0.0, weight).square() * energy).sum())
    assert lost[2] < lost[1] < lost[0] < nothing


def test_a_matrix_of_that_rank_is_found_from_what_is_dropped() -> None:
    whole = draw(32, 2) @ draw(2, 64, seed=5)
    mask = nm_mask(draw(32, 64, seed=9).abs(), TWO_FOUR)
    up, down = completed(whole, mask, 2, None, 200)
    assert float((up @ down - whole).norm() / whole.norm()) < 0.02


def test_kept_weights_under_a_given_mask_are_those_of_sparsegpt() -> None:
    weight, x = draw(9, 64), draw(300, 64, seed=2) @ draw(64, 64, seed=3)
    found, mask = sparsegpt(weight, x.T @ x, TWO_FOUR)
    again = under_mask(weight, x.T @ x, mask)
    torch.testing.assert_close(again, found, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("start", ["svd", "dropped", "mean"])
def test_branches_are_beside_every_masked_linear(tiny_model: Program, start: str) -> None:
    program, log = run(tiny_model, f"sparse{{method=wanda}},slorb{{k=8 start={start}}},pack{{values=float32}}")
    verify(program, full=True)
    assert BRANCHES not in program.attributes
    rows = [r for r in log.reports if r.by == "slorb"]
    assert sorted(r.site for r in rows) == sorted(SITES)
    assert all(r.figures["rel_error"] < r.figures["rel_error_before"] for r in rows)
    branches = [n for n in program.graph.nodes if n.op == "call_function" and is_branch(n)]
    assert {str(n.meta[PATH]).removesuffix(".branch") for n in branches} == set(SITES)
    assert all(isinstance(codes_of(n, program.params.get), QuantCodes) for n in branches if "quant" in str(n.target))


def test_the_better_the_start_the_closer_the_model(tiny_model: Program) -> None:
    plain = error(run(tiny_model, "sparse{method=wanda}")[0], tiny_model)
    found = {
        text: error(run(tiny_model, f"sparse{{method=wanda}},slorb{{k=8 {text}}}")[0], tiny_model)
        for text in ("start=svd", "start=svd refit=false", "start=dropped refit=false", "start=mean refit=false")
    }
    assert found["start=svd"] < found["start=svd refit=false"] < plain, (found, plain)
    assert found["start=svd"] < found["start=dropped refit=false"], found


def test_bits_count_branches_and_no_weights_for_them(tiny_model: Program) -> None:
    plain, _ = run(tiny_model, "sparse{method=wanda}")
    with_branches, log = run(tiny_model, "sparse{method=wanda},slorb{k=8}")
    before, after = storage(plain, written=True), storage(with_branches, written=True)
    assert after.total_weights == before.total_weights
    extra = sum(r.figures["bytes"] for r in log.reports if r.by == "pack" and r.figures["weights"] == 0)
    assert extra > 0 and after.total_bytes == before.total_bytes + extra
    assert before.compressed_bits is not None and after.compressed_bits is not None
    weights = sum(s.weights for s in after.sites if s.compressed)
    assert after.compressed_bits == pytest.approx(before.compressed_bits + 8 * extra / weights)


@pytest.mark.parametrize("quant", ["rtn{bits=4 group=16}", "gptq{bits=4 group=16}", "shiftadd{bits=3 group=16}"])
def test_codes_beside_branches(tiny_model: Program, quant: str) -> None:
    bare, _ = run(tiny_model, f"sparse{{method=wanda}},{quant}")
    found, _ = run(tiny_model, f"sparse{{method=wanda}},slorb{{k=8}},{quant}")
    verify(found, full=True)
    for site in SITES:
        node = next(n for n in coded(found).values() if n.meta[PATH] == site and not is_branch(n))
        codes = codes_of(node, found.params.get)
        assert isinstance(codes, SparseCodes) and isinstance(codes.kept, (QuantCodes, ShiftCodes))
    assert error(found, tiny_model) < error(bare, tiny_model)


def test_ast_trains_branches(tiny_model: Program) -> None:
    exact, begun = "pack{values=float32 branches=32}", "sparse{method=magnitude},slorb{k=8 refit=false}"
    start, _ = run(tiny_model, f"{begun},{exact}", LONG)
    found, log = run(tiny_model, f"{begun},ast{{rate=3e-4}},{exact}", LONG)
    names = [s.weight for s in linear_sites(found, found.graph.nodes)[0] if is_branch(s.node)]
    assert len(names) == 2 * len(SITES)
    (row,) = [r.figures for r in log.reports if r.by == "ast" and "loss_after" in r.figures]
    assert row["loss_after"] < row["loss_before"]
    assert all(not torch.equal(found.params.get(n), start.params.get(n)) for n in names)


def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "sparse{method=wanda},slorb{k=8}"
    whole, log = run(tiny_model, text)
    seen, fit = 0, Slorb._fit

    def failing(self: Slorb, *args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > 9:
            raise KeyboardInterrupt
        return fit(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Slorb, "_fit", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, text, work=tmp_path)
    again, said = run(tiny_model, text, work=tmp_path)
    assert set(again.params) == set(whole.params)
    assert all(torch.equal(again.params.get(n), whole.params.get(n)) for n in whole.params)
    assert [(r.site, r.figures) for r in said.reports] == [(r.site, r.figures) for r in log.reports]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
@pytest.mark.parametrize("start", ["svd", "dropped"])
def test_it_runs_on_many_architectures(name: str, start: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, f"sparse,slorb{{start={start}}}", data)
    verify(found, full=True)
    assert [r for r in log.reports if r.by == "slorb"]


def test_it_needs_masks_of_the_same_run_and_inputs_k_divides(tiny_model: Program) -> None:
    from ir.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="pass slorb cannot run"):
        run(tiny_model, "slorb")
    program = tiny_model.clone()
    with pytest.raises(UsageError, match="weights that masks dropped"):
        Slorb().run(program, Context(calibration=DATA))
    found, log = run(tiny_model, "sparse{method=magnitude},slorb{k=7}")
    assert {d.site for d in log.diagnostics if "no multiple of k=7" in d.reason} == set(SITES)
    assert branch_of(found, linear_sites(tiny_model, tiny_model.graph.nodes)[0][0]) is None
    with pytest.raises(OptionError):
        parse("slorb{k=1}")
    with pytest.raises(OptionError):
        parse("pack{branches=1}")
