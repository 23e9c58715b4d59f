"""`cbq`: rounding that is learned starts from the nearest, is stored as trained, and windows of blocks resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.cbq as module
from ir.analysis import blocks
from ir.decode import codes_of
from ir.execute import empty_inputs
from ir.program import Program
from passes.base import Context, Log, OptionError
from passes.cbq import Cbq, Window
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from passes.quantize.lowrank_rounding import LowRankRounding, lowrank_rounding
from passes.quantize.uniform import searched
from tests.architectures import traced
from tests.coded_sites import coded
from tests.shiftadd_runs import SITES, error
from tests.solver_problems import draw
from tests.tiny_model import tiny_program
from tests.watch import batches, values

DATA = batches((16, 32), vocab=96)


def run(pipeline: str, work: Path | None = None, program: Program | None = None) -> tuple[Program, Log]:
    """The tiny model after a pipeline, and what was said."""
    program, log = program or tiny_program(), Log()
    run_pipeline(program, parse(pipeline), Context(log=log, calibration=DATA, work=work), Settings(verify="full"))
    return program, log


def losses(log: Log) -> list[tuple[str, float, float]]:
    return [(r.site, r.figures["loss_before"], r.figures["loss_after"]) for r in log.reports if "blocks" in r.figures]


def moved(rounding: LowRankRounding, rank: int, seed: int, size: float) -> dict[str, Tensor]:
    start = rounding.start(rank, seed)
    return {name: size * draw(*t.shape, seed=seed + i).float() for i, (name, t) in enumerate(start.items())}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group", "inputs"), [(2, 16, 48), (3, 16, 40), (4, 40, 40), (8, 64, 40)])
def test_the_start_is_the_nearest_level(bits: int, group: int, inputs: int, symmetric: bool) -> None:
    weight = draw(7, inputs, seed=3).float()
    weight[1] = 0
    weight[2] = weight[2].abs()
    found, wanted = lowrank_rounding(weight, bits, group, symmetric), searched(weight, bits, group, symmetric)
    codes = found.codes(found.start(5, 0))
    assert torch.equal(codes.codes, wanted.codes) and torch.equal(codes.scales, wanted.scales)
    assert torch.equal(codes.zeros, wanted.zeros)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_what_is_trained_is_what_is_stored(bits: int, symmetric: bool) -> None:
    found = lowrank_rounding(draw(9, 40, seed=4).float(), bits, 16, symmetric)
    for size in (0.0, 0.3, 3.0):
        state = moved(found, 3, 7, size)
        codes = found.codes(state)
        torch.testing.assert_close(found.weight(state), codes.dequantize(), rtol=1e-6, atol=0)
        assert int(codes.codes.max()) < 2**bits
    assert not torch.equal(found.codes(state).codes, found.codes(found.start(3, 7)).codes)


def test_gradients_are_those_of_soft_rounding() -> None:
    rounding = lowrank_rounding(draw(5, 32, seed=5).float(), 3, 16)
    state = {name: t.requires_grad_() for name, t in moved(rounding, 2, 9, 0.2).items()}
    grad = draw(5, 32, seed=6).float()
    found = torch.autograd.grad((rounding.weight(state) * grad).sum(), list(state.values()))
    variables = rounding.variables + state["left"] @ state["right"]
    soft = torch.sigmoid(variables) * 1.2 - 0.1
    levels = rounding.floors.flatten(1) + soft.clamp(0, 1).round()
    zeros, steps = (
        t.repeat_interleave(16, 1) for t in (rounding.zeros, (rounding.steps * state["steps"].exp()).half().float())
    )
    inside = (levels + zeros >= 0) & (levels + zeros <= 7)
    by_steps = (grad * (levels + zeros).clamp(0, 7).sub(zeros) * steps).unflatten(1, (-1, 16)).sum(-1)
    torch.testing.assert_close(found[0], by_steps, rtol=1e-2, atol=1e-5)
    slope = 1.2 * torch.sigmoid(variables) * torch.sigmoid(-variables) * ((soft > 0) & (soft < 1))
    by_variables = (grad * inside * steps * slope).detach()
    torch.testing.assert_close(found[1], by_variables @ state["right"].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], state["left"].T @ by_variables, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "size", "stride", "wanted"),
    [
        (4, 2, 1, [((0, 2), (0, 1)), ((1, 3), (1, 2)), ((2, 4), (2, 4))]),
        (5, 2, 2, [((0, 2), (0, 2)), ((2, 4), (2, 4)), ((4, 5), (4, 5))]),
        (3, 1, 1, [((0, 1), (0, 1)), ((1, 2), (1, 2)), ((2, 3), (2, 3))]),
        (2, 8, 3, [((0, 2), (0, 2))]),
        (6, 3, 2, [((0, 3), (0, 2)), ((2, 5), (2, 4)), ((4, 6), (4, 6))]),
    ],
)
def test_windows_finish_every_block_once(count: int, size: int, stride: int, wanted: list[Any]) -> None:
    found = module._windows(count, size, stride)
    assert list(found.values()) == [Window(range(*blocks), range(*finished)) for blocks, finished in wanted]
    assert sorted(i for window in found.values() for i in window.finished) == list(range(count))


@pytest.mark.parametrize("options", ["", "window=1 ", "symmetric "])
def test_blocks_come_closer_than_by_nearest_rounding(options: str) -> None:
    start, _ = run(f"cbq{{bits=2 group=16 {options}epochs=0}}")
    found, log = run(f"cbq{{bits=2 group=16 {options}epochs=6 rate=3e-2}}")
    assert all(after <= before for _, before, after in losses(log))
    assert error(found, tiny_program(), DATA) < 0.97 * error(start, tiny_program(), DATA)
    assert list(coded(found)) == list(coded(start)) == SITES
    changed = [
        not torch.equal(*(codes_of(coded(p)[site], p.params.get).codes for p in (start, found)))  # type: ignore[union-attr]
        for site in SITES
    ]
    assert any(changed)


def test_the_reported_loss_is_that_of_the_stored_codes() -> None:
    found, log = run("cbq{bits=3 group=16 epochs=2}")
    ((site, _, after),) = losses(log)
    assert site == "model.layers.0"
    exits = []
    for program in (found, tiny_program()):
        exits.append(values(program, DATA[0][-2:])[blocks(program)[-1].exit.name])
    assert after == pytest.approx(float(module.token_loss(*exits)), rel=0.05)


def test_four_blocks_in_overlapping_windows_resume_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> Program:
        return traced("llama", 4)[0].clone()

    pipeline = "cbq{bits=2 group=16 epochs=1 rate=3e-2}"
    wanted, said = run(pipeline, program=model())
    assert [site for site, _, _ in losses(said)] == [f"model.layers.{i}" for i in range(3)]
    trained, windows = Cbq._trained, []

    def interrupted(self: Cbq, program: Any, walked: Any, *rest: Any) -> Any:
        windows.append(walked.block.index)
        if windows == [0, 1, 2]:
            raise KeyboardInterrupt
        return trained(self, program, walked, *rest)

    monkeypatch.setattr(Cbq, "_trained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, tmp_path, model())
    again, log = run(pipeline, tmp_path, model())
    assert windows == [0, 1, 2, 2]
    assert [(r.site, dict(r.figures)) for r in log.reports] == [(r.site, dict(r.figures)) for r in said.reports]
    assert all(torch.equal(again.params.get(n), wanted.params.get(n)) for n in wanted.params)


def test_what_is_skipped_stays_float_and_a_block_without_sites_is_passed() -> None:
    found, log = run("cbq{bits=3 group=16 epochs=1 skip=[*.layers.0.* *.q_proj]}")
    assert sorted(coded(found)) == sorted(s for s in SITES if "layers.1" in s and "q_proj" not in s)
    assert all(d.asked for d in log.diagnostics if "layers" in d.site)
    with torch.no_grad():
        assert torch.isfinite(found.module()(*empty_inputs(found, DATA[0]).values())[0]).all()


def test_widths_of_the_pass_bits_are_taken() -> None:
    found, _ = run("bits{target=3.5 choices=[2 4] method=loss},cbq{group=16 epochs=1}")
    assert {codes_of(coded(found)[s], found.params.get).bits for s in SITES} == {2, 4}  # type: ignore[union-attr]


@pytest.mark.parametrize("options", ["bits=9", "window=0", "stride=3", "stride=0", "rank=-1", "rate=2.0", "epochs=-1"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(OptionError, match="of pass cbq"):
        parse(f"cbq{{{options}}}")


def test_the_plan_names_bits_and_bytes() -> None:
    rows = Cbq(bits=3, group=16).plan(tiny_program())
    found, _ = run("cbq{bits=3 group=16 epochs=0}")
    assert [r.site for r in rows] == SITES
    for row in rows:
        codes = codes_of(coded(found)[row.site], found.params.get)
        assert row.figures["bytes"] == codes.stored_bits / 8
