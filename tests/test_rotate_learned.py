"""`rotate{learn}`: rotations learned for rounded activations are orthogonal, exact, stored as trained, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ir.errors import UsageError
from ir.execute import empty_inputs
from ir.program import Program
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.equiv.turns import cayley
from passes.learned_rotation import composed, starts
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from passes.rotation import RotationPlan, plan_rotation, write_rotation
from passes.training.loss import teacher_loss
from tests.architectures import traced
from tests.rotation_cases import error, folded, ops, sites_of
from tests.solver_problems import draw
from tests.watch import batches

DATA = batches((16, 24), vocab=96)
OPTIONS = "residual learn=2 rate=1e-2"
ROUNDED = "act{bits=3},kv{bits=3}"


def run(name: str, options: str, work: Path | None = None) -> tuple[Program, Log]:
    program, log = traced(name)[0], Log()
    pipeline = parse(f"fold,rotate{{{options}}},{ROUNDED}")
    reports = run_pipeline(program, pipeline, Context(log=log, calibration=DATA, work=work), Settings(verify="full"))
    assert reports[1].probe_error is not None and reports[1].probe_error < 1e-4
    return program, log


def losses(log: Log) -> tuple[float, float]:
    (row,) = [r for r in log.reports if r.by == "rotate" and "loss_before" in r.figures]
    return row.figures["loss_before"], row.figures["loss_after"]


def judged(found: Program, wanted: Program) -> float:
    """KL of predictions on the samples that are kept for judging: an eighth."""
    ids = DATA[0][-2:]
    with torch.no_grad():
        logits = [p.module()(*empty_inputs(p, ids).values())[0] for p in (found, wanted)]
    return float(teacher_loss(*logits))


def test_cayley_gives_orthogonal_matrices_and_their_gradients() -> None:
    entries = 3 * draw(2, 5, 5, seed=1)
    found = cayley(entries)
    torch.testing.assert_close(found @ found.mT, torch.eye(5, dtype=torch.float64).expand(2, 5, 5), rtol=0, atol=1e-12)
    assert (torch.linalg.det(found) > 0).all() and torch.equal(cayley(torch.zeros(3, 3)), torch.eye(3))
    assert torch.autograd.gradcheck(cayley, (entries.requires_grad_(),))


@pytest.mark.parametrize(
    ("name", "options"), [("llama", "residual "), ("llama_untied", "residual "), ("qwen2", "residual "), ("llama", "")]
)
def test_learned_rotations_are_exact_and_better(name: str, options: str) -> None:
    found, log = run(name, f"{options}learn=3 rate=1e-2")
    before, after = losses(log)
    assert after < before
    plain, _ = run(name, options)
    assert judged(plain, traced(name)[0]) == pytest.approx(before, rel=1e-3)
    assert judged(found, traced(name)[0]) == pytest.approx(after, rel=1e-3)


def planned(program: Program) -> RotationPlan:
    return plan_rotation(program, sites_of(program), 0, residual=True)


@pytest.mark.parametrize(("name", "left"), [("llama", 2), ("llama_untied", 2), ("qwen2", 2), ("gemma", 2)])
def test_the_function_stays_under_nasty_weights(name: str, left: int) -> None:
    program = folded(name)
    entries = {key: 0.5 * draw(*t.shape, seed=i) for i, (key, t) in enumerate(starts(planned(program)).items())}
    turned, other = program.clone(), program.clone()
    write_rotation(turned, composed(planned(turned), entries), "test")
    write_rotation(other, planned(other), "test")
    verify(turned, full=True)
    assert error(turned, program) < 1e-10
    assert all(not torch.equal(turned.params.get(s.weight), other.params.get(s.weight)) for s in sites_of(program))
    assert len(ops(turned)) == left  # what leaves the gates: the ends of the stream are matrix products now
    name = sites_of(program)[3].weight
    turned.params.put(name, other.params.get(name), "test")
    assert error(turned, program) > 1e-3


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, said = run("llama", OPTIONS)
    progress, calls = Log.progress, []

    def interrupting(self: Log, total: int, label: str) -> Any:
        step = progress(self, total, label)

        def stepped() -> None:
            calls.append(label)
            if label == "rotate" and calls.count(label) == 20:  # in the second epoch
                raise KeyboardInterrupt
            step()

        return stepped

    monkeypatch.setattr(Log, "progress", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run("llama", OPTIONS, tmp_path)
    again, log = run("llama", OPTIONS, tmp_path)
    assert calls.count("rotate") == 20 + 14 and losses(log) == losses(said)
    assert all(torch.equal(again.params.get(n), wanted.params.get(n)) for n in wanted.params)


def test_something_must_round_what_is_turned() -> None:
    with pytest.raises(UsageError, match="nothing to learn rotations for"):
        run_pipeline(traced("llama")[0], parse("fold,rotate{learn=1},rtn"), Context(calibration=DATA), Settings())


@pytest.mark.parametrize("options", ["learn=-1", "batch=0", "rate=2.0", "learn=1 side=both"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(OptionError, match="of pass rotate"):
        parse(f"rotate{{{options}}}")
