"""Training end to end: the whole program as a function of its weights, and scales tuned towards its predictions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import passes.tune_scales as module
from ir.analysis import blocks
from ir.execute import empty_inputs
from ir.program import Program, flat_name
from passes.base import Context, Log
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from passes.training.loss import next_token_loss, teacher_loss
from passes.training.whole import whole_function
from tests.architectures import doubled, ids_for, traced
from tests.coded_sites import coded, parts, same_parts
from tests.shiftadd_runs import SITES
from tests.tiny_model import tiny_program
from tests.watch import batches

DATA = batches((16, 32), vocab=96)
UNIFORM = "rtn{bits=3 group=16}"
PLANES = "shiftadd{bits=2 group=16 rounds=1 starts=1 iterations=1 polish=0 sweeps=0}"


def run(pipeline: str, work: Path | None = None) -> tuple[Program, Log]:
    """The tiny model after a pipeline, and what was said."""
    program, log = tiny_program(), Log()
    run_pipeline(program, parse(pipeline), Context(log=log, calibration=DATA, work=work), Settings(verify="full"))
    return program, log


def divergence(found: Program) -> float:
    """KL of the float tiny model from a program, in nats a token, on the calibration data."""
    with torch.no_grad():
        logits = [p.module()(*empty_inputs(p, DATA[0]).values())[0] for p in (found, tiny_program())]
    return float(teacher_loss(*logits))


def figures(log: Log) -> list[tuple[str, float, float]]:
    rows = [r for r in log.reports if r.by == "tune-scales"]
    return [(r.site, r.figures["loss_before"], r.figures["loss_after"]) for r in rows]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2", "opt", "gemma2", "neox"])
def test_it_is_the_program_and_has_its_gradients(name: str) -> None:
    program, ids = doubled(traced(name)[0]), ids_for()
    free = [[n for n in block.region(program).params if n.endswith("weight")] for block in blocks(program)]
    leaves = {n: program.params.get(n).clone().requires_grad_() for names in free for n in names}
    function = whole_function(program, free)
    values = function.start(ids)
    given = [partial(lambda names: {n: leaves[n] for n in names}, names) for names in free]
    logits = function.logits(function.exits(given, values), values)
    module = program.module()
    for n, leaf in leaves.items():
        owner, _, key = flat_name(n).rpartition(".")
        module.get_submodule(owner)._buffers[key] = leaf
    wanted = module(*empty_inputs(program, ids, torch.float64).values())[0]
    torch.testing.assert_close(logits, wanted, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(next_token_loss(x, ids), list(leaves.values())) for x in (logits, wanted))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("coder", [UNIFORM, PLANES])
def test_predictions_come_closer_and_codes_stay(coder: str) -> None:
    before, _ = run(coder)
    after, log = run(f"{coder},tune-scales{{loss=kl rate=3e-2 epochs=3}}")
    ((site, start, end),) = figures(log)
    assert site == after.name and end < start
    assert divergence(after) < 0.9 * divergence(before)
    for name in SITES:
        old, new = parts(before, coded(before)[name])[0], parts(after, coded(after)[name])[0]
        assert old is not None and new is not None and torch.equal(old, new)
    assert not all(same_parts(before, after, name) for name in SITES)


def test_the_reported_loss_is_that_of_the_stored_program() -> None:
    data = DATA[0][-2:]  # an eighth of the samples is judged
    after, log = run(f"{UNIFORM},tune-scales{{loss=kl rate=1e-2 epochs=3 gains}}")
    with torch.no_grad():
        logits = [p.module()(*empty_inputs(p, data).values())[0] for p in (after, tiny_program())]
    assert figures(log)[0][2] == pytest.approx(float(teacher_loss(*logits)), rel=1e-4)


def test_towards_the_text() -> None:
    _, log = run(f"{UNIFORM},tune-scales{{loss=ce rate=1e-2 epochs=5}}")
    ((_, start, end),) = figures(log)
    assert end < start


def test_both_scopes_in_one_pipeline() -> None:
    _, log = run(f"{UNIFORM},tune-scales{{epochs=2 rate=1e-2}},tune-scales{{loss=kl epochs=2 rate=1e-2}}")
    assert [site for site, _, _ in figures(log)] == ["model.layers.0", "model.layers.1", tiny_program().name]


def test_what_is_skipped_stays() -> None:
    before, _ = run(UNIFORM)
    after, log = run(f"{UNIFORM},tune-scales{{loss=kl epochs=2 rate=1e-2 skip=[*.layers.0.*]}}")
    assert all(same_parts(before, after, name) for name in SITES[:7])
    assert not all(same_parts(before, after, name) for name in SITES[7:])
    assert all("names it" in d.reason for d in log.diagnostics if d.by == "tune-scales")


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = f"{UNIFORM},tune-scales{{loss=kl epochs=2 rate=1e-2}}"
    wanted, said = run(pipeline)
    progress, calls = Log.progress, []

    def interrupting(self: Log, total: int, label: str) -> Any:
        step = progress(self, total, label)

        def stepped() -> None:
            calls.append(label)
            if label == "tune-scales" and calls.count(label) == 20:  # in the second epoch
                raise KeyboardInterrupt
            step()

        return stepped

    monkeypatch.setattr(Log, "progress", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, work=tmp_path)
    again, log = run(pipeline, work=tmp_path)
    assert calls.count("tune-scales") == 20 + 14 and figures(log) == figures(said)
    assert all(torch.equal(again.params.get(n), wanted.params.get(n)) for n in wanted.params)


def test_nothing_to_train_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "whole_problem", None)
    _, log = run(f"{UNIFORM},tune-scales{{loss=kl skip=[*]}}")
    assert not figures(log) and sum("names it" in d.reason for d in log.diagnostics) == len(SITES)
