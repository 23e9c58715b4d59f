"""What `rotate` turns, what it leaves alone and why, and what turned weights are like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from ir.analysis import blocks
from ir.edit import Editor
from ir.errors import UnsupportedError, UsageError
from ir.ops.packing import unpack_bits
from ir.program import Program, is_call
from passes.base import Context
from passes.equiv.heads import value_heads
from passes.equiv.turns import Turn, peak, turned_bias, turned_weight
from passes.manager import Settings, run_pipeline
from passes.pipeline import check, schedule
from passes.pipeline import parse as parse_pipeline
from passes.rotate import Rotate
from passes.rotation import rotate_sites
from passes.stream import observe
from tests.architectures import (
    doubled,
    ids_for,
    relative_error,
    traced,
)
from tests.rotation_cases import (
    error,
    linear_weights,
    ops,
    rotated,
    shaped,
    sites_of,
    turn_matrix,
)

aten, nomul = torch.ops.aten, torch.ops.nomul
F64 = torch.float64


def test_skipped_sites_are_left_in_their_basis() -> None:
    program = doubled(traced("llama", 1)[0])
    turned, log = rotated(program, Rotate(skip=("v_proj",)))
    v, o = (next(s for s in sites_of(program) if s.name.endswith(n)) for n in ("v_proj", "o_proj"))
    assert torch.equal(turned.params.get(v.weight), program.params.get(v.weight))
    assert is_call(turned.node(o.node.name).args[0], nomul.hadamard)
    assert [(d.site, d.asked) for d in log.diagnostics if d.asked] == [(v.name, True)]
    assert error(turned, program) < 1e-10
    with pytest.raises(UsageError, match="matches none"):
        rotated(program, Rotate(skip=("v_porj",)))


def test_without_operators_every_other_site_has_a_reason() -> None:
    program = doubled(traced("llama", 1)[0])
    turned, log = rotated(program, Rotate(online=False, residual=False))
    assert not ops(turned)
    reasons = {d.site.rpartition(".")[2]: d.reason for d in log.diagnostics}
    assert set(reasons) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert "at run time" in reasons["down_proj"] and "shared with another reader" in reasons["lm_head"]
    assert error(turned, program) < 1e-10


def test_a_weight_of_two_linears_is_left_with_its_reason() -> None:
    program = doubled(traced("llama", 1)[0])
    gate, up = (n for n in program.calls(aten.linear) if n.name.endswith(("gate_proj", "up_proj")))
    up.args = (up.args[0], gate.args[1])
    turned, log = rotated(program, Rotate(residual=False))
    assert {d.site.rpartition(".")[2] for d in log.diagnostics} == {"gate_proj", "up_proj", "lm_head"}
    assert all("shared" in d.reason for d in log.diagnostics)
    assert error(turned, program) < 1e-10


def test_a_factor_per_channel_keeps_values_from_turning_for_free() -> None:
    program = doubled(traced("llama", 1)[0])
    node = next(iter(program.calls(aten.scaled_dot_product_attention)))
    gain = Editor(program, "test").param("gain", torch.linspace(0.5, 2, 16, dtype=F64))
    scaled = Editor(program, "test").before(node.next).call(aten.mul, node, gain, like=node)
    node.replace_all_uses_with(scaled, lambda user: user is not scaled, propagate_meta=False)
    expect_operator_for_values(program, "multiplied")


def test_channels_of_different_positions_are_no_head() -> None:
    program = doubled(traced("llama", 1)[0])
    node = next(iter(program.calls(aten.scaled_dot_product_attention)))
    value, editor = node.args[2], Editor(program, "test").before(node)
    assert isinstance(value, fx.Node)
    # Half of each head's channels come from the position before: scales still pass, rotations do not.
    halves = [editor.call(aten.slice, value, 3, a, b, like=value) for a, b in ((0, 8), (8, 16))]
    mixed = editor.call(aten.cat, [halves[0], editor.call(aten.roll, halves[1], [1], [2], like=value)], -1, like=value)
    node.args = (*node.args[:2], mixed, *node.args[3:])
    for half in (*halves, mixed.args[0][1]):  # type: ignore[index]
        half.meta["type"] = type(half.meta["type"])(F64, (*half.meta["type"].dims[:-1], 8))
    expect_operator_for_values(program, "different positions")


def test_columns_that_mix_heads_of_different_positions_are_no_head() -> None:
    program = doubled(traced("llama", 1)[0])
    node = next(iter(program.calls(aten.scaled_dot_product_attention)))
    editor = Editor(program, "test").before(node.next)
    halves = [editor.call(aten.slice, node, 3, a, b, like=node) for a, b in ((0, 8), (8, 16))]
    rolled = editor.call(aten.roll, halves[1], [1], [2], like=node)
    mixed = editor.call(aten.cat, [halves[0], rolled], -1, like=node)
    node.replace_all_uses_with(mixed, lambda user: user not in halves, propagate_meta=False)
    for half in (*halves, rolled):
        half.meta["type"] = type(half.meta["type"])(F64, (*half.meta["type"].dims[:-1], 8))
    expect_operator_for_values(program, "whole heads")


def expect_operator_for_values(program: Program, reason: str) -> None:
    heads, blocked = value_heads(program, {s.node for s in sites_of(program)})
    assert not heads and reason in blocked[0][1]
    turned, _ = rotated(program)
    o = next(s for s in sites_of(turned) if s.name.endswith("o_proj"))
    assert is_call(o.node.args[0], nomul.hadamard)
    assert error(turned, program) < 1e-10


def test_a_weight_that_is_not_finite_is_refused() -> None:
    program = traced("llama", 1)[0]
    site = sites_of(program)[0]
    weight = program.params.get(site.weight).clone()
    weight[1, 2] = float("inf")
    Editor(program, "test").param(site.weight, weight)
    with pytest.raises(UnsupportedError, match="not finite"):
        rotated(program)


def test_the_plan_names_what_is_done() -> None:
    program = traced("llama")[0]
    _, log = rotated(program)
    plan = Rotate().plan(program)
    assert {r.site: r.figures["order"] for r in plan if r.action == "rotate"} == {
        r.site: r.figures["order"] for r in log.reports if "order" in r.figures
    }
    assert sorted(r.figures["adds"] for r in plan if "adds" in r.figures) == sorted(
        r.figures["adds"] for r in log.reports if "adds" in r.figures
    )


def test_rotation_comes_after_folding_and_before_codes() -> None:
    ordered, notes = schedule(parse_pipeline("shiftadd,fold,rotate"))
    assert str(ordered) == "fold,rotate,shiftadd" and notes
    with pytest.raises(UnsupportedError, match="fact folded"):
        check(parse_pipeline("rotate"), "model", frozenset({"canonical"}))


def test_float32_weights_are_rounded_once() -> None:
    program = traced("llama", 1)[0]
    turned, wide = rotated(program)[0], rotated(doubled(program))[0]
    for name in linear_weights(turned):
        assert turned.params.get(name).dtype == torch.float32
        assert torch.equal(turned.params.get(name), wide.params.get(name).float())


def test_streams_observe_the_turned_inputs() -> None:
    program, batches = traced("llama")[0], (ids_for(2, 8), ids_for(1, 5))
    turned, _ = rotated(program)
    seen: dict[str, list[Tensor]] = {}
    for target, wanted in ((program, [n.args[0].name for n in ops(turned)]), (turned, [n.name for n in ops(turned)])):  # type: ignore[union-attr]
        calls = {target.node(name): seen.setdefault(name, []).append for name in wanted}
        observe(target, Context(calibration=batches), calls, "test")
    for node in ops(turned):
        plain, after = (torch.cat([x.flatten(0, 1) for x in seen[n]]) for n in (node.args[0].name, node.name))  # type: ignore[union-attr]
        signs = unpack_bits(turned.value(node.args[1]), 1, plain.shape[1])  # type: ignore[arg-type]
        wanted_values = plain.double() @ turn_matrix(signs, plain.shape[1]).T
        assert relative_error([after.double()], [wanted_values]) < 1e-4


def test_codes_take_the_place_of_turned_weights() -> None:
    program = traced("llama")[0]
    context = Context(calibration=(ids_for(2, 16),))
    run_pipeline(
        program,
        parse_pipeline("fold,rotate{residual=false},shiftadd{group=16 sweeps=0}"),
        context,
        Settings(verify="full"),
    )
    coded = list(program.calls(nomul.shiftadd_linear))
    assert len(coded) == 14 and len(ops(program)) == 6
    assert sum(is_call(n.args[0], nomul.hadamard) for n in coded) == 12
    assert len(blocks(program)) == 2


def kurtosis(x: Tensor) -> float:
    centred = x.double() - x.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


def test_outliers_are_spread_out() -> None:
    program = doubled(shaped(576, 9, 3, 1536))
    generator = torch.Generator().manual_seed(2)
    for name in [s.weight for s in sites_of(program)]:
        weight = program.params.get(name).clone()
        weight[:, torch.randperm(weight.shape[1], generator=generator)[:6]] *= 40
        Editor(program, "test").param(name, weight)
    turned, log = rotated(program)
    for site in sites_of(program):
        before, after = (kurtosis(p.params.get(site.weight)) for p in (program, turned))
        assert before > 50 and after < before / 5
    figures = {r.site: r.figures for r in log.reports if "order" in r.figures}
    for site in sites_of(program):
        peaks = figures[site.name]
        assert peaks["peak_before"] == pytest.approx(peak(program.params.get(site.weight)))
        assert peaks["peak_after"] == pytest.approx(peak(turned.params.get(site.weight)))
        assert peaks["peak_after"] < peaks["peak_before"] / 2


def test_turns_by_hand() -> None:
    weight, bias = torch.arange(12, dtype=F64).view(3, 4), torch.tensor([1.0, 2, 3], dtype=F64)
    minus = torch.tensor([1, 0], dtype=torch.uint8)
    rows = Turn("rows", torch.tensor([2, 0]), minus, 2, 0.5)
    assert turned_weight(weight, [rows])[2].tolist() == [4, 4, 4, 4]  # (row 2 - row 0) / 2
    assert turned_weight(weight, [rows])[0].tolist() == [4, 5, 6, 7]  # (row 2 + row 0) / 2
    assert turned_bias(bias, [rows]).tolist() == [2, 2, 1]
    columns = Turn("cols", torch.tensor([3, 1]), minus, 2, 1.0)
    assert turned_weight(weight, [columns])[0].tolist() == [0, 4, 2, 2]
    assert turned_bias(bias, [columns]).tolist() == bias.tolist()
    assert peak(torch.zeros(2, 2)) == 0


def test_sites_given_by_a_caller_alone_are_rotated() -> None:
    program = doubled(traced("llama")[0])
    before = program.clone()
    sites = [s for s in sites_of(program) if ".1." in s.name]
    done = rotate_sites(program, sites, seed=3, by="test")
    assert [s.site for s in done.sites] == [s.name for s in sites] and len(done.online) == 3
    assert all(ops(program)[k].name == name for k, (name, _) in enumerate(done.online))
    assert all("layers_1" in n.name for n in ops(program)) and not done.left
    assert error(program, before) < 1e-10
