"""Structure read off the dataflow: cuts, blocks, sites and regions of hand-built, random and real programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ir.analysis import (
    between,
    blocks,
    cut_points,
    graph_view,
    layout,
    linear_sites,
    matches,
    sibling_sites,
    site_name,
    token_carriers,
)
from ir.edit import Editor
from ir.execute import empty_inputs
from ir.program import Program, is_call
from ir.region import Region, region
from ir.types import ScalarType, TensorType
from tests.architectures import ids_for, traced
from tests.programs import F32, I64, Sketch, aten, hidden, nomul, tiny_mlp_program

SLOW = ["qwen3_moe", "gptj", "neox", "phi", "phi3", "gemma", "gemma2", "falcon", "stablelm", "bloom", "cohere"]
SLOW += ["olmo2", "granite", "starcoder2"]
ARCHITECTURES = ["llama", "gpt2", "opt", "mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
PARALLEL = {"gptj", "neox", "phi", "falcon", "cohere"}


def names(nodes: Any) -> list[str]:
    return [n.name for n in nodes]


class Stream(Sketch):
    """A sketch of a residual stream of width 8 over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = self.param("embed", self.random(16, 8)), self.param("head", self.random(16, 8))
        self.ids = self.input("ids", hidden(dtype=I64))
        self.count = 0

    def op(self, target: Any, *args: Any, width: int = 8, **kwargs: Any) -> fx.Node:
        return self.call(target, *args, type=hidden(width), **kwargs)

    def embed(self) -> fx.Node:
        return self.op(aten.embedding.default, self.table, self.ids)

    def linear(self, x: fx.Node, rows: int = 8, inputs: int = 8, **kwargs: Any) -> fx.Node:
        self.count += 1
        before = fx.Graph.inserting_before(self.graph, next(iter(self.graph.nodes)))
        with before:
            weight = self.param(f"w{self.count}", self.random(rows, inputs))
        return self.op(aten.linear.default, x, weight, width=rows, **kwargs)

    def mlp(self, h: fx.Node, path: str = "", target: Any = aten.silu.default) -> fx.Node:
        branch = self.op(target, self.linear(h, path=path), path=path)
        return self.op(aten.add.Tensor, h, branch, path=path)

    def close(self, h: fx.Node, **fields: Any) -> Program:
        return self.program(self.op(aten.linear.default, h, self.head, width=16), **fields)


def test_sequential_blocks() -> None:
    program = tiny_mlp_program(blocks=3)
    plan = layout(program)
    assert [b.path for b in plan.blocks] == [f"model.layers.{k}" for k in range(3)]
    assert [b.index for b in plan.blocks] == [0, 1, 2]
    assert [(b.entry.name, b.exit.name) for b in plan.blocks] == [
        ("embedding", "add"),
        ("add", "add_1"),
        ("add_1", "add_2"),
    ]
    assert names(plan.prologue) == ["embedding"] and names(plan.epilogue) == ["rms_norm_3", "linear_9"]
    assert names(cut_points(program)) == ["embedding", "add", "add_1", "add_2", "rms_norm_3", "linear_9"]


def test_every_call_is_in_exactly_one_part() -> None:
    program = tiny_mlp_program(blocks=3)
    plan = layout(program)
    parts = [*plan.prologue, *(n for b in plan.blocks for n in b.nodes), *plan.epilogue]
    assert parts == [n for n in program.graph.nodes if n.op == "call_function"]


def test_one_layer_is_one_block() -> None:
    program = tiny_mlp_program(blocks=1)
    (block,) = blocks(program)
    assert (block.entry.name, block.exit.name, block.path) == ("embedding", "add", "model.layers.0")
    assert names(layout(program).epilogue) == ["rms_norm_1", "linear_3"]


def test_a_program_without_blocks_is_all_prologue() -> None:
    s = Stream()
    program = s.close(s.op(aten.silu.default, s.embed()))
    plan = layout(program)
    assert plan.blocks == plan.epilogue == ()
    assert names(plan.prologue) == ["embedding", "silu", "linear"]


def test_logits_that_do_not_depend_on_tokens_have_no_cuts() -> None:
    s = Stream()
    ramp = s.call(aten.full.default, [2, 8], 1.0, type=TensorType(F32, (2, 8)))
    program = s.program(s.call(aten.linear.default, ramp, s.head, type=TensorType(F32, (2, 16))))
    assert cut_points(program) == [] and blocks(program) == ()


def test_unlike_segments_are_not_a_repetition() -> None:
    s = Stream()
    h = s.embed()
    for target in (aten.silu.default, aten.relu.default, aten.tanh.default):
        h = s.mlp(h, target=target)
    assert len(blocks(s.close(h))) == 1, "one block holds what does not repeat"


def test_blocks_with_weights_of_other_shapes_do_not_repeat() -> None:
    s = Stream()
    h = s.embed()
    for width in (8, 12, 8):
        up = s.op(aten.silu.default, s.linear(h, rows=width), width=width)
        h = s.op(aten.add.Tensor, h, s.linear(up, inputs=width))
    assert len(blocks(s.close(h))) == 1


def test_a_head_and_a_tail_that_differ_stay_outside() -> None:
    s = Stream()
    h = s.mlp(s.embed(), "first", aten.tanh.default)
    for k in range(4):
        h = s.mlp(h, f"layers.{k}")
    program = s.close(s.mlp(h, "last", aten.relu.default))
    assert [b.path for b in blocks(program)] == [f"layers.{k}" for k in range(4)]
    assert "tanh" in names(layout(program).prologue) and "relu" in names(layout(program).epilogue)


def test_two_segments_repeat_as_one_block() -> None:
    s = Stream()
    h = s.embed()
    for k in range(3):
        h = s.mlp(s.mlp(h, f"layers.{k}.attention", aten.tanh.default), f"layers.{k}.mlp")
    program = s.close(h)
    assert [b.path for b in blocks(program)] == [f"layers.{k}" for k in range(3)]
    assert [len(b.nodes) for b in blocks(program)] == [6] * 3
    assert len(cut_points(program)) == 8


def test_parallel_branches_are_one_segment() -> None:
    s = Stream()
    h = s.embed()
    for k in range(2):
        path = f"layers.{k}"
        attention = s.op(aten.tanh.default, s.linear(h, path=path), path=path)
        mlp = s.op(aten.silu.default, s.linear(h, path=path), path=path)
        both = s.op(aten.add.Tensor, attention, mlp, path=path)
        h = s.op(aten.add.Tensor, both, h, path=path)
    program = s.close(h)
    assert [len(b.nodes) for b in blocks(program)] == [6, 6]
    assert names(cut_points(program)) == ["embedding", "add_1", "add_3", "linear_4"]


def test_flat_residuals_with_sizes_from_the_input() -> None:
    s = Stream()
    batch, seq = (s.call(aten.sym_size.int, s.ids, d, type=ScalarType("int", n)) for d, n in ((0, "batch"), (1, "seq")))
    h, flat = s.embed(), TensorType(F32, ("batch*seq", 8))
    for k in range(2):
        x = s.call(aten.reshape.default, h, [-1, 8], type=flat, path=f"layers.{k}")
        branch = s.call(aten.silu.default, x, type=flat, path=f"layers.{k}")
        total = s.call(aten.add.Tensor, x, branch, type=flat, path=f"layers.{k}")
        h = s.op(aten.reshape.default, total, [batch, seq, 8], path=f"layers.{k}")
    program = s.close(h)
    assert [b.path for b in blocks(program)] == ["layers.0", "layers.1"]
    assert names(layout(program).prologue)[:2] == ["sym_size", "sym_size_1"]
    assert batch not in token_carriers(program), "a shape says nothing about the tokens"


def test_ambient_values_belong_to_the_prologue() -> None:
    s = Stream()
    mask = s.call(aten.to.dtype, s.input("mask", hidden(dtype=I64)), F32, type=hidden())
    h = s.embed()
    wide = s.call(aten.unsqueeze.default, mask, 2, type=hidden(1))
    for k in range(2):
        h = s.op(aten.add.Tensor, h, s.op(aten.mul.Tensor, h, wide, path=f"layers.{k}"), path=f"layers.{k}")
    program = s.close(h)
    assert [len(b.nodes) for b in blocks(program)] == [2, 2]
    assert [mask, wide] == [n for n in layout(program).prologue if n not in token_carriers(program)]


def test_between_finds_what_a_pass_put_there() -> None:
    program = tiny_mlp_program(blocks=2)
    plan = layout(program)
    block, outside = plan.blocks[1], set(plan.prologue)
    assert between(program, block.entry, block.exit, outside) == block.nodes
    node = next(n for n in block.nodes if is_call(n, aten.silu))
    editor = Editor(program, "test")
    new = editor.before(node).call(aten.relu.default, node.args[0], like=node)
    editor.replace(node, new)
    editor.erase(node)
    after = between(program, block.entry, block.exit, outside)
    assert new in after and node not in after and len(after) == len(block.nodes)
    assert between(program, block.exit, block.exit, outside) == ()
    assert between(program, program.inputs[0], block.entry, set()) == (*plan.prologue, *plan.blocks[0].nodes)


def test_linear_sites_say_why_not() -> None:
    s = Stream()
    h = s.embed()
    own = s.linear(h, path="own")
    weight, shared = s.param("v", s.random(8, 8)), s.param("shared", s.random(8, 8))
    stacked = s.param("experts", s.random(2, 8, 8))
    turned = s.call(aten.transpose.int, weight, 0, 1, type=TensorType(F32, (8, 8)))
    computed = s.op(aten.linear.default, own, turned, path="computed")
    first = s.op(aten.linear.default, computed, shared, path="first")
    second = s.op(aten.linear.default, first, shared)
    ends = s.call(aten.full.default, [2], 4, type=TensorType(torch.int32, (2,)), dtype=torch.int32)
    flat = s.call(aten.reshape.default, second, [-1, 8], type=TensorType(F32, ("batch*seq", 8)))
    s.call(nomul.grouped_linear.default, flat, stacked, ends, type=flat.meta["type"], path="mlp.experts")
    program = s.close(second, ties={"also": "head"})
    found, left = linear_sites(program, program.graph.nodes)
    assert [(f.name, f.node, f.weight, f.rows, f.inputs, f.bias) for f in found] == [("own", own, "w1", 8, 8, None)]
    assert left == [
        ("computed", "its weight is computed, not stored"),
        ("first", "its weight shared is shared with another reader"),
        (second.name, "its weight shared is shared with another reader"),
        ("mlp.experts", "its weights are stacked per expert, which only stays float so far"),
        ("linear_4", "its weight head is shared with another reader"),
    ]


def test_sites_know_shape_and_bias() -> None:
    s = Stream()
    weight, bias = s.param("up", s.random(24, 8)), s.param("b", s.random(24))
    up = s.op(aten.linear.default, s.embed(), weight, bias, width=24, path="mlp.up")
    program = s.program(up)
    ((site,), left) = linear_sites(program, program.graph.nodes)
    assert (site.rows, site.inputs, site.bias, left) == (24, 8, bias, [])
    assert site_name(up) == "mlp.up" and site_name(program.inputs[0]) == "ids"


def test_siblings_read_the_same_value() -> None:
    program, _ = traced("llama")
    sites, _ = linear_sites(program, blocks(program)[0].nodes)
    groups = [[s.name.rpartition(".")[2] for s in group] for group in sibling_sites(sites)]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("0", "model.layers.0.mlp", True),
        ("0", "model.layers.10.mlp", False),
        ("*q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.0.*", "model.layers.0.self_attn.q_proj", True),
        ("*.0.*", "model.layers.10.self_attn.q_proj", False),
        ("model.*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("model.*.q_proj", "model.layers.0.self_attn.q_proj.x", False),
        ("mlp.up", "model.mlp.up", False),
        ("mlp.up", "mlp.up", True),
        ("mlp.up", "mlpxup", False),
        ("mlp[.]*", "mlp.up", False),
        ("*", "", True),
        ("", "lm_head", False),
    ],
)
def test_patterns(pattern: str, name: str, wanted: bool) -> None:
    assert matches(pattern, name) is wanted


def test_view_is_the_whole_dataflow() -> None:
    program = tiny_mlp_program(blocks=1)
    view = graph_view(program)
    assert set(view) == set(names(program.graph.nodes))
    assert set(view.predecessors("mul")) == {"silu", "linear_1"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_of_architectures(name: str) -> None:
    program, _ = traced(name)
    plan = layout(program)
    assert len(plan.blocks) == 2 and plan.blocks[0].exit is plan.blocks[1].entry
    first, second = ([(str(n.target), str(n.meta["type"])) for n in b.nodes] for b in plan.blocks)
    assert first == second
    parts = [*plan.prologue, *(n for b in plan.blocks for n in b.nodes), *plan.epilogue]
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert len(parts) == len(set(parts)) == len(calls) and set(parts) == set(calls)
    residuals = [c for c in cut_points(program) if c in plan.blocks[0].nodes]
    assert (len(residuals) == 1) == (name in PARALLEL), names(residuals)
    cut = {n for b in plan.blocks for n in b.nodes}
    assert {"present_key_0", "present_value_1"} <= set(names(cut)) | set(names(plan.prologue))
    tokens = token_carriers(program)
    assert not any(n in tokens and is_call(n, aten.cos, aten.sin) for n in plan.prologue), "angles are ambient"


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_single_layer_models(name: str) -> None:
    program, _ = traced(name, 1)
    (block,) = blocks(program)
    assert block.path.endswith(".0") and block.entry in layout(program).prologue
    assert is_call(block.exit, aten.add)
    assert len(linear_sites(program, block.nodes)[0]) == {"llama": 7, "gpt2": 4}[name]


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
