"""`affine`: any invertible matrix a head leaves the function as it is, learned ones make rounding cheaper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.affine as module
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from passes.affine import Affine, fold_heads, moved
from passes.base import Context, Log, OptionError
from passes.equiv.heads import ValueHeads, value_heads
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced
from tests.shiftadd_runs import DATA
from tests.solver_problems import draw


def heads_of(program: Program) -> list[ValueHeads]:
    """The heads whose values can change their basis."""
    return value_heads(program, module._own(program))[0]


def matrices(heads: ValueHeads, seed: int) -> Tensor:
    """Well conditioned random matrices, one a head."""
    return (
        torch.eye(heads.width, dtype=torch.float64) + 0.3 * draw(heads.count, heads.width, heads.width, seed=seed) / 4
    )


def learned(program: Program, work: Path | None = None, **options: Any) -> tuple[Program, Log]:
    """A copy of a program after the pass, and what it said."""
    program, log = program.clone(), Log("affine")
    chosen = Affine(**{"group": 16, "bits": 3, "epochs": 3, **options})
    chosen.validate()
    chosen.run(program, Context(log=log, calibration=DATA, work=work))
    return program, log


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "starcoder2", "bloom", "mixtral"])
def test_any_invertible_matrix_leaves_the_function(name: str) -> None:
    program = doubled(traced(name, 1)[0])
    found, ids = heads_of(program), ids_for()
    assert found
    before = prefill_and_decode(program, ids)
    for i, heads in enumerate(found):
        fold_heads(program, heads, matrices(heads, i), "test")
    verify(program, full=True)
    after = prefill_and_decode(program, ids)
    assert relative_error(after, before) < 1e-10


def test_a_matrix_on_one_side_changes_the_function() -> None:
    program, ids = doubled(traced("llama", 1)[0]), ids_for()
    (heads,) = heads_of(program)
    before = prefill_and_decode(program, ids)
    name = str(heads.sources[0].node.args[1].target)  # type: ignore[union-attr]
    found = moved(heads, matrices(heads, 0), {n: program.params.get(n) for n in program.params})
    program.params.put(name, found[name], "test")
    assert relative_error(prefill_and_decode(program, ids), before) > 0.01


def test_ones_change_no_bit() -> None:
    program = traced("llama", 1)[0]
    (heads,) = heads_of(program)
    before = {n: program.params.get(n) for n in program.params}
    fold_heads(program, heads, torch.eye(heads.width, dtype=torch.float64).expand(heads.count, -1, -1), "test")
    assert all(torch.equal(program.params.get(n), t) for n, t in before.items())


def test_gradients_pass_through_the_fold() -> None:
    program = doubled(traced("gpt2", 1)[0])
    (heads,) = heads_of(program)
    names = [n for slot in (*heads.sources, *heads.sinks) for n in module._names(slot.node) if n]
    params = {n: program.params.get(n) for n in names}
    entries = matrices(heads, 3)[:, :3, :3].clone().requires_grad_()

    def path(part: Tensor) -> Tensor:
        whole = torch.eye(heads.width, dtype=torch.float64).repeat(heads.count, 1, 1)
        whole = torch.cat([torch.cat([part, whole[:, :3, 3:]], 2), whole[:, 3:]], 1)
        found = moved(heads, whole, params)
        return torch.stack(
            [(found[n] * (1 + torch.arange(found[n].numel()).view_as(found[n]).cos())).sum() for n in found]
        )

    assert torch.autograd.gradcheck(path, (entries,), fast_mode=True)


def test_learning_makes_rounding_cheaper_and_changes_no_function(tiny_model: Program) -> None:
    found, log = learned(tiny_model, rate=1e-2)
    ids = DATA[0][:, :10]
    assert relative_error(prefill_and_decode(found, ids), prefill_and_decode(tiny_model, ids)) < 1e-3
    rows = [r.figures for r in log.reports]
    assert len(rows) == 2 and all(r["loss_after"] <= r["loss_before"] for r in rows)
    assert any(r["loss_after"] < r["loss_before"] for r in rows)
    assert len(list(found.graph.nodes)) == len(list(tiny_model.graph.nodes))


def test_it_composes_in_a_pipeline(tiny_model: Program) -> None:
    program = tiny_model.clone()
    ctx = Context(calibration=DATA)
    run_pipeline(
        program, parse("affine{bits=3 group=16 epochs=1},fold,rtn{bits=3 group=16}"), ctx, Settings(verify="full")
    )
    assert program.level == "compressed"


def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, said = learned(tiny_model)
    learn = Affine._learned

    def interrupted(self: Any, program: Any, found: Any, walked: Any, ctx: Any) -> Any:
        if walked.block.index == 1:
            raise KeyboardInterrupt
        return learn(self, program, found, walked, ctx)

    monkeypatch.setattr(Affine, "_learned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learned(tiny_model, tmp_path)
    monkeypatch.setattr(Affine, "_learned", learn)
    again, log = learned(tiny_model, tmp_path)
    assert all(torch.equal(again.params.get(n), wanted.params.get(n)) for n in wanted.params)
    assert dump(again) == dump(wanted) and log.reports == said.reports


def test_a_block_without_a_finite_loss_is_left_and_named(tiny_model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "token_loss", lambda found, target: (found - target).sum() * math.nan)
    found, log = learned(tiny_model, epochs=6)
    assert sum("not finite" in d.reason for d in log.diagnostics) == 2
    assert all(torch.equal(found.params.get(n), tiny_model.params.get(n)) for n in tiny_model.params)


def test_a_singular_matrix_is_no_error_but_never_finite() -> None:
    program = traced("llama", 1)[0]
    (heads,) = heads_of(program)
    params = {n: program.params.get(n) for n in program.params}
    found = moved(heads, torch.zeros(heads.count, heads.width, heads.width), params)
    assert not all(bool(torch.isfinite(tensor).all()) for tensor in found.values())


@pytest.mark.parametrize(("option", "value"), [("bits", 1), ("group", -1), ("epochs", -1), ("batch", 0), ("rate", 2.0)])
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"option {option} of pass affine"):
        parse(f"affine{{{option}={value}}}")


def test_the_plan_names_what_reads_values(tiny_model: Program) -> None:
    assert [r.site for r in Affine().plan(tiny_model)] == [f"model.layers.{k}.self_attn.o_proj" for k in range(2)]
