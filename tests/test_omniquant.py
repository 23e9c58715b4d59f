"""`omniquant`: what is trained is what is stored and runs, runs repeat and resume, nothing is left alone silently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import passes.learned_block as module
from ir.analysis import linear_sites
from ir.edit import Editor
from ir.errors import UnsupportedError, UsageError
from ir.program import Program, is_call
from ir.text import dump
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.equiv.discover import discover
from passes.fold import Fold
from passes.gptq import Gptq
from passes.manager import Settings, run_pipeline
from passes.omniquant import Omniquant
from passes.pipeline import parse
from passes.rtn import Rtn
from passes.smooth import Smooth
from tests.architectures import ids_for, traced
from tests.coded_sites import coded, decoded, same_parts, stored_bytes
from tests.golden import check_golden
from tests.shiftadd_runs import SITES, error
from tests.watch import batches, values

aten, nomul = torch.ops.aten, torch.ops.nomul
DATA = batches((4, 32), (4, 32))
OTHERS = (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))


def compress(program: Program, *, bits: int, data: Any = DATA, work: Path | None = None, **options: Any) -> Any:
    """A compressed copy of a program and what the pass said; two epochs with groups of 16."""
    program, log = program.clone(), Log("omniquant")
    chosen = Omniquant(bits=bits, **{"group": 16, "epochs": 2, **options})
    chosen.validate()
    chosen.run(program, Context(log=log, calibration=data, work=work))
    return program, log


def blocks_of(log: Log) -> list[Any]:
    """The figures of the blocks."""
    return [r.figures for r in log.reports if "loss_stored" in r.figures]


@pytest.fixture(scope="module")
def plain(tiny_model: Program) -> tuple[Program, Log]:
    return compress(tiny_model, bits=3)  # type: ignore[no-any-return]


def test_the_codes_that_are_stored_are_what_runs(plain: tuple[Program, Log]) -> None:
    program, log = plain
    program = program.clone()
    program.level = "compressed"
    verify(program, full=True)
    assert sorted(coded(program)) == sorted(SITES)
    assert {r.site for r in log.reports if "bits" in r.figures} == set(SITES)
    seen = values(program, DATA[0])
    for node in coded(program).values():
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ decoded(program, node).T, rtol=1e-5, atol=1e-5)


def test_what_was_trained_is_what_is_stored(plain: tuple[Program, Log]) -> None:
    found = blocks_of(plain[1])
    assert len(found) == 2
    for figures in found:
        assert figures["loss_stored"] == figures["loss_after"] <= figures["loss_before"]
    assert any(f["loss_after"] < f["loss_before"] for f in found)


def test_nothing_of_the_training_is_left(plain: tuple[Program, Log], tiny_model: Program) -> None:
    program, _ = plain
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert len(calls) == sum(n.op == "call_function" for n in tiny_model.graph.nodes)
    assert not any(n.startswith(("scales.", "shifts.")) for n in program.params)
    assert not program.attributes.get("equiv") and not program.attributes.get("held")


def test_figures_and_plans_are_those_of_the_stored_codes(tiny_model: Program, plain: tuple[Program, Log]) -> None:
    program, log = plain
    rows = Omniquant(bits=3, group=16).plan(tiny_model)
    planned = {row.site: row.figures["bytes"] for row in rows if row.action == "omniquant"}
    for row in log.reports:
        if "bytes" in row.figures:
            assert planned[row.site] == row.figures["bytes"] == stored_bytes(program, coded(program)[row.site])
    learned = [row.site for row in rows if row.action.startswith("learn")]
    assert learned == [g.site for g in discover(tiny_model).of("norm->linears", "v->o", "up->down")]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_comes_closer_than_rounding_to_nearest(tiny_model: Program, bits: int) -> None:
    nearest = tiny_model.clone()
    Rtn(bits=bits, group=16).run(nearest, Context(log=Log("rtn")))
    assert error(compress(tiny_model, bits=bits, epochs=4)[0], tiny_model) < 0.95 * error(nearest, tiny_model)


def test_with_nothing_to_learn_it_is_rounding_to_nearest(tiny_model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START", 40.0)
    found, _ = compress(tiny_model, bits=3, epochs=0, sites=(), clip="open")
    nearest = tiny_model.clone()
    Rtn(bits=3, group=16).run(nearest, Context(log=Log("rtn")))
    assert all(same_parts(found, nearest, site) for site in SITES)


def test_codes_by_gptq_lose_less_and_take_the_ranges_that_leave_the_block_closer(
    tiny_model: Program, plain: tuple[Program, Log]
) -> None:
    found, log = compress(tiny_model, bits=3, rounding="gptq")
    assert sorted(coded(found)) == sorted(SITES)
    assert error(found, tiny_model) < error(plain[0], tiny_model)
    # The first block was trained alike.
    assert blocks_of(log)[0]["loss_after"] == blocks_of(plain[1])[0]["loss_after"]
    tried = [r.figures for r in log.reports if "loss_learned_ranges" in r.figures]
    assert len(tried) == 2 and all(row["loss_learned_ranges"] != row["loss_searched_ranges"] for row in tried)
    for row, figures in zip(tried, blocks_of(log), strict=True):
        assert figures["loss_stored"] == pytest.approx(min(row.values()), rel=1e-5)


def test_codes_by_gptq_without_anything_learned_are_those_of_gptq(tiny_model: Program) -> None:
    found, log = compress(tiny_model, bits=3, rounding="gptq", epochs=0, sites=(), clip="open")
    alone = tiny_model.clone()
    Gptq(bits=3, group=16).run(alone, Context(log=Log("gptq"), calibration=DATA))
    tried = next(r.figures for r in log.reports if "loss_searched_ranges" in r.figures)
    assert same_parts(found, alone, SITES[0]) == (tried["loss_searched_ranges"] < tried["loss_learned_ranges"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "stablelm", "mixtral"])
@pytest.mark.parametrize("shift", [False, True])
def test_it_runs_on_many_architectures(name: str, shift: bool) -> None:
    program = traced(name, 2)[0]
    kinds = ("norm->linears", "v->o", "up->down", "fc1->fc2")
    absent = {a.site for a in discover(program).absences if a.kind in kinds}
    found, log = compress(program, bits=4, data=OTHERS, sites=kinds, shift=shift, epochs=1)
    found.level = "compressed"
    verify(found, full=True)
    sites, left = linear_sites(program, program.graph.nodes)
    assert coded(found) and len(blocks_of(log)) == 2
    named = {d.site for d in log.diagnostics}
    assert absent <= named
    assert {s.name for s in sites} == coded(found).keys() | (named & {s.name for s in sites})
    assert {name for name, _ in left} <= named
    assert all(math.isfinite(f["loss_stored"]) for f in blocks_of(log))


def test_groups_outside_the_blocks_are_named() -> None:
    program = traced("llama_untied", 2)[0]
    (head,) = discover(program).of("norm->head")
    _, log = compress(program, bits=4, data=OTHERS, sites=("norm->head",), epochs=0)
    assert any(d.site == head.site and "one repeated block" in d.reason for d in log.diagnostics)


def test_shifts_become_biases(tiny_model: Program) -> None:
    found, _ = compress(tiny_model, bits=3, shift=True, epochs=6)
    biases = [node.args[4] for node in coded(found).values() if node.args[4] is not None]
    assert biases and any(bool(found.value(b).any()) for b in biases)  # type: ignore[arg-type]
    norms = [n for n in found.calls(aten.rms_norm) if any(is_call(u, aten.add) for u in n.users)]
    assert norms
    found.level = "compressed"
    verify(found, full=True)


@pytest.mark.parametrize("options", [{}, {"shift": True, "rounding": "gptq"}])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, said = compress(tiny_model, bits=3, **options)
    solve = module.LearnedBlock.solve

    def interrupted(self: Any, scales: Any) -> Any:
        if self.walked.block.index == 1:
            raise KeyboardInterrupt
        return solve(self, scales)

    monkeypatch.setattr(module.LearnedBlock, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model, bits=3, work=tmp_path, **options)
    trained: list[int] = []

    def counted(self: Any, scales: Any) -> Any:
        trained.append(self.walked.block.index)
        return solve(self, scales)

    monkeypatch.setattr(module.LearnedBlock, "solve", counted)
    again, log = compress(tiny_model, bits=3, work=tmp_path, **options)
    assert trained == [1]
    assert all(same_parts(again, wanted, name) for name in SITES)
    assert sorted(again.params) == sorted(wanted.params)
    assert all(torch.equal(again.params.get(n), wanted.params.get(n)) for n in wanted.params)
    assert dump(again) == dump(wanted)
    assert sorted(map(str, log.reports)) == sorted(map(str, said.reports))


def test_inputs_of_zeros_end_in_finite_codes(tiny_model: Program) -> None:
    program = tiny_model.clone()
    for name in [n for n in program.params if n.endswith("layers.1.input_layernorm.weight")]:
        Editor(program, "test").param(name, torch.zeros_like(program.params.get(name)))
    found, log = compress(program, bits=3)
    assert sorted(coded(found)) == sorted(SITES)
    assert all(bool(torch.isfinite(decoded(found, node)).all()) for node in coded(found).values())
    assert any("anything but zeros" in d.reason for d in log.diagnostics)


def test_a_block_without_a_finite_loss_keeps_its_start_and_is_named(
    tiny_model: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "token_loss", lambda found, target: (found - target).sum() * math.nan)
    found, log = compress(tiny_model, bits=3, epochs=8)
    named = [d.site for d in log.diagnostics if "not finite" in d.reason]
    assert named == ["model.layers.0", "model.layers.1"]
    assert any("training ended early" in n.text for n in log.notes)
    assert all(bool(torch.isfinite(decoded(found, node)).all()) for node in coded(found).values())


def test_weights_that_are_not_finite_are_refused(tiny_model: Program) -> None:
    program = tiny_model.clone()
    name = next(n for n in program.params if n.endswith("layers.1.self_attn.q_proj.weight"))
    program.params.put(name, torch.full_like(program.params.get(name), math.nan), by="test")
    with pytest.raises(UnsupportedError, match="not finite"):
        compress(program, bits=3)


def test_widths_that_bits_chose_are_taken(tiny_model: Program) -> None:
    program = tiny_model.clone()
    program.attributes["bits"] = {SITES[0]: 2, SITES[1]: 5}
    found, _ = compress(program, bits=3, epochs=0)
    assert [coded(found)[name].args[-2] for name in SITES[:3]] == [2, 5, 3]


def test_the_pass_bits_gives_it_widths(tiny_model: Program) -> None:
    program, log = tiny_model.clone(), Log()
    ctx = Context(log=log, calibration=DATA)
    run_pipeline(program, parse("bits{target=4.5},omniquant{group=16 epochs=0}"), ctx, Settings(verify="full"))
    widths = {node.args[-2] for node in coded(program).values()}
    assert len(coded(program)) == len(SITES) and len(widths) > 1
    stored = sum(stored_bytes(program, node) for node in coded(program).values())
    assert 8 * stored <= 4.5 * sum(
        r.figures["weights"] for r in log.reports if r.by == "omniquant" and "bits" in r.figures
    )


def test_it_trains_in_the_precision_of_the_run(tiny_model: Program) -> None:
    program, log = tiny_model.clone(), Log("omniquant")
    ctx = Context(log=log, calibration=DATA, precision="bfloat16")
    Omniquant(bits=3, group=16, epochs=1).run(program, ctx)
    for figures in blocks_of(log):
        assert figures["loss_stored"] == figures["loss_after"]


def test_whole_rows_share_a_scale(tiny_model: Program) -> None:
    found, _ = compress(tiny_model, bits=4, group=0, epochs=0, symmetric=True)
    for node in coded(found).values():
        assert found.value(node.args[2]).shape[1] == 1 and node.args[3] is None  # type: ignore[arg-type]


def test_two_runs_are_the_same_and_another_seed_is_not(tiny_model: Program, plain: tuple[Program, Log]) -> None:
    again, _ = compress(tiny_model, bits=3)
    assert all(same_parts(again, plain[0], name) for name in SITES)
    program = tiny_model.clone()
    Omniquant(bits=3, group=16, epochs=2).run(program, Context(seed=1, log=Log("o"), calibration=DATA))
    assert not all(same_parts(program, plain[0], name) for name in SITES)


def test_it_composes_with_fold(tiny_model: Program) -> None:
    program = tiny_model.clone()
    Fold().run(program, Context())
    found, log = compress(program, bits=3)
    assert sorted(coded(found)) == sorted(SITES) and len(blocks_of(log)) == 2


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_activations_and_caches_are_coded_and_trained_with(tiny_model: Program, rounding: str) -> None:
    found, log = compress(tiny_model, bits=4, act=4, kv=4, rounding=rounding, epochs=2)
    found.level = "compressed"
    verify(found, full=True)
    assert len(list(found.calls(nomul.encode_tokens))) == 2 * (4 + 2)
    assert not list(found.calls(nomul.straight_tokens))
    assert {r.by for r in log.reports} == {"omniquant", "act", "kv"}
    kinds = {r.action for r in Omniquant(bits=4, kv=4, group=16).plan(tiny_model)}
    assert "learn the scales of q<->k" in kinds
    for figures in blocks_of(log):
        assert figures["loss_after"] <= figures["loss_before"]
        assert rounding == "gptq" or figures["loss_stored"] == pytest.approx(figures["loss_after"], rel=1e-5)


def test_scales_can_start_by_the_rule_of_smooth(tiny_model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START", 40.0)
    found, _ = compress(tiny_model, bits=3, init="smooth", alpha=0.7, epochs=0, sites=("norm->linears",), clip="open")
    wanted = tiny_model.clone()
    Smooth(alpha=0.7).run(wanted, Context(log=Log("smooth"), calibration=DATA))
    Fold().run(wanted, Context())
    Rtn(bits=3, group=16).run(wanted, Context(log=Log("rtn")))
    for site in SITES:
        ours, theirs = (decoded(p, coded(p)[site]) for p in (found, wanted))
        assert (ours - theirs).norm() < 0.02 * theirs.norm()  # a weight at the middle of two levels may go either way
    plain_start, _ = compress(tiny_model, bits=3, init="ones", epochs=0, sites=("norm->linears",), clip="open")
    assert not same_parts(found, plain_start, SITES[0])


def test_the_switches_of_the_release_each_change_what_is_learned(tiny_model: Program) -> None:
    options: dict[str, Any] = {"bits": 3, "init": "smooth", "sites": ("norm->linears", "v->o", "q<->k")}
    exact, log = compress(tiny_model, **options)
    for switch in ("pairs", "first", "zeros"):
        found, said = compress(tiny_model, legacy=(switch,), **options)
        assert blocks_of(said) != blocks_of(log), switch
        assert not all(same_parts(found, exact, site) for site in SITES), switch
    with pytest.raises(UsageError, match=r"pairs\|first\|zeros"):
        parse("omniquant{legacy=qk}")


def test_presets_give_what_is_not_given() -> None:
    assert Omniquant().settled() == Omniquant(preset="w4a16g64").settled()
    w4a4 = Omniquant(preset="w4a4", group=32).settled()
    assert (w4a4.bits, w4a4.group, w4a4.act, w4a4.kv) == (4, 32, 4, 4) and "q<->k" in w4a4.sites
    assert Omniquant(preset="w3a16g64", fast=True).settled().epochs < Omniquant(preset="w3a16g64").settled().epochs
    assert Omniquant(preset="w3a16g64", fast=True, epochs=7).settled().epochs == 7
    assert str(parse("omniquant{preset=w2a16g64 fast}")) == "omniquant{preset=w2a16g64 fast}"
    with pytest.raises(OptionError, match="needs groups"):
        parse("omniquant{preset=w8a8 rounding=gptq}")


def test_it_needs_text(tiny_model: Program) -> None:
    with pytest.raises(UsageError, match="needs calibration text"):
        compress(tiny_model, bits=3, data=None)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("bits", 1), ("bits", 9), ("group", -1), ("epochs", -1), ("batch", 0), ("clip_rate", 1.0)),
        *(("last_rate", 2.0), ("act", 9), ("kv", 1)),
    ],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"option {option} of pass omniquant"):
        parse(f"omniquant{{{option}={value}}}")


def test_the_text_of_a_compressed_model(plain: tuple[Program, Log], request: pytest.FixtureRequest) -> None:
    check_golden("omniquant.ir", dump(plain[0]), request)
