"""`awq`: the search never loses, helps where few activations are strong, and folds without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ir.edit import Editor
from ir.program import Program
from ir.verify import verify
from passes.awq import Awq
from passes.base import Context, Log, OptionError
from passes.equiv.discover import discover
from passes.equiv.groups import RECORDS, TieMap
from passes.fold import Fold
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from passes.scale_search import candidates, tied_mean
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced

BATCHES = (ids_for(2, 8, seed=5), ids_for(2, 8, seed=6), ids_for(1, 5, seed=7))


def searched(program: Program, **options: Any) -> Log:
    """Search in place on three calibration batches of two shapes, by groups of 16; return what the pass said."""
    log = Log("awq")
    chosen = Awq(group=16, **options)
    chosen.validate()
    chosen.run(program, Context(log=log, calibration=BATCHES))
    return log


def scales(program: Program) -> dict[str, Tensor]:
    """The scales left on a program, by site."""
    return {r["site"]: program.params.get(r["param"]) for r in program.attributes[RECORDS]}


def with_strong_channels(name: str, seed: int) -> Program:
    """A model in which the norms of its blocks give a few channels thirty times the rest."""
    program = traced(name, 2)[0]
    generator = torch.Generator().manual_seed(seed)
    for group in discover(program).of("norm->linears"):
        gain = program.params.get(group.sources[0].weight).clone()
        gain[torch.randperm(gain.numel(), generator=generator)[:3]] *= 30
        Editor(program, "test").param(group.sources[0].weight, gain)
    return program


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "mixtral"])
def test_no_group_loses_and_every_group_is_reported(name: str) -> None:
    program = traced(name, 1)[0]
    groups = discover(program).of("norm->linears", "v->o", "up->down")
    log = searched(program, bits=3)
    assert sorted(r.site for r in log.reports) == sorted(scales(program))
    skipped = {d.site for d in log.diagnostics}
    assert {g.site for g in groups} <= scales(program).keys() | skipped and log.reports
    for row in log.reports:
        assert 0 < row.figures["loss_after"] <= row.figures["loss_before"]
        s = scales(program)[row.site]
        assert bool((s > 0).all()) and row.figures["largest"] == pytest.approx(float(s.max() / s.min()))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_strong_channels_are_rounded_more_finely(name: str) -> None:
    program = with_strong_channels(name, seed=1)
    log = searched(program, bits=3, sites=("norm->linears",))
    for group in discover(program).of("norm->linears"):
        gain, s = program.params.get(group.sources[0].weight).abs(), scales(program)[group.site]
        strong = gain.topk(3).indices
        assert float(s[strong].median()) > 1.5 * float(s.median())
    gains = [r.figures["loss_before"] / r.figures["loss_after"] for r in log.reports]
    assert min(gains) > 1.5, gains


def test_the_model_comes_closer_than_by_rounding_alone() -> None:
    program = with_strong_channels("llama", seed=2)
    ids = ids_for(2, 12, seed=9)
    wanted = prefill_and_decode(program, ids)

    def off(pipeline: str) -> float:
        found = program.clone()
        run_pipeline(found, parse(pipeline), Context(calibration=BATCHES), Settings(verify="full"))
        return relative_error(prefill_and_decode(found, ids), wanted)

    plain = off("rtn{bits=3 group=16}")
    assert off("awq{bits=3 group=16},fold,rtn{bits=3 group=16}") < 0.9 * plain
    assert off("awq{bits=3 group=16},fold,gptq{bits=3 group=16}") < 0.8 * plain


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_it_changes_no_value_and_folds_exactly(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    before = prefill_and_decode(program, ids)
    single = traced(name, 1)[0]
    alone = prefill_and_decode(single, ids)
    searched(single)
    verify(single)
    assert all(torch.equal(a, b) for a, b in zip(prefill_and_decode(single, ids), alone, strict=True))
    for record in single.attributes[RECORDS]:
        program.params.put(record["param"], single.params.get(record["param"]), "test")
    program.attributes[RECORDS] = single.attributes[RECORDS]
    Fold().run(program, Context())
    verify(program)
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-10


def test_candidates_are_those_of_the_paper_centred_on_one() -> None:
    strength, typical = torch.tensor([4.0, 1.0, 0.25]).double(), torch.tensor([0.5, 0.25, 0.5]).double()
    found = candidates(strength, typical, steps=4)
    assert len(found) == 8 and torch.equal(found[0], torch.ones(3).double())
    for i in range(4):
        r = i / 4
        for s, raw in zip(found[2 * i :], (strength**r, strength**r / typical ** (1 - r)), strict=False):
            torch.testing.assert_close(s, raw / (raw.max() * raw.min()).sqrt())


def test_tied_channels_share_their_mean() -> None:
    tie = TieMap(torch.tensor([0, 0, 1, -1]))
    found = tied_mean([(tie, torch.tensor([1.0, 3.0, 5.0, 9.0])), (tie, torch.tensor([2.0, 2.0, 1.0, 9.0]))], 3)
    assert found.tolist() == [2.0, 3.0, 0.0]


def test_what_is_never_read_is_left_alone_and_named() -> None:
    program = traced("llama", 1)[0]
    source = discover(program).of("norm->linears")[0].sources[0]
    Editor(program, "test").param(source.weight, torch.zeros_like(program.params.get(source.weight)))
    log = searched(program)
    assert any("anything but zeros" in d.reason for d in log.diagnostics)


def test_absent_groups_of_the_kinds_asked_for_are_reported() -> None:
    log = searched(traced("gpt2", 1)[0], sites=("fc1->fc2",))
    assert ["gelu" in d.reason for d in log.diagnostics] == [True] and not log.reports


@pytest.mark.parametrize(("option", "value"), [("bits", 1), ("bits", 9), ("group", -1), ("steps", 0)])
def test_options_out_of_range(option: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"option {option} of pass awq"):
        parse(f"awq{{{option}={value}}}")


def test_the_plan_names_every_group() -> None:
    program = traced("llama", 2)[0]
    kinds = ("norm->linears", "v->o", "up->down")
    assert [r.site for r in Awq().plan(program)] == [g.site for g in discover(program).of(*kinds)]
