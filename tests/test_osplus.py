"""`osplus`: channels are centred, those beyond the bound are cut to it, nothing gets worse, and all folds away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ir.edit import Editor
from ir.program import Program
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, recorded
from passes.fold import Fold
from passes.manager import Settings, run_pipeline
from passes.osplus import Osplus
from passes.pipeline import parse
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced
from tests.watch import values

BATCHES = (ids_for(2, 8, seed=5), ids_for(2, 8, seed=6))


def searched(program: Program, **options: Any) -> Log:
    """Search in place; return what the pass said."""
    log = Log("osplus")
    chosen = Osplus(**options)
    chosen.validate()
    chosen.run(program, Context(log=log, calibration=BATCHES))
    return log


def with_outliers(name: str, seed: int) -> Program:
    """A model whose norms give a few channels forty times the rest, and where they can an offset of as much."""
    program = traced(name, 2)[0]
    generator = torch.Generator().manual_seed(seed)
    for group in discover(program).of("norm->linears"):
        source = group.sources[0]
        strong = torch.randperm(group.size, generator=generator)[:3]
        gain = program.params.get(source.weight).clone()
        gain[strong] *= 40
        Editor(program, "test").param(source.weight, gain)
        if source.bias:
            beta = program.params.get(source.bias).clone()
            beta[strong] += 100
            Editor(program, "test").param(source.bias, beta)
    return program


def inputs_of(program: Program, group: EquivGroup) -> Tensor:
    """All tokens that a group's first sink reads, [tokens, K]."""
    node = program.node(group.sinks[0].node).args[0]
    return torch.cat([values(program, ids)[node.name].flatten(0, -2) for ids in BATCHES])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["opt", "gpt2", "stablelm"])
def test_channels_are_centred_and_cut_to_one_bound(name: str) -> None:
    program = with_outliers(name, seed=1)
    log = searched(program, sites=("norm->linears",), act=4)
    found = {left.site: left for left in recorded(program)}
    for row in log.reports:
        group, left = discover(program).find("norm->linears", row.site), found[row.site]
        x = inputs_of(program, group).double()
        assert left.shift is not None
        torch.testing.assert_close(left.shift, (x.amax(0) + x.amin(0)) / 2, rtol=1e-4, atol=1e-4)
        moved = (x - left.shift) / left.scales
        assert bool((left.scales >= 1).all())
        cut = left.scales > 1 + 1e-6
        assert bool(cut.any())
        tops = moved.abs().amax(0)[cut]
        torch.testing.assert_close(tops, tops.max().expand_as(tops), rtol=1e-3, atol=0)
        assert row.figures["loss_after"] < 0.5 * row.figures["loss_before"]


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_it_folds_exactly_and_helps_coded_activations(name: str) -> None:
    program = with_outliers(name, seed=2)
    ids = ids_for(2, 12, seed=9)
    wanted = prefill_and_decode(program, ids)

    def off(pipeline: str) -> float:
        found = program.clone()
        run_pipeline(found, parse(pipeline), Context(calibration=BATCHES), Settings(verify="full"))
        return relative_error(prefill_and_decode(found, ids), wanted)

    assert off("osplus,fold") < 1e-3
    assert off("osplus{act=4},fold,act{bits=4}") < off("act{bits=4}")


def test_without_shifts_there_are_scales_alone() -> None:
    program = traced("llama", 1)[0]
    searched(program, shift=False)
    assert all(left.shift is None for left in recorded(program))
    double = doubled(traced("llama", 1)[0])
    before = prefill_and_decode(double, ids_for())
    for key in ("equiv", "held"):
        double.attributes[key] = program.attributes[key]
    for record in program.attributes["equiv"]:
        double.params.put(record["param"], program.params.get(record["param"]), "test")
    Fold().run(double, Context())
    verify(double)
    assert relative_error(prefill_and_decode(double, ids_for()), before) < 1e-10


def test_no_group_loses_and_every_group_is_reported() -> None:
    program = traced("qwen3", 2)[0]
    log = searched(program)
    kinds = ("norm->linears", "v->o", "up->down")
    assert {r.site for r in log.reports} == {g.site for g in discover(program).of(*kinds)}
    assert all(r.figures["loss_after"] > 0 for r in log.reports)


def test_what_never_changes_is_left_alone_and_named() -> None:
    program = traced("llama", 1)[0]
    source = discover(program).of("norm->linears")[0].sources[0]
    Editor(program, "test").param(source.weight, torch.zeros_like(program.params.get(source.weight)))
    log = searched(program)
    assert any("never changes" in d.reason for d in log.diagnostics)


@pytest.mark.parametrize(("option", "value"), [("bits", 1), ("act", 9), ("group", -1), ("steps", 0)])
def test_options_out_of_range(option: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"option {option} of pass osplus"):
        parse(f"osplus{{{option}={value}}}")


def test_the_plan_names_every_group() -> None:
    program = traced("llama", 1)[0]
    kinds = ("norm->linears", "v->o", "up->down")
    assert [r.site for r in Osplus().plan(program)] == [g.site for g in discover(program).of(*kinds)]
