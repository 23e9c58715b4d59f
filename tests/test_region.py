"""Regions: a slice of a program runs, differentiates and swaps parameters, and slices in order are the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ir.analysis import blocks, layout
from ir.execute import empty_inputs
from ir.program import Program
from ir.region import Region, region
from ir.types import TensorType
from tests.architectures import ids_for, traced
from tests.programs import Sketch, aten, tiny_mlp_program


def names(nodes: Iterable[fx.Node]) -> list[str]:
    """Names of nodes, in order."""
    return [n.name for n in nodes]


def test_blocks_run_and_differentiate() -> None:
    program, _ = traced("llama")
    (first, _) = blocks(program)
    part = first.region(program, [first.exit])
    inputs = empty_inputs(program, ids_for(2, 5))
    prologue = region(program, layout(program).prologue, part.inputs[:0])
    assert prologue.outputs == ()
    weight = nn.Parameter(program.params.get("model.layers.0.mlp.up_proj.weight").clone())
    module = part.module({"model.layers.0.mlp.up_proj.weight": weight})
    assert [p is weight for p in module.parameters()] == [True]
    needed = [n for n in part.inputs if n.op == "call_function"]
    ambient = region(program, layout(program).prologue, needed)
    with torch.no_grad():
        given_ = dict(zip(names(needed), ambient.module()(*[inputs[n.name] for n in ambient.inputs]), strict=True))
    (out,) = module(*[given_[n.name] if n.name in given_ else inputs[n.name] for n in part.inputs])
    out.square().mean().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0
    stored = program.params.get("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(stored, weight) and not stored.requires_grad


@st.composite
def dags(draw: st.DrawFn) -> tuple[Program, list[list[fx.Node]]]:
    """A random program of float64 values [3, 4] on x, y and parameters, and a cut of its calls into runs in order."""
    s, kind = Sketch(draw(st.integers(0, 99))), TensorType(torch.float64, (3, 4))
    params = [s.param(f"p.{i}", s.random(3, 4, dtype=torch.float64)) for i in range(2)]
    matrix = s.param("p.matrix", s.random(4, 4, dtype=torch.float64))
    values = [s.input("x", kind), s.input("y", kind), *params]
    calls: list[fx.Node] = []
    for _ in range(draw(st.integers(2, 10))):
        a, b = (values[draw(st.integers(0, len(values) - 1))] for _ in range(2))
        made: list[Callable[[], fx.Node]] = [
            lambda a=a, b=b: s.call(aten.add.Tensor, a, b, type=kind),
            lambda a=a, b=b: s.call(aten.mul.Tensor, a, b, type=kind),
            lambda a=a: s.call(aten.tanh.default, a, type=kind),
            lambda a=a: s.call(aten.linear.default, a, matrix, type=kind),
        ]
        calls.append(draw(st.sampled_from(made))())
        values.append(calls[-1])
    program = s.program(calls[-1], *(draw(st.lists(st.sampled_from(calls), max_size=2))))
    parts: list[list[fx.Node]] = [[]]
    for call in calls:
        if draw(st.booleans()):
            parts.append([])
        parts[-1].append(call)
    return program, [p for p in parts if p]


def in_parts(program: Program, parts: list[Region], inputs: dict[str, Tensor], trained: dict[str, Any]) -> list[Tensor]:
    values = dict(inputs)
    for part in parts:
        own = {name: trained[name] for name in part.params}
        results = part.module(own)(*[values[n.name] for n in part.inputs])
        values.update(zip(names(part.outputs), results, strict=True))
    return [values[n.name] for n in program.outputs]


@settings(max_examples=60)
@given(case=dags(), seed=st.integers(0, 99))
def test_regions_in_order_are_the_whole(case: tuple[Program, list[list[fx.Node]]], seed: int) -> None:
    program, cut = case
    generator = torch.Generator().manual_seed(seed)
    start = {n: torch.randn(3, 4, dtype=torch.float64, generator=generator) for n in ("x", "y")}
    everything = region(program, program.graph.nodes, program.outputs)
    parts = [region(program, nodes) for nodes in cut]
    results = []
    for regions in ([everything], parts):
        inputs = {n: t.clone().requires_grad_() for n, t in start.items()}
        trained = {n: nn.Parameter(program.params.get(n).clone()) for n in everything.params}
        outputs = in_parts(program, regions, inputs, trained)
        loss = sum((o * (k + 1)).square().sum() for k, o in enumerate(outputs))
        leaves = [*inputs.values(), *trained.values()]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([*(o.detach() for o in outputs), *grads])
    for whole, cut_ in zip(*results, strict=True):
        torch.testing.assert_close(cut_, whole, rtol=1e-12, atol=1e-12)


def test_regions_see_later_writes_unless_overridden() -> None:
    program = tiny_mlp_program(blocks=1)
    (block,) = blocks(program)
    part = block.region(program)
    name = "model.layers.0.gate_proj.weight"
    assert part.inputs == (block.entry,) and part.outputs == (block.exit,) and name in part.params
    x = torch.randn(1, 2, 16)
    before = part.module()(x)[0]
    program.params.put(name, torch.zeros(32, 16), "test")
    assert torch.equal(part.module()(x)[0], x), "the gate is shut"
    assert not torch.equal(before, x)
    old = part.module({name: torch.ones(32, 16)})(x)[0]
    assert not torch.equal(old, x)


def test_a_region_names_what_flows_in_and_out() -> None:
    program = tiny_mlp_program(blocks=2)
    first, second = blocks(program)
    both = region(program, [*second.nodes, *first.nodes])
    assert both.inputs == (first.entry,) and both.outputs == (second.exit,)
    assert both.nodes == (*first.nodes, *second.nodes), "graph order, whatever order was given"
    inner = region(program, first.nodes[:-1])
    assert first.nodes[-2] in inner.outputs and first.entry in inner.inputs
