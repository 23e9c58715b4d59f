"""Structure read off the dataflow: cuts, blocks and sites of hand-built and real programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

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
from ir.program import Program, is_call
from ir.types import ScalarType, TensorType
from tests.architectures import traced
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


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "opt", "bloom"))]
)
def test_the_block_of_a_single_layer_is_the_first_of_two(name: str) -> None:
    (one,), (first, _) = blocks(traced(name, 1)[0]), blocks(traced(name)[0])
    assert names(one.nodes) == names(first.nodes)
    assert (one.path, one.entry.name, one.exit.name) == (first.path, first.entry.name, first.exit.name)


def test_positions_before_and_reshapes_after_a_single_layer() -> None:
    s = Stream()
    flat = TensorType(F32, ("batch*seq", 8))
    positions = s.param("positions", s.random(4, 8))
    h = s.op(aten.add.Tensor, s.embed(), positions)
    x = s.call(aten.reshape.default, h, [-1, 8], type=flat)
    branch = s.call(aten.linear.default, x, s.param("w", s.random(8, 8)), type=flat)
    total = s.call(aten.add.Tensor, x, branch, type=flat)
    out = s.op(aten.reshape.default, total, [2, 4, 8])
    ((block,),) = (blocks(s.close(out)),)
    assert (block.entry, block.exit) == (x, out) and block.nodes == (branch, total, out)
