"""`smooth`: scales equal the closed form over all consumers, balance what they should, and fold without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ir.edit import Editor
from ir.execute import empty_inputs
from ir.program import Program
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.equiv.discover import discover
from passes.equiv.groups import RECORDS, EquivGroup, TieMap, annotate, clear, recorded
from passes.fold import Fold
from passes.manager import Settings, run_pipeline
from passes.peaks import smoothing_scales, tied_maximum
from passes.pipeline import parse
from passes.smooth import Smooth
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced

BATCHES = (ids_for(2, 8, seed=5), ids_for(2, 8, seed=6), ids_for(1, 5, seed=7))


def smoothed(program: Program, pass_: Smooth) -> Log:
    """Run smooth in place on three calibration batches of two shapes; return what it said."""
    log = Log("smooth")
    pass_.run(program, Context(log=log, calibration=BATCHES))
    return log


def scales(program: Program) -> dict[str, Tensor]:
    """The scales left on a program, by site."""
    return {r["site"]: program.params.get(r["param"]) for r in program.attributes[RECORDS]}


def inputs_of_sinks(program: Program, group: EquivGroup) -> list[Tensor]:
    """Every batch's input of a group's first sink, by running the whole program."""
    probe = program.clone()
    value = probe.node(group.sinks[0].node).args[0]
    probe.output.args = ((value,),)
    module = probe.module()
    return [module(*empty_inputs(probe, ids).values())[0] for ids in BATCHES]


def peak(program: Program, group: EquivGroup) -> Tensor:
    """Largest magnitude per input channel of a group's sinks over the calibration set."""
    return torch.stack([x.flatten(0, -2).abs().amax(0) for x in inputs_of_sinks(program, group)]).amax(0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85])
def test_scales_of_a_norm_equal_the_closed_form_over_all_consumers(alpha: float) -> None:
    program = traced("llama", 1)[0]
    smoothed(program, Smooth(alpha=alpha))
    found = scales(program)
    assert len(found) == 2
    for group in discover(program).of("norm->linears"):
        stacked = torch.cat([program.params.get(s.weight) for s in group.sinks])
        assert len(group.sinks) in (2, 3)
        wanted = peak(program, group).double() ** alpha / stacked.abs().amax(0).double() ** (1 - alpha)
        torch.testing.assert_close(found[group.site], wanted, rtol=1e-5, atol=0.0)


def test_tied_channels_take_the_largest() -> None:
    program = traced("llama", 1)[0]
    smoothed(program, Smooth(sites=("v->o",)))
    for group in discover(program).of("v->o"):
        per_kv = peak(program, group).double().view(2, 2, 16).amax(1).flatten()
        weights = program.params.get(group.sinks[0].weight).abs().amax(0).double().view(2, 2, 16).amax(1).flatten()
        torch.testing.assert_close(scales(program)[group.site], (per_kv / weights).sqrt(), rtol=1e-5, atol=0.0)


def test_every_expert_and_the_router_are_consumers() -> None:
    program = traced("mixtral", 1)[0]
    smoothed(program, Smooth())
    group = discover(program).of("norm->linears")[1]
    rows = torch.cat([program.params.get(s.weight).flatten(0, -2) for s in group.sinks])
    assert rows.shape[0] == 4 + 4 * 256
    wanted = (peak(program, group).double() / rows.abs().amax(0).double()).sqrt()
    torch.testing.assert_close(scales(program)[group.site], wanted, rtol=1e-5, atol=0.0)


def test_at_alpha_one_half_activations_and_weights_meet() -> None:
    program = traced("llama")[0]
    group = discover(program).of("norm->linears")[0]
    run_pipeline(program, parse("smooth,fold"), Context(calibration=BATCHES), Settings(verify="full"))
    weights = torch.cat([program.params.get(s.weight) for s in group.sinks]).abs().amax(0)
    torch.testing.assert_close(peak(program, group), weights, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_smooth_then_fold_keeps_the_function(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    before = prefill_and_decode(program, ids)
    single = traced(name, 1)[0]
    smoothed(single, Smooth(sites=("norm->linears", "v->o", "up->down", "fc1->fc2")))
    for record in single.attributes[RECORDS]:
        program.params.put(record["param"], single.params.get(record["param"]), "test")
    program.attributes[RECORDS] = single.attributes[RECORDS]
    Fold().run(program, Context())
    verify(program)
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-10


def test_smooth_alone_changes_no_value() -> None:
    program, ids = traced("llama", 1)[0], ids_for()
    before = prefill_and_decode(program, ids)
    smoothed(program, Smooth())
    verify(program)
    assert all(torch.equal(a, b) for a, b in zip(prefill_and_decode(program, ids), before, strict=True))


def test_a_dead_channel_gets_a_finite_scale() -> None:
    program = traced("llama", 1)[0]
    source = discover(program).of("norm->linears")[0].sources[0]
    gain = program.params.get(source.weight).clone()
    gain[3] = 0
    Editor(program, "test").param(source.weight, gain)
    smoothed(program, Smooth())
    s = scales(program)[source.node]
    assert bool(torch.isfinite(s).all()) and bool((s >= 1e-5).all())


def test_absent_groups_of_the_kinds_asked_for_are_reported() -> None:
    log = smoothed(traced("gpt2", 1)[0], Smooth(sites=("fc1->fc2",)))
    assert ["gelu" in d.reason for d in log.diagnostics] == [True]
    assert not log.reports


def test_alpha_outside_its_range_is_refused() -> None:
    with pytest.raises(OptionError, match="alpha"):
        parse("smooth{alpha=1.5}")


def test_pipeline_text_round_trips() -> None:
    text = 'smooth{alpha=0.85 sites=["norm->linears" "up->down"]},fold'
    assert str(parse(text)) == text


def test_the_plan_names_every_group() -> None:
    assert len(Smooth(sites=("norm->linears", "up->down")).plan(traced("llama", 1)[0])) == 3


def test_closed_form_and_floors_by_hand() -> None:
    a, w = torch.tensor([4.0, 0.0, 1e-12]), torch.tensor([1.0, 1.0, 1e12])
    assert smoothing_scales(a, w, 0.5).tolist() == pytest.approx([2, 1e-5**0.5, 1e-5])
    assert smoothing_scales(a, w, 1.0).tolist() == pytest.approx([4, 1e-5, 1e-5])


def test_tied_maximum_by_hand() -> None:
    tie = TieMap(torch.tensor([1, -1, 0, 1]))
    assert tied_maximum(tie, torch.tensor([3.0, 9.0, 2.0, 5.0]), 3).tolist() == [2, 5, 0]


def test_a_pass_that_sweeps_between_smooth_and_fold_keeps_the_scales():
    program, _ = traced("llama_untied")
    group = discover(program).of("norm->linears")[0]
    annotate(program, group, torch.full((group.size,), 2.0, dtype=torch.float64), "test")
    Editor(program, "test").sweep()
    assert len(list(recorded(program))) == 1
    clear(program)
    Editor(program, "test").sweep()
    assert not any(name.startswith("scales.") for name in program.params)
    assert "held" not in program.attributes
