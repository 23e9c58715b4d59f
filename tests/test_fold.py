"""`fold`: gains vanish from norms, scales reach the weights, nothing else moves, and twice is once."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ir.edit import Editor
from ir.errors import InvariantError
from ir.parse import parse
from ir.program import Program, type_of
from ir.text import dump
from ir.types import TensorType
from ir.verify import verify
from passes.base import Context, Log
from passes.equiv.discover import discover
from passes.equiv.groups import RECORDS, EquivGroup, annotate
from passes.fold import Fold
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse as parse_pipeline
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced
from tests.golden import check_golden

aten = torch.ops.aten


def fold(program: Program) -> Log:
    """Fold in place and return what the pass said."""
    log = Log("fold")
    Fold().run(program, Context(log=log))
    return log


def gains(program: Program) -> dict[str, fx.Node | None]:
    """The gain operand of every norm, by node name."""
    return {n.name: n.args[2] for n in program.calls(aten.rms_norm, aten.layer_norm)}  # type: ignore[misc]


def norm_group(program: Program, index: int = 0) -> EquivGroup:
    """One of the groups whose source is a norm."""
    return discover(program).of("norm->linears")[index]


def spread(group: EquivGroup) -> torch.Tensor:
    """Scales from 1/4 to 4."""
    return torch.logspace(-2, 2, group.size, base=2, dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "mixtral", "olmo2"])
def test_gains_go_into_the_weights_and_the_function_stays(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    folded = program.clone()
    log = fold(folded)
    verify(folded, full=True)
    sites = {g.site for g in discover(program).of("norm->linears", "norm->head")}
    assert {r.site for r in log.reports} == sites
    assert all((gains(folded)[site] is None) for site in sites)
    assert relative_error(prefill_and_decode(folded, ids), prefill_and_decode(program, ids)) < 1e-10


def test_float32_weights_are_rounded_once() -> None:
    program = traced("llama", 1)[0]
    group = norm_group(program)
    weight, gain = (program.params.get(s.weight) for s in (group.sinks[0], group.sources[0]))
    query = discover(program).of("q<->k")[0]
    s = spread(query)
    annotate(program, query, s, "test")
    fold(program)
    wanted = weight.double() / s[query.sources[0].tie.index].unsqueeze(-1) * gain.double()
    found = program.params.get(group.sinks[0].weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.float())


def test_float32_logits_stay_within_rounding() -> None:
    program, ids = traced("llama", 1)[0], ids_for()
    before = prefill_and_decode(program, ids)
    fold(program)
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "mixtral"])
def test_folding_twice_is_folding_once(name: str) -> None:
    program = traced(name, 1)[0]
    fold(program)
    version, writes, text = program.version, len(program.params.writes), dump(program)
    fold(program)
    assert (program.version, len(program.params.writes), dump(program)) == (version, writes, text)


def test_identity_scales_change_no_bit() -> None:
    program = traced("llama", 1)[0]
    before, nodes = {n: program.params.get(n) for n in program.params}, dump_nodes(program)
    for group in discover(program).groups:
        annotate(program, group, torch.ones(group.size, dtype=torch.float64), "test")
    fold(program)
    assert all(torch.equal(program.params.get(n), t) for n, t in before.items())
    assert dump_nodes(program) == nodes
    assert not any(n.startswith("scales.") for n in program.params)


def dump_nodes(program: Program) -> list[str]:
    """All lines but the header."""
    return dump(program).splitlines()[1:]


def test_a_smoothed_norm_keeps_its_gain() -> None:
    program = traced("llama", 1)[0]
    group = norm_group(program)
    gain, s = program.params.get(group.sources[0].weight).double(), spread(group)
    annotate(program, group, s, "test")
    fold(program)
    kept = program.params.get(group.sources[0].weight)
    assert torch.equal(kept, (gain / s).float())
    fold(program)
    assert torch.equal(program.params.get(group.sources[0].weight), kept)
    assert RECORDS not in program.attributes
    again = parse(dump(program), program.params)
    fold(again)
    assert torch.equal(again.params.get(group.sources[0].weight), kept)


def test_scales_back_and_forth_restore_the_weights() -> None:
    program = doubled(traced("opt", 1)[0])
    fold(program)
    before = {n: program.params.get(n) for n in program.params}
    for inverse in (False, True):
        for group in discover(program).groups:
            s = spread(group)
            annotate(program, group, 1 / s if inverse else s, "test")
        fold(program)
    for name, tensor in before.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(program.params.get(name), tensor, rtol=1e-12, atol=1e-14)


def test_records_survive_the_text_form() -> None:
    program = doubled(traced("llama", 1)[0])
    for group in discover(program).groups:
        annotate(program, group, spread(group), "test")
    again = parse(dump(program), program.params)
    fold(program)
    fold(again)
    assert dump(again) == dump(program)
    assert all(torch.equal(again.params.get(n), program.params.get(n)) for n in program.params)


def test_a_computed_gain_becomes_a_parameter_when_it_must_stay() -> None:
    program, ids = doubled(traced("gemma", 1)[0]), ids_for()
    before = prefill_and_decode(program, ids)
    group = norm_group(program)
    annotate(program, group, spread(group), "test")
    fold(program)
    verify(program, full=True)
    gain = gains(program)[group.site]
    assert gain is not None and gain.op == "get_attr" and str(gain.target).endswith("input_layernorm.gain")
    assert "model.layers.0.input_layernorm.weight" not in program.params
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-10


def test_a_norm_without_a_gain_gets_one_to_carry_scales() -> None:
    program, ids = doubled(traced("llama", 1)[0]), ids_for()
    before = prefill_and_decode(program, ids)
    fold(program)
    group = norm_group(program)
    annotate(program, group, spread(group), "test")
    fold(program)
    verify(program, full=True)
    assert gains(program)[group.site] is not None
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-10


def test_a_gain_of_two_norms_is_not_written_for_both() -> None:
    program, ids = doubled(traced("qwen3", 1)[0]), ids_for()
    first, second, _ = (n for n in program.calls(aten.rms_norm) if n.args[1] == [64])
    second.args = (*second.args[:2], first.args[2], *second.args[3:])
    before = prefill_and_decode(program, ids)
    group = norm_group(program)
    annotate(program, group, spread(group), "test")
    fold(program)
    verify(program, full=True)
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-10


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_gains_of_zero_stay_exact(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    source = norm_group(program).sources[0]
    gain = program.params.get(source.weight).clone()
    gain[::3] = 0
    Editor(program, "test").param(source.weight, gain)
    before = prefill_and_decode(program, ids)
    fold(program)
    verify(program, full=True)
    kept = program.params.get(source.weight)
    assert torch.equal(kept, (gain != 0).double())
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-10
    version = program.version
    fold(program)
    assert program.version == version


def test_the_offset_stays_in_the_norm_divided_by_the_gain() -> None:
    program = traced("opt", 1)[0]
    source = norm_group(program).sources[0]
    gain, beta = (program.params.get(n).double() for n in (source.weight, source.bias))
    fold(program)
    assert torch.equal(program.params.get(source.bias), (beta / gain).float())
    assert source.weight not in program.params


def test_a_tied_head_is_reported_and_left() -> None:
    program = traced("llama", 1)[0]
    log = fold(program)
    assert [(d.site, "is tied" in d.reason) for d in log.diagnostics] == [("norm", True)]
    assert gains(program)["norm"] is not None


def test_scales_on_a_group_that_is_gone_are_an_error() -> None:
    program = traced("llama", 1)[0]
    group = discover(program).of("up->down")[0]
    annotate(program, group, spread(group), "test")
    down = program.node(group.site)
    silu = next(iter(program.calls(aten.silu)))
    down.args = (silu, *down.args[1:])
    with pytest.raises(InvariantError, match=r"no up->down group"):
        fold(program)


def test_lost_scales_are_an_error() -> None:
    program = traced("llama", 1)[0]
    group = norm_group(program)
    annotate(program, group, spread(group), "test")
    program.params.drop(program.attributes[RECORDS][0]["param"])
    with pytest.raises(InvariantError, match="are gone"):
        fold(program)


def test_annotating_a_site_again_replaces_its_scales() -> None:
    program, ids = doubled(traced("llama", 1)[0]), ids_for()
    before = prefill_and_decode(program, ids)
    group = norm_group(program)
    annotate(program, group, 3 * spread(group), "test")
    annotate(program, group, spread(group), "test")
    assert len(program.attributes[RECORDS]) == 1
    fold(program)
    assert relative_error(prefill_and_decode(program, ids), before) < 1e-10


def test_every_weight_keeps_its_name_and_type() -> None:
    program = traced("mixtral", 1)[0]
    before = {n: program.params.type_of(n) for n in program.params}
    fold(program)
    assert all(before[n] == program.params.type_of(n) for n in program.params)
    assert all(isinstance(type_of(n), TensorType) for n in program.param_nodes())
    assert {program.params.entry(n).written_by for n in program.params} == {"fold", "test", ""}


def test_the_plan_names_every_norm_and_every_scale() -> None:
    program = traced("llama", 1)[0]
    assert [row.action for row in Fold().plan(program)] == ["fold the gain", "fold the gain"]
    group = discover(program).of("v->o")[0]
    annotate(program, group, spread(group), "test")
    assert Fold().plan(program)[0].site == group.site


def test_the_manager_finds_fold_exact() -> None:
    program = traced("llama")[0]
    (report,) = run_pipeline(program, parse_pipeline("fold"), Context(), Settings(verify="full"))
    assert report.changed and report.probe_error is not None and report.probe_error < 1e-4
    assert "folded" in program.facts


def test_golden_text_of_a_folded_llama(request: pytest.FixtureRequest) -> None:
    program = traced("llama")[0]
    fold(program)
    check_golden("fold_llama.ir", dump(program), request)
