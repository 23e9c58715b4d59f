"""Duplicates merge only when an operator could not tell them apart; only small constants are folded, never weights."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from ir.program import ORIGIN, TYPE, Program
from ir.simplify import FOLD_ELEMENTS, fold_constants, merge_duplicates, pure
from ir.text import dump
from ir.types import ScalarType, TensorType
from tests.programs import F32, Sketch, aten, hidden

VECTOR = TensorType(F32, (8,))


def pair(target: Any, first: tuple[Any, ...], second: tuple[Any, ...], **kwargs: Any) -> Program:
    """Two calls on an input x, their arguments after it given."""
    s = Sketch()
    x = s.input("x", hidden(8))
    calls = [s.call(target, x, *args, type=hidden(8), **kwargs) for args in (first, second)]
    return s.program(*calls)


def run(program: Program, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return program.module()(*inputs)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.mul.Tensor, (2.0,)),
        (aten.add.Tensor, (1,)),
        (aten.transpose.int, (1, 2)),
        (aten.reshape.default, ([4, -1],)),
    ],
)
def test_equal_calls_become_one(target: Any, args: tuple[Any, ...]) -> None:
    program = pair(target, args, args)
    assert merge_duplicates(program, "t") == 1
    first, second = program.outputs
    assert first is second
    assert [n.op for n in program.graph.nodes] == ["placeholder", "call_function", "output"]


NOT_SAME = [
    ((1,), (1.0,)),
    ((1,), (True,)),
    ((1.0,), (True,)),
    ((0.0,), (-0.0,)),
    ((1.0,), (1.0000001,)),
    ((0,), (False,)),
]


@pytest.mark.parametrize(("first", "second"), NOT_SAME)
def test_constants_of_other_kinds_keep_calls_apart(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    program = pair(aten.mul.Tensor, first, second)
    before = dump(program)
    assert merge_duplicates(program, "t") == 0 and dump(program) == before


@pytest.mark.parametrize(("first", "second"), [([1, 2], [1, 2.0]), ([1, 2], [1, 3]), ([1, 2], [1])])
def test_lists_are_compared_item_by_item(first: list[Any], second: list[Any]) -> None:
    assert merge_duplicates(pair(aten.reshape.default, (first,), (second,)), "t") == 0


def test_zeros_of_either_sign_stay_apart_in_value() -> None:
    program = pair(aten.mul.Tensor, (0.0,), (-0.0,))
    merge_duplicates(program, "t")
    plus, minus = run(program, torch.ones(1, 1, 8))
    assert not torch.signbit(plus).any() and torch.signbit(minus).all()


def test_named_arguments_count() -> None:
    s = Sketch()
    x = s.input("x", hidden(8))
    kinds = ["none", "tanh", "tanh"]
    program = s.program(*(s.call(aten.gelu.default, x, approximate=k, type=hidden(8)) for k in kinds))
    assert merge_duplicates(program, "t") == 1
    assert program.outputs[0] is not program.outputs[1] is program.outputs[2]


def test_merging_reaches_what_follows() -> None:
    s = Sketch()
    x = s.input("x", hidden(8))
    ends = [s.call(aten.silu.default, s.call(aten.neg.default, x, type=hidden(8)), type=hidden(8)) for _ in range(3)]
    program = s.program(*ends)
    assert merge_duplicates(program, "t") == 4
    assert len(set(program.outputs)) == 1


def test_different_dtypes_and_nodes_stay_apart() -> None:
    s = Sketch()
    x, y = s.input("x", hidden(8)), s.input("y", hidden(8))
    casts = [s.call(aten.to.dtype, x, d, type=hidden(8, dtype=d)) for d in (torch.float64, torch.float16)]
    program = s.program(*casts, *(s.call(aten.neg.default, v, type=hidden(8)) for v in (x, y)))
    assert merge_duplicates(program, "t") == 0


def test_impure_calls_are_not_merged() -> None:
    s = Sketch()
    x = s.input("x", hidden(8))
    random = [s.call(aten.rand_like.default, x, type=hidden(8)) for _ in range(2)]
    written = [s.call(aten.add_.Tensor, r, 1.0, type=hidden(8)) for r in (random[0], random[0])]
    program = s.program(*random, *written)
    assert not any(pure(n) for n in (*random, *written))
    assert merge_duplicates(program, "t") == 0


def test_python_functions_merge_too() -> None:
    s = Sketch()
    x = s.input("x", hidden(8))
    size = s.call(aten.sym_size.int, x, 1, type=ScalarType("int", "seq"))
    sums = [s.call(operator.add, size, k, type=ScalarType("int", "seq+1")) for k in (1, 1, 1.0)]
    program = s.program(*sums)
    assert merge_duplicates(program, "t") == 1


def constant_sketch() -> tuple[Sketch, Any]:
    s = Sketch()
    return s, s.input("x", hidden(8))


def test_vectors_are_folded() -> None:
    s, x = constant_sketch()
    gain = s.param("norm.weight", s.random(8))
    one = s.call(aten.add.Tensor, gain, 1.0, type=VECTOR)
    twice = s.call(aten.mul.Tensor, one, 2.0, type=VECTOR)
    program = s.program(s.call(aten.rms_norm.default, x, [8], twice, 1e-6, type=hidden(8)))
    sample = torch.randn(2, 3, 8)
    (before,) = run(program, sample)
    assert fold_constants(program, "canon") == 2
    assert torch.equal(run(program, sample)[0], before)
    (node,) = program.param_nodes()
    assert torch.equal(program.value(node), (s.tensors["norm.weight"] + 1) * 2)
    assert node.meta[ORIGIN] == "canon" and node.meta[TYPE] == VECTOR
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [aten.rms_norm.default]
    assert "norm.weight" not in program.params, "what nothing reads is dropped"


def test_weights_are_never_folded() -> None:
    s, x = constant_sketch()
    weight = s.param("w", s.random(8, 8))
    turned = s.call(aten.transpose.int, weight, 0, 1, type=TensorType(F32, (8, 8)))
    scaled = s.call(aten.mul.Tensor, turned, 2.0, type=TensorType(F32, (8, 8)))
    program = s.program(s.call(aten.matmul.default, x, scaled, type=hidden(8)))
    before = dump(program)
    assert fold_constants(program, "t") == 0 and dump(program) == before


def test_a_vector_times_a_weight_is_not_folded() -> None:
    s, x = constant_sketch()
    weight, gain = s.param("w", s.random(8, 8)), s.param("g", s.random(8))
    scaled = s.call(aten.mul.Tensor, weight, gain, type=TensorType(F32, (8, 8)))
    program = s.program(s.call(aten.linear.default, x, scaled, type=hidden(8)))
    assert fold_constants(program, "t") == 0


@pytest.mark.parametrize(("rows", "folded"), [(FOLD_ELEMENTS // 8, 1), (FOLD_ELEMENTS // 8 + 1, 0)])
def test_folding_never_makes_a_program_much_larger(rows: int, folded: int) -> None:
    s, x = constant_sketch()
    gain = s.param("g", s.random(8))
    kind = TensorType(F32, (rows, 8))
    wide = s.call(aten.expand.default, gain, [rows, 8], type=kind)
    total = s.call(aten.sum.dim_IntList, wide, [0], type=VECTOR)
    program = s.program(s.call(aten.mul.Tensor, x, total, type=hidden(8)))
    assert fold_constants(program, "t") == folded
    assert program.params.total_bytes() <= 4 * FOLD_ELEMENTS


def test_random_and_input_dependent_calls_are_not_folded() -> None:
    s, x = constant_sketch()
    gain = s.param("g", s.random(8))
    noise = s.call(aten.rand_like.default, gain, type=VECTOR)
    size = s.call(aten.sym_size.int, x, 1, type=ScalarType("int", "seq"))
    ramp = s.call(aten.arange.default, size, type=TensorType(torch.int64, ("seq",)))
    full = s.call(aten.full.default, [8], 1.0, type=VECTOR)
    program = s.program(noise, ramp, full)
    assert fold_constants(program, "t") == 0


def test_a_result_of_another_type_than_recorded_is_left() -> None:
    s, _ = constant_sketch()
    gain = s.param("g", s.random(8))
    program = s.program(s.call(aten.add.Tensor, gain, 1.0, type=TensorType(F32, (9,))))
    assert fold_constants(program, "t") == 0


def test_folded_names_never_collide() -> None:
    s, x = constant_sketch()
    gain, old = s.param("g", s.random(8)), s.param("constants.add", s.random(8))
    one = s.call(aten.add.Tensor, gain, 1.0, type=VECTOR)
    assert one.name == "add"
    out = s.call(aten.mul.Tensor, s.call(aten.mul.Tensor, x, one, type=hidden(8)), old, type=hidden(8))
    program = s.program(out)
    sample = torch.randn(1, 2, 8)
    (before,) = run(program, sample)
    assert fold_constants(program, "t") == 1
    assert torch.equal(run(program, sample)[0], before)
