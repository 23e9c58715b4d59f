"""`tune-scales`: blocks come closer to the float model's, codes stay, what is trained is stored, and runs resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.training.problems as problems
import passes.tune_scales as module
from ir.decode import codes_of
from ir.errors import UnsupportedError, UsageError
from ir.ops.nested import NestedCodes
from ir.program import Program, is_call
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.manager import Settings, run_pipeline
from passes.pipeline import check, parse, schedule
from passes.training.scales import CodedWeight, coded_weight
from passes.tune_scales import TuneScales
from tests.coded_sites import coded, decoded, parts, same_parts
from tests.shiftadd_runs import SITES, error
from tests.solver_problems import draw
from tests.tiny_model import tiny_program
from tests.watch import batches

DATA = batches((4, 32), (4, 32), vocab=96)
CODERS = {
    "uniform": "rtn{bits=3 group=16}",
    "symmetric": "rtn{bits=3 group=16 symmetric}",
    "powers": "rtn{bits=3 group=16 terms=2}",
    "planes": "shiftadd{bits=2 group=16 rounds=1 starts=1 iterations=1 polish=0 sweeps=0}",
    "rows": "shiftadd{bits=2 group=0 rounds=1 starts=1 iterations=1 polish=0 sweeps=0}",
    "trits": "shiftadd{bits=2 group=16 code=trits rounds=1 starts=1 iterations=1 polish=0 sweeps=0}",
    "tied": "shiftadd{bits=2 group=16 code=trits31 rounds=1 starts=1 iterations=1 polish=0 sweeps=0}",
    "real": "shiftadd{bits=2 group=16 terms=0 rounds=1 starts=1 iterations=1 polish=0 sweeps=0}",
    "nested": "shiftadd{bits=3 group=16 nested=[2 3] rounds=1 starts=1 iterations=1 polish=0 sweeps=0}",
}


def run(pipeline: str, data: Any = DATA, work: Path | None = None, seed: int = 0) -> tuple[Program, Log]:
    """The tiny model after a pipeline, and what was said."""
    program, log = tiny_program(), Log()
    ctx = Context(seed=seed, log=log, calibration=data, work=work)
    run_pipeline(program, parse(pipeline), ctx, Settings(verify="full"))
    return program, log


def losses(log: Log) -> list[tuple[float, float]]:
    """Loss before and after of the blocks."""
    return [(r.figures["loss_before"], r.figures["loss_after"]) for r in log.reports if r.by == "tune-scales"]


def views(kind: str) -> list[tuple[CodedWeight, Tensor]]:
    """The coded weights of a program, each with the weight it decodes to, float64."""
    program, _ = run(CODERS[kind])
    found = []
    for node in coded(program).values():
        codes = codes_of(node, program.params.get)
        codes = codes.at(codes.precisions[-1]) if isinstance(codes, NestedCodes) else codes
        found.append((coded_weight(codes), decoded(program, node)))
    return found


@pytest.mark.parametrize("kind", CODERS)
def test_the_state_at_the_start_is_the_stored_weight(kind: str) -> None:
    for view, weight in views(kind):
        torch.testing.assert_close(view.weight(view.start()).double(), weight, rtol=1e-6, atol=1e-7)
        assert torch.equal(view.coded(view.start()).dequantize(torch.float64), weight)


@pytest.mark.parametrize("kind", CODERS)
def test_any_state_gives_what_it_would_store(kind: str) -> None:
    for view, _ in views(kind):
        state = {name: 0.3 * draw(*t.shape, seed=3).float() for name, t in view.start().items()}
        stored = view.coded(state)
        torch.testing.assert_close(view.weight(state), stored.dequantize(), rtol=1e-6, atol=1e-7)
        for name in ("codes", "signs", "zeros"):
            kept = getattr(view.codes, name, None)
            assert kept is None or torch.equal(getattr(stored, name), kept)


def test_gradients_are_those_of_unrounded_scales() -> None:
    program, _ = run(CODERS["real"])
    node = coded(program)[SITES[0]]
    view = coded_weight(codes_of(node, program.params.get))  # type: ignore[arg-type]
    state = {name: t.double().requires_grad_() for name, t in view.start().items()}
    grad = draw(*decoded(program, node).shape, seed=4)
    found = torch.autograd.grad((view.weight(state) * grad).sum(), list(state.values()))
    digits, g = view.digits.double(), torch.nn.functional.pad(grad, (0, 0)).unflatten(1, (-1, 16))
    by_scale = torch.stack([(digits[i] * view.worth[i] * g).sum(-1) for i in range(len(digits))], -1)
    torch.testing.assert_close(found[0], by_scale * view.scales.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], g.sum(-1) * view.scales.double().amax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "planes", "rows", "trits", "nested"])
def test_blocks_come_closer_and_codes_stay(kind: str) -> None:
    before, _ = run(CODERS[kind])
    after, log = run(f"{CODERS[kind]},tune-scales{{rate=1e-2 epochs=4}}")
    float_model = tiny_program()
    assert len(losses(log)) == 2 and all(b >= a for b, a in losses(log))
    assert error(after, float_model, DATA) < error(before, float_model, DATA)
    for site in SITES:
        old, new = coded(before)[site], coded(after)[site]
        for a, b in zip(parts(before, old)[:1], parts(after, new)[:1], strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]
        stored = [
            sum(t.numel() * t.element_size() for t in parts(p, n) if t is not None)
            for p, n in ((before, old), (after, new))
        ]
        assert stored[0] == stored[1]
    assert any(not same_parts(before, after, site) for site in SITES)


def test_the_target_is_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    walk = module.walk
    monkeypatch.setattr(module, "walk", lambda *args: seen.append(args[-1]) or walk(*args))
    program, log = run(f"{CODERS['uniform']},tune-scales{{epochs=0}}")
    assert not coded(seen[0]) and len(coded(program)) == len(SITES)
    assert all(before > 1e-3 for before, _ in losses(log))


def test_without_epochs_nothing_changes() -> None:
    before, _ = run(CODERS["planes"])
    after, _ = run(f"{CODERS['planes']},tune-scales{{epochs=0}}")
    assert all(same_parts(before, after, site) for site in SITES)


def test_gains_are_trained_when_asked_to() -> None:
    norms = [n for n in tiny_program().params if n.endswith("layernorm.weight")]
    plain, _ = run(f"{CODERS['uniform']},tune-scales{{epochs=3 rate=1e-2}}")
    found, log = run(f"{CODERS['uniform']},tune-scales{{epochs=3 rate=1e-2 gains}}")
    original = tiny_program()
    assert all(torch.equal(plain.params.get(n), original.params.get(n)) for n in norms)
    assert any(not torch.equal(found.params.get(n), original.params.get(n)) for n in norms)
    assert all(b >= a for b, a in losses(log))


@pytest.mark.parametrize("options", ["epochs=2", "epochs=2 gains"])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = f"fold,{CODERS['planes']},tune-scales{{{options}}}"
    wanted, said = run(pipeline)
    block_problem = module.block_problem

    def interrupted(weights: Any, walked: Any, *rest: Any) -> Any:
        if walked.block.index == 1:
            raise KeyboardInterrupt
        return block_problem(weights, walked, *rest)

    monkeypatch.setattr(module, "block_problem", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, work=tmp_path)
    trained: list[int] = []

    def counted(weights: Any, walked: Any, *rest: Any) -> Any:
        trained.append(walked.block.index)
        return block_problem(weights, walked, *rest)

    monkeypatch.setattr(module, "block_problem", counted)
    again, log = run(pipeline, work=tmp_path)
    assert trained == [1] and losses(log) == losses(said)
    assert sorted(again.params) == sorted(wanted.params)
    assert all(torch.equal(again.params.get(n), wanted.params.get(n)) for n in wanted.params)


def test_rotated_and_mixed_sites_are_tuned() -> None:
    program, log = run(f"{CODERS['rows'].replace('{', '{basis=rotated ')},tune-scales{{epochs=2 rate=1e-2}}")
    assert any(is_call(n, torch.ops.nomul.hadamard) for n in program.graph.nodes)
    assert all(b >= a for b, a in losses(log))
    found, log = run("gptq{bits=3 group=16 skip=[*.layers.0.*]},shiftadd{bits=2 group=16},tune-scales{epochs=1}")
    assert len(coded(found)) == len(SITES) and len(losses(log)) == 2


def test_what_is_skipped_stays_and_blocks_without_codes_are_named() -> None:
    before, _ = run("rtn{bits=3 group=16 skip=[*.layers.1.*]}")
    after, log = run("rtn{bits=3 group=16 skip=[*.layers.1.*]},tune-scales{epochs=2 rate=1e-2 skip=[q_proj]}")
    assert same_parts(before, after, SITES[0]) and not same_parts(before, after, SITES[1])
    named = {d.site: d for d in log.diagnostics if d.by == "tune-scales"}
    assert named[SITES[0]].asked and "none of its linears is coded" in named["model.layers.1"].reason


def test_a_block_that_cannot_be_trained_keeps_its_scales_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "token_loss", lambda found, target: (found - target).sum() * math.nan)
    before, _ = run(CODERS["uniform"])
    after, log = run(f"{CODERS['uniform']},tune-scales{{epochs=6}}")
    assert all(same_parts(before, after, site) for site in SITES)
    assert [d.site for d in log.diagnostics if "not finite" in d.reason] == ["model.layers.0", "model.layers.1"]


def test_it_needs_codes_and_the_float_model() -> None:
    with pytest.raises(UnsupportedError, match="level"):
        check(schedule(parse("canon,tune-scales"), False)[0], "model", frozenset({"canonical"}))
    program, _ = run(CODERS["uniform"])
    with pytest.raises(UsageError, match="needs the float model"):
        run_pipeline(program, parse("tune-scales"), Context(calibration=DATA), Settings(verify="off"))


def test_it_is_put_behind_what_codes() -> None:
    ordered, notes = schedule(parse("tune-scales,rtn"), False)
    assert str(ordered) == "rtn,tune-scales" and "rtn -> tune-scales" in notes[0]


@pytest.mark.parametrize(("option", "value"), [("epochs", -1), ("batch", 0), ("rate", 2.0), ("last_rate", -0.5)])
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"option {option} of pass tune-scales"):
        parse(f"tune-scales{{{option}={value}}}")


def test_the_plan_names_the_coded_sites() -> None:
    program, _ = run(CODERS["uniform"])
    assert [row.site for row in TuneScales(skip=("q_proj",)).plan(program)] == [s for s in SITES if "q_proj" not in s]
    verify(program)
