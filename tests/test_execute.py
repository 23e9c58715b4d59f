"""Running a program part by part gives what running it whole gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ir.analysis import layout
from ir.execute import empty_inputs, logits_by_row, next_inputs, run_in_parts, with_positions_in
from ir.program import Program
from ir.types import ScalarType
from tests.architectures import doubled, ids_for, traced
from tests.programs import Sketch, aten, hidden, tiny_mlp_program

SLOW = ["qwen2", "qwen3_moe", "gptj", "neox", "phi3", "gemma2", "falcon", "stablelm", "bloom", "cohere", "granite"]
ARCHITECTURES = ["llama", "gpt2", "opt", "mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]


def whole(program: Program, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return program.module()(*[inputs[n.name] for n in program.inputs])


def assert_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def embedding(s: Sketch) -> tuple[object, object]:
    """Token ids of 16 words and their embedding of width 8."""
    table = s.param("embed", s.random(16, 8))
    ids = s.input("ids", hidden(dtype=torch.int64))
    return ids, s.call(aten.embedding.default, table, ids, type=hidden(8))


def without_blocks() -> Program:
    """Embedding and head alone: nothing repeats."""
    s = Sketch()
    head = s.param("head", s.random(16, 8))
    _, h = embedding(s)
    s.input("mask", hidden(dtype=torch.int64))
    return s.program(s.call(aten.linear.default, h, head, type=hidden(16)))


def with_states() -> Program:
    """Three equal blocks whose exits are outputs too, the first of them read by the epilogue again."""
    s = Sketch()
    weights = [s.param(f"w{i}", s.random(8, 8)) for i in range(3)]
    head = s.param("head", s.random(16, 8))
    _, h = embedding(s)
    s.input("mask", hidden(dtype=torch.int64))
    exits = []
    for weight in weights:
        up = s.call(aten.silu.default, s.call(aten.linear.default, h, weight, type=hidden(8)), type=hidden(8))
        h = s.call(aten.add.Tensor, h, up, type=hidden(8))
        exits.append(h)
    return s.program(s.call(aten.linear.default, h, head, type=hidden(16)), *exits)


def with_ambient_size() -> Program:
    """A block reads a size and a ramp made in the prologue."""
    s = Sketch()
    head = s.param("head", s.random(16, 8))
    ids, h = embedding(s)
    s.input("mask", hidden(dtype=torch.int64))
    size = s.call(aten.sym_size.int, ids, 1, type=ScalarType("int", "seq"))
    batch = s.call(aten.sym_size.int, ids, 0, type=ScalarType("int", "batch"))
    for _ in range(2):
        flat = s.call(aten.reshape.default, h, [batch, size, 2, 4], type=hidden(2, 4))
        joined = s.call(
            aten.reshape.default, s.call(aten.silu.default, flat, type=hidden(2, 4)), [batch, size, 8], type=hidden(8)
        )
        h = s.call(aten.add.Tensor, h, joined, type=hidden(8))
    last = s.call(aten.reshape.default, h, [batch, size, 8], type=hidden(8))
    return s.program(s.call(aten.linear.default, last, head, type=hidden(16)))


HAND_BUILT = [without_blocks, with_states, with_ambient_size]


@pytest.mark.parametrize("build", HAND_BUILT)
def test_hand_built_programs(build: Callable[[], Program]) -> None:
    program, ids = build(), torch.arange(12).view(3, 4)
    inputs = empty_inputs(program, ids)
    wanted = whole(program, inputs)
    assert_equal(run_in_parts(program, inputs), wanted)
    rows = list(logits_by_row(program, ids))
    assert [r.shape for r in rows] == [(1, 4, 16)] * 3
    torch.testing.assert_close(torch.cat(rows), wanted[0], rtol=0, atol=1e-6)


def test_the_hand_built_programs_have_the_blocks_they_claim() -> None:
    assert [len(layout(build()).blocks) for build in HAND_BUILT] == [0, 3, 2]


def test_program_without_mask() -> None:
    program = tiny_mlp_program()
    ids = torch.arange(6).view(2, 3)
    assert_equal(run_in_parts(program, {"input_ids": ids}), whole(program, {"input_ids": ids}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_equal_the_whole(name: str) -> None:
    program, _ = traced(name)
    inputs = empty_inputs(program, ids_for(2, 7))
    wanted = whole(program, inputs)
    assert len(wanted) == 5
    assert_equal(run_in_parts(program, inputs), wanted)
    assert_equal(run_in_parts(program, inputs, plan=layout(program)), wanted)
    after = next_inputs(program, ids_for(2, 1, seed=2), wanted)
    assert_equal(run_in_parts(program, after), whole(program, after))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_equal_the_whole(name: str) -> None:
    program, _ = traced(name)
    ids = ids_for(3, 7)
    wanted = whole(program, empty_inputs(program, ids))[0]
    rows = list(logits_by_row(program, ids))
    assert [r.shape for r in rows] == [(1, 7, wanted.shape[-1])] * 3
    torch.testing.assert_close(torch.cat(rows), wanted, rtol=0, atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1, "rows that are alike would prove nothing"


def test_reading_rows_leaves_gradients_on() -> None:
    program, ids = with_states(), torch.arange(6).view(2, 3)
    one, other = logits_by_row(program, ids), logits_by_row(program, ids)
    for first, second in zip(one, other, strict=True):
        assert torch.is_grad_enabled() and not first.requires_grad and not second.requires_grad
    abandoned = logits_by_row(program, ids)
    next(abandoned)
    assert torch.is_grad_enabled()


def test_one_block_of_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = traced("llama")
    order: list[str] = []
    load = type(program.params).get

    def get(store: object, name: str) -> Tensor:
        order.append(name)
        return load(store, name)  # type: ignore[arg-type]

    monkeypatch.setattr(type(program.params), "get", get)
    run_in_parts(program, empty_inputs(program, ids_for()))
    layers = [int(n.split(".")[2]) for n in order if n.startswith("model.layers.")]
    assert layers == sorted(layers) and set(layers) == {0, 1} and len(layers) == 18


def test_float64_parts_are_closer_to_exact_than_float32() -> None:
    program, _ = traced("llama")
    ids = ids_for(2, 7)
    exact = doubled(program)
    inputs = empty_inputs(program, ids, torch.float64)
    wanted = whole(exact, inputs)[0]
    found = run_in_parts(with_positions_in(program, torch.float64), inputs, torch.float64)[0]
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    narrow = run_in_parts(program, empty_inputs(program, ids))[0]
    assert (narrow.double() - wanted).abs().max() > 1e-8


def test_inputs_for_prefill_and_for_the_next_tokens() -> None:
    program, _ = traced("llama")
    ids = ids_for(2, 7)
    first = empty_inputs(program, ids)
    assert list(first) == [n.name for n in program.inputs]
    assert first["attention_mask"].tolist() == [[1] * 7] * 2
    assert first["past_key_0"].shape == (2, 2, 0, 16)
    outputs = whole(program, first)
    after = next_inputs(program, ids[:, :1], outputs)
    assert after["attention_mask"].shape == (2, 8) and after["past_value_1"] is outputs[4]
