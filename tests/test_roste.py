"""`roste` and `rotate{choose}`: what turns is what rounds better turned, and training sees everything rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.rotation_choice as choice
from ir.analysis import blocks
from ir.ops.hadamard import block_order
from ir.program import Program, is_call
from ir.verify import verify
from passes.base import Log, OptionError
from passes.equiv.turns import Mix, Turn, cayley, random_signs, turned_inputs, turned_weight
from passes.pipeline import parse
from tests.architectures import ids_for, traced
from tests.coded_sites import coded, same_parts
from tests.pipeline_runs import LONG, resumed, run
from tests.shiftadd_runs import SITES
from tests.solver_problems import draw
from tests.test_ast import logits
from tests.test_l4q import distance, losses_of

nomul = torch.ops.nomul
# Weights of fewer bits than activations, so that training weights can make up for what rounding loses.
QUICK = "bits=2 group=16 rate=1e-3 epochs=4"


@pytest.mark.parametrize("scale", [1.0, 0.25, 48**-0.5])
def test_turned_inputs_give_turned_weights_what_they_gave(scale: float) -> None:
    weight, x = draw(7, 48), draw(5, 48, seed=2)
    channels = torch.arange(47, -1, -1)
    order = block_order(48)
    turns = [
        Turn("cols", channels, random_signs(0, "a", 48), order, scale),
        Mix("cols", torch.arange(48), cayley(draw(4, 12, 12, seed=3))),
        Turn("rows", torch.arange(7), random_signs(0, "b", 7), 1, 1.0),
    ]
    found, rows = turned_inputs(x, turns) @ turned_weight(weight, turns).T, turned_weight((x @ weight.T).T, turns[2:]).T
    torch.testing.assert_close(found, rows, rtol=1e-12, atol=1e-12)


def errors(log: Log) -> dict[str, tuple[float, float]]:
    rows = [r for r in log.reports if "error_after" in r.figures]
    return {r.site: (r.figures["error_before"], r.figures["error_after"]) for r in rows}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_what_turns_rounds_better(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5),)
    found, log = run(program, "fold,rotate{choose=4}", data)
    torch.testing.assert_close(logits(found, data[0]), logits(program, data[0]), rtol=1e-4, atol=1e-4)
    compared = errors(log)
    left = {d.site for d in log.diagnostics if "does not lower" in d.reason}
    assert compared and left == {site for site, (before, after) in compared.items() if after >= before}
    whole, _ = run(program, "fold,rotate", data)
    if not left:
        assert sorted(found.params) == sorted(whole.params)


def test_outliers_are_turned(tiny_model: Program) -> None:
    """One channel of the values that `down_proj` reads is made loud, by weights before it."""
    program = tiny_model.clone()
    for site in (s for s in SITES if "down_proj" in s):
        up = site.replace("down_proj", "up_proj")
        weight = program.params.get(f"{up}.weight").clone()
        weight[3] *= 100.0
        program.params.put(f"{up}.weight", weight, "t")
    found, log = run(program, "fold,rotate{choose=4}", LONG[:1])
    inputs = {site: pair for site, pair in errors(log).items() if "mlp_mul" in site}
    assert len(inputs) == 2 and all(after < 0.8 * before for before, after in inputs.values())
    assert sum(is_call(n, nomul.hadamard) for n in found.graph.nodes) >= 2


@pytest.mark.parametrize(
    "part", ["residual stream", "layers_0_mlp_mul/inputs", "model.layers.1.self_attn.o_proj/values"]
)
def test_what_does_not_pay_is_left(tiny_model: Program, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parts whose error is said to grow, nothing is turned; what the stream leaves is compared by itself."""
    whole, log = run(tiny_model, "fold,rotate{choose=4}", LONG[:1])
    names, left = list(errors(log)), {d.site for d in log.diagnostics if "does not lower" in d.reason}
    calls, plain = 0, choice._total

    def worse(*args: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        return (1.0, 2.0) if names[calls - 1 : calls] == [part] else plain(*args)

    monkeypatch.setattr(choice, "_total", worse)
    found, log = run(tiny_model, "fold,rotate{choose=4}", LONG[:1])
    assert [d.site for d in log.diagnostics if "does not lower" in d.reason].count(part) == 1
    asked = list(errors(log))
    assert len(asked) == calls and set(names[: names.index(part) + 1]) <= set(asked)
    torch.testing.assert_close(logits(found, LONG[0][:2]), logits(whole, LONG[0][:2]), rtol=1e-4, atol=1e-4)
    same = all(torch.equal(found.params.get(f"{s}.weight"), whole.params.get(f"{s}.weight")) for s in SITES)
    assert same == (part in left)


@pytest.mark.parametrize("options", ["", "act=16", "kv=16", "warm=0", "act=8 kv=8"])
def test_the_program_is_what_training_ran(tiny_model: Program, options: str) -> None:
    found, log = run(tiny_model, f"fold,roste{{{QUICK} {options}}}", LONG)
    verify(found, full=True)
    before, after = losses_of(log)
    assert after < before
    assert distance(found, tiny_model) == pytest.approx(after, rel=1e-3)
    assert sorted(coded(found)) == sorted(SITES)
    nodes = [n for block in blocks(found) for n in block.nodes]
    rounded = [n for n in nodes if is_call(n, nomul.encode_tokens)]
    assert rounded and not any(is_call(n, nomul.straight_tokens) for n in nodes)
    wanted = {"act=16": 2 * 2, "kv=16": 2 * 4}.get(options, 2 * 6)
    assert len(rounded) == wanted


def test_training_under_rounding_comes_closer_than_rounding(tiny_model: Program) -> None:
    texts = [f"fold,roste{{{QUICK}}}", "fold,roste{bits=2 group=16 warm=0 epochs=0}"]
    trained, started = (distance(run(tiny_model, text, LONG)[0], tiny_model) for text in texts)
    assert trained < 0.9 * started


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = resumed(tiny_model, f"fold,roste{{{QUICK} warm=0}}", LONG, tmp_path, stop, monkeypatch)
    assert all(same_parts(runs.again, runs.whole, site) for site in SITES)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_it_runs_on_many_architectures(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, "fold,roste{group=8 epochs=1 warm=1}", data)
    verify(found, full=True)
    before, after = losses_of(log)
    assert after <= before and coded(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fold,rotate{choose=1}", "neither 2..8 nor 0"),
        ("fold,roste{bits=1}", "choose"),
        ("fold,roste{act=12}", "neither 2..8 nor 16"),
        ("fold,l4q{kv=1}", "neither 2..8 nor 16"),
    ],
)
def test_options_out_of_range(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse(text)


def test_weights_alone_can_be_trained_under_codes(tiny_model: Program) -> None:
    plain: list[Tensor] = []
    for options in ("", " act=4 kv=4"):
        found, log = run(tiny_model, f"l4q{{bits=3 group=16 epochs=4{options}}}", LONG)
        before, after = losses_of(log)
        assert after < before and distance(found, tiny_model) == pytest.approx(after, rel=1e-3)
        plain.append(logits(found, LONG[0][:1]))
    assert not torch.equal(*plain)
