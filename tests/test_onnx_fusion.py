"""Where fused operators are used, where they are not, and how an operator of one's own is emitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

from backends.onnxruntime import lowering
from backends.onnxruntime.emitter import Emitter
from backends.onnxruntime.groups import Fused
from backends.onnxruntime.lowering import emit_program, node_counts
from backends.onnxruntime.tables import STANDARD
from ir.program import Program
from ir.types import TensorType
from tests.onnx_runs import SIZES, function_program, onnx_outputs, sample, session_outputs

aten, nomul = torch.ops.aten, torch.ops.nomul
F32, BOOL = torch.float32, torch.bool
X = TensorType(F32, ("batch", "seq", 32))
PAST = TensorType(F32, ("batch", 2, "past", 8))
MASK = TensorType(BOOL, ("batch", 1, "seq", "past+seq"))
HALF = TensorType(F32, (1, "seq", 4))
ATTEND = aten.scaled_dot_product_attention.default


def heads(x: Any, count: int) -> Any:
    """[batch, seq, 32] as [batch, count, seq, 8], of the first channels."""
    some = aten.slice.Tensor(x, 2, 0, 8 * count)
    shape = [aten.sym_size.int(x, 0), aten.sym_size.int(x, 1), count, 8]
    return aten.transpose.int(aten.reshape.default(some, shape), 1, 2)


def merged(x: Any, like: Any) -> Any:
    shape = [aten.sym_size.int(like, 0), aten.sym_size.int(like, 1), -1]
    return aten.reshape.default(aten.transpose.int(x, 1, 2), shape)


def angles(f: Any, interleaved: bool) -> tuple[Any, Any]:
    both = aten.repeat_interleave.self_int(f, 2, -1) if interleaved else aten.cat.default([f, f], -1)
    cos = aten.mul.Tensor(aten.cos.default(both), 1.5)
    return aten.unsqueeze.default(cos, 1), aten.unsqueeze.default(aten.sin.default(both), 1)


def layer(interleaved: bool) -> Any:
    def function(x: Any, p: Any, v: Any, m: Any, f: Any) -> Any:
        cos, sin = angles(f, interleaved)
        q, k = (nomul.rope.default(heads(x, n), cos, sin, interleaved) for n in (4, 2))
        keys, values = aten.cat.default([p, k], 2), aten.cat.default([v, heads(x, 2)], -2)
        return [merged(ATTEND(q, keys, values, m, scale=0.2, enable_gqa=True), x), keys, values]

    return function


INPUTS = {"x": X, "p": PAST, "v": PAST, "m": MASK, "f": HALF}


def check(program: Program, folder: Path, fuse: bool = True) -> None:
    """Compare with torch for several sizes."""
    for index, sizes in enumerate(SIZES):
        inputs = [sample(node.meta["type"], seed, sizes) for seed, node in enumerate(program.inputs)]
        found = session_outputs(program, inputs, folder) if index else onnx_outputs(program, inputs, folder, fuse=fuse)
        for ours, theirs in zip(found, program.module()(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_layer_is_one_attention_and_two_rotations_without_a_move(interleaved: bool, tmp_path: Path) -> None:
    program = function_program(layer(interleaved), INPUTS)
    counts = node_counts(emit_program(program))
    assert counts["Attention"] == 1 and counts["RotaryEmbedding"] == 2
    assert not {"Transpose", "Softmax", "MatMul"} & set(counts)
    check(program, tmp_path)
    plain = node_counts(emit_program(program, fuse=False))
    assert "Attention" not in plain and plain["Softmax"] == 1
    check(program, tmp_path, fuse=False)


def test_part_of_the_channels_can_be_turned(tmp_path: Path) -> None:
    def function(x: Any, f: Any) -> Any:
        cos, sin = angles(f, False)
        q = nomul.rope.default(heads(x, 4), cos, sin, False)
        return merged(ATTEND(q, q, q, is_causal=True), x)

    program = function_program(function, {"x": X, "f": TensorType(F32, (1, "seq", 2))})
    assert node_counts(emit_program(program))["RotaryEmbedding"] == 1
    check(program, tmp_path)


def test_angles_that_are_not_shown_to_come_in_pairs_are_not_cut(tmp_path: Path) -> None:
    def function(x: Any, f: Any, g: Any) -> Any:
        cos = aten.unsqueeze.default(aten.cos.default(aten.cat.default([f, g], -1)), 1)
        q = nomul.rope.default(heads(x, 4), cos, cos, False)
        return merged(ATTEND(q, q, q), x)

    program = function_program(function, {"x": X, "f": HALF, "g": HALF})
    counts = node_counts(emit_program(program))
    assert "RotaryEmbedding" not in counts and "Attention" not in counts
    check(program, tmp_path)


def test_a_cache_that_something_else_reads_is_joined_by_itself(tmp_path: Path) -> None:
    def function(x: Any, p: Any, m: Any) -> Any:
        keys = aten.cat.default([p, heads(x, 2)], 2)
        return [merged(ATTEND(heads(x, 4), keys, keys, m, enable_gqa=True), x), aten.exp.default(keys)]

    program = function_program(function, {"x": X, "p": PAST, "m": MASK})
    assert node_counts(emit_program(program))["Concat"] == 1
    check(program, tmp_path)


def test_a_result_of_attention_that_is_read_as_it_is_keeps_its_dims(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        q = heads(x, 4)
        found = ATTEND(q, q, q)
        return [merged(found, x), aten.tanh.default(found)]

    check(function_program(function, {"x": X}), tmp_path)


def test_heads_that_lie_together_are_split_before_they_are_turned(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        shape = [aten.sym_size.int(x, 0), aten.sym_size.int(x, 1), 4, 12]
        pieces = aten.chunk.default(aten.transpose.int(aten.reshape.default(x, shape), 1, 2), 3, -1)
        q, k, v = (pieces[i] for i in range(3))
        return merged(ATTEND(q, k, v), x)

    program = function_program(function, {"x": TensorType(F32, ("batch", "seq", 48))})
    assert "Transpose" not in node_counts(emit_program(program))
    check(program, tmp_path)


@pytest.mark.parametrize("norm", [aten.rms_norm.default, aten.layer_norm.default])
def test_a_sum_and_its_norm_are_one_operator_unless_the_sum_is_read_earlier(norm: Any, tmp_path: Path) -> None:
    def late(x: Any, y: Any) -> Any:
        total = aten.add.Tensor(x, y)
        return [norm(total, [32], None, eps=1e-5), aten.neg.default(total)]

    def early(x: Any, y: Any) -> Any:
        total = aten.add.Tensor(x, y)
        other = aten.neg.default(total)
        return [norm(total, [32], None, eps=1e-5), other]

    for function, fused in ((late, True), (early, False)):
        program = function_program(function, {"x": X, "y": X})
        assert any("Skip" in op for op in node_counts(emit_program(program))) is fused
        check(program, tmp_path)


def test_a_norm_of_a_sum_with_broadcasting_stays(tmp_path: Path) -> None:
    program = function_program(
        lambda x, y: aten.rms_norm.default(aten.add.Tensor(x, y), [32]), {"x": X, "y": TensorType(F32, (32,))}
    )
    assert not any("Skip" in op for op in node_counts(emit_program(program)))
    check(program, tmp_path)


def twice(e: Emitter, node: Any) -> Any:
    """An operator of a domain of its own: y = s x, with what that means as a function in the file."""
    e.domain("mine", 1)
    x, s = onnx_ir.val("x"), onnx_ir.val("s")
    body = onnx_ir.node("Mul", [x, s])
    body.outputs[0].name = "y"
    graph = onnx_ir.Graph([x, s], body.outputs, nodes=[body], opset_imports={"": e.opset}, name="Times")
    e.function(onnx_ir.Function("mine", "Times", graph=graph, attributes=[]))
    factor = e.initializer("factor", (64, 32), F32, lambda: torch.full((64, 32), 2.0))
    return e.add("Times", e.value(node.args[0]), e.add("Slice", factor, [0], [1], [0]), domain="mine")


def test_an_operator_of_ones_own_can_bring_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "whole_table", lambda: {**STANDARD, aten.relu.default: twice})
    program = function_program(lambda x: aten.relu.default(aten.relu.default(x)), {"x": X})
    given = torch.randn(2, 3, 32)
    model = emit_program(program)
    assert node_counts(model)["mine::Times"] == 2 and len(model.functions) == 1
    torch.testing.assert_close(onnx_outputs(program, [given], tmp_path)[0], 4 * given)


def test_groups_of_ones_own_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs(program: Program) -> list[Fused]:
        """Two exponentials of one value, emitted at the first."""
        first, second = program.calls(aten.exp.default)

        def emit(e: Emitter) -> None:
            found = e.add("Exp", e.value(first.args[0]))
            e.bind(first, found)
            e.bind(second, e.add("Identity", found))

        return [Fused(first, (first, second), (first.args[0],), emit)]

    monkeypatch.setattr(lowering, "own_groups", lambda uniform: (pairs,))
    program = function_program(
        lambda x: aten.sub.Tensor(aten.neg.default(aten.exp.default(x)), aten.exp.default(x)), {"x": X}
    )
    assert node_counts(emit_program(program)) == {"Exp": 1, "Identity": 1, "Neg": 1, "Sub": 1}
    check(program, tmp_path)
