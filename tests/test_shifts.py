"""Shifts beside scales: exact where a group says so, refused elsewhere, undone by their opposite, folded as trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from ir.errors import InvariantError
from ir.execute import empty_inputs, with_positions_in
from ir.program import Program, is_call
from ir.text import dump
from ir.verify import verify
from passes.base import Context
from passes.equiv.apply import Factors, apply
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, annotate
from passes.equiv.producers import bias_of
from passes.fold import Fold
from passes.training.transforms import drop_idle, transforms
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced
from tests.onnx_runs import onnx_outputs
from tests.solver_problems import draw
from tests.watch import Watch

aten, nomul = torch.ops.aten, torch.ops.nomul
ARCHITECTURES = ["llama", "qwen3", "gpt2", "opt", "gemma", "stablelm", "mixtral", "bloom"]


def shifting(program: Program) -> list[EquivGroup]:
    """The groups that are exact under a shift."""
    return [g for g in discover(program).groups if "shift" in g.supports]


def log_normal(group: EquivGroup, seed: int) -> Tensor:
    s = draw(group.size, seed=seed).exp()
    return s * draw(group.size, seed=seed + 1).sign() if "sign" in group.supports else s


def left(program: Program, groups: list[EquivGroup], sign: float = 1.0) -> Program:
    """A copy with scales and shifts left on groups and folded."""
    program = program.clone()
    for i, group in enumerate(groups):
        s, shift = log_normal(group, 2 * i), draw(group.size, seed=90 + i)
        # (x - d) / s is undone by ((x' + d / s) * s).
        annotate(program, group, s if sign > 0 else 1 / s, "test", shift if sign > 0 else -shift / s)
    Fold().run(program, Context())
    return program


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scales_and_shifts_fold_exactly(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    groups = shifting(program)
    found = left(program, groups)
    verify(found, full=True)
    if name != "mixtral":
        assert groups
        biases = [n for n in found.calls(aten.linear) if bias_of(n) is not None]
        assert len(biases) >= len([s for g in groups for s in g.sinks])
    assert relative_error(prefill_and_decode(found, ids), prefill_and_decode(program, ids)) < 1e-9


def test_a_float32_model_stays_within_rounding() -> None:
    program, ids = traced("llama", 1)[0], ids_for()
    found = prefill_and_decode(left(program, shifting(program)), ids)
    assert relative_error(found, prefill_and_decode(program, ids)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_the_opposite_takes_them_back(name: str) -> None:
    program = doubled(traced(name, 1)[0])
    Fold().run(program, Context())
    there = left(program, shifting(program))
    back = left(there, [discover(there).find(g.kind, g.site) for g in shifting(program)], sign=-1.0)
    for param in program.params:
        torch.testing.assert_close(back.params.get(param), program.params.get(param), rtol=1e-9, atol=1e-12)
    extra = [param for param in back.params if param not in program.params]
    assert all(bool((back.params.get(n) - float(n.endswith(".gain"))).abs().max() < 1e-10) for n in extra)


def test_a_shift_of_zero_adds_no_bias() -> None:
    program = traced("llama", 1)[0]
    Fold().run(program, Context())
    before = dump(program).splitlines()[1:]
    for group in shifting(program):
        annotate(program, group, torch.ones(group.size), "test", torch.zeros(group.size))
    Fold().run(program, Context())
    assert dump(program).splitlines()[1:] == before


@pytest.mark.parametrize("kind", ["up->down", "q<->k"])
def test_groups_that_are_not_exact_under_a_shift_refuse_it(kind: str) -> None:
    program = traced("llama", 1)[0]
    group = discover(program).of(kind)[0]
    with pytest.raises(InvariantError, match="not exact under one"):
        annotate(program, group, torch.ones(group.size), "test", torch.ones(group.size))


@pytest.mark.parametrize("kind", ["up->down", "q<->k"])
def test_a_shift_that_is_not_exact_changes_the_logits(kind: str) -> None:
    program, ids = doubled(traced("llama", 1)[0]), ids_for()
    group = discover(program).of(kind)[0]
    if kind == "q<->k":  # as if keys alone were shifted: rotary embedding turns the shift with the position
        group = replace(group, sources=group.sinks, sinks=())
    found, factors = program.clone(), Factors()
    factors.add(group, torch.ones(group.size, dtype=torch.float64), draw(group.size))
    apply(found, factors, "test")
    assert relative_error(prefill_and_decode(found, ids), prefill_and_decode(program, ids)) > 0.01


@pytest.mark.parametrize("bad", [torch.ones(3), torch.full((64,), float("nan"))])
def test_bad_shifts_are_refused(bad: Tensor) -> None:
    program = traced("llama", 1)[0]
    group = shifting(program)[0]
    with pytest.raises(InvariantError, match="another size or not finite"):
        annotate(program, group, torch.ones(group.size), "test", bad)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_what_is_trained_is_what_is_folded(name: str, shift: bool) -> None:
    program = doubled(traced(name, 1)[0])
    groups = discover(program).of("norm->linears", "v->o", "up->down", "fc1->fc2", "q<->k")
    s = {g.site: log_normal(g, 3 * i) for i, g in enumerate(groups)}
    shifts = {g.site: draw(g.size, seed=40 + i) for i, g in enumerate(groups) if shift and "shift" in g.supports}
    folded, trained = program.clone(), program.clone()
    for group in groups:
        annotate(folded, group, s[group.site], "test", shifts.get(group.site))
    Fold().run(folded, Context())
    parts = transforms(trained, groups, shift, "test")
    assert parts.shifted == shifts.keys()
    originals = {n: trained.params.get(n) for n in parts.names}
    for param, tensor in parts.apply(originals, s, shifts).items():
        trained.params.put(param, tensor, "test")
    drop_idle(trained, parts, "test")
    verify(trained, full=True)
    compared = list(trained.calls(aten.linear, aten.rms_norm, aten.layer_norm, nomul.grouped_linear))
    assert parts.weights.keys() <= {node.name for node in compared}
    for node in compared:
        if node.name in parts.weights:
            for mine, theirs in zip(operands(trained, node), operands(folded, folded.node(node.name)), strict=True):
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)  # type: ignore[arg-type]


def operands(program: Program, node: fx.Node) -> list[Tensor | None]:
    """The stored operands of a linear or norm, and of an addition behind a norm."""
    found: list[Tensor | None] = [
        program.value(a) if isinstance(a, fx.Node) and a.op == "get_attr" else None for a in node.args[1:4]
    ]
    behind = [u for u in node.users if is_call(u, aten.add) and isinstance(u.args[1], fx.Node)]
    return [*found, *(program.value(u.args[1]) for u in behind if u.args[1].op == "get_attr")]  # type: ignore[arg-type, union-attr]


def test_transforms_of_ones_change_no_bit() -> None:
    program, ids = traced("llama", 1)[0], ids_for()
    wanted = prefill_and_decode(program, ids)
    groups = discover(program).of("norm->linears", "v->o", "up->down")
    parts = transforms(program, groups, True, "test")
    originals = {n: program.params.get(n) for n in parts.names}
    ones = {g.site: torch.ones(g.size) for g in groups}
    found = parts.apply(originals, ones, {site: torch.zeros_like(ones[site]) for site in parts.shifted})
    assert all(torch.equal(found[n], originals[n]) for n in parts.names)
    assert relative_error(prefill_and_decode(program, ids), wanted) == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_routers_choose_the_same_experts(name: str) -> None:
    program, ids = doubled(traced(name, 2)[0]), ids_for(2, 12)
    groups = discover(program).of("norm->linears", "v->o", "up->down", "q<->k")
    routed = [g for g in groups if g.kind == "norm->linears" and any("gate" in s.weight for s in g.sinks)]
    assert len(routed) == 2 and all(len(g.sinks) >= 2 for g in routed)
    found = program.clone()
    for i, group in enumerate(groups):
        annotate(found, group, log_normal(group, 5 * i), "test")
    Fold().run(found, Context())
    chosen = list(program.calls(aten.topk))
    assert len(chosen) == 2
    before, after = chosen_by(program, ids), chosen_by(found, ids)
    for node in chosen:
        assert torch.equal(before[node.name], after[node.name])


def chosen_by(program: Program, ids: Tensor) -> dict[str, Tensor]:
    """The places that every top-k of a program in float64 gives, by node name."""
    wide = with_positions_in(program, torch.float64)
    watch = Watch(wide)
    with torch.no_grad():
        watch.run(*empty_inputs(wide, ids, torch.float64).values())
    return {n.name: watch.seen[n.name][1] for n in wide.calls(aten.topk)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_onnx_runtime_agrees_on_folded_shifts(name: str, tmp_path: Path) -> None:
    program, ids = traced(name, 2)[0], ids_for(2, 6)
    found = left(program, shifting(program))
    inputs = list(empty_inputs(found, ids).values())
    with torch.no_grad():
        wanted = found.module()(*inputs)
    offsets = any(is_call(n, aten.add) and n.name.endswith("_offset") for n in found.graph.nodes)
    assert offsets == (
        name in ("llama", "qwen3", "gemma", "mixtral")
    )  # the others' norms have an offset, or no shift is exact
    for a, b in zip(onnx_outputs(found, inputs, tmp_path), wanted, strict=True):
        assert relative_error([a], [b]) < 1e-4
