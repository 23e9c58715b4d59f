"""The cost of whole programs: counted by hand on tiny calls, complete on real architectures, consistent in its sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ir.cost_model import CostRow, ProgramCost, program_cost
from ir.energy import UNITS, arithmetic_pj, memory_pj
from ir.errors import UsageError
from ir.execute import empty_inputs
from ir.ops.cost import Cost
from ir.ops.shiftcode import encode
from ir.program import Program
from ir.types import TensorType
from tests.architectures import CONFIGS, ids_for, traced
from tests.programs import F32, I64, Sketch, hidden, tiny_mlp_program
from tests.tiny_model import compressed_tiny, tiny_program
from tools.costs import count_text

aten, nomul = torch.ops.aten, torch.ops.nomul
_PRODUCTS = ("aten.linear", "aten.matmul", "aten.bmm", "aten.baddbmm")


def cost_of(program: Program, op: str, **lengths: int) -> Cost:
    """The cost of the program's only call of an operator."""
    (calls, cost) = program_cost(program, **lengths).by_operator()[op]
    assert calls == 1
    return cost


def test_a_linear_by_hand() -> None:
    s = Sketch()
    x = s.input("x", hidden(8))
    args = (x, s.param("w", s.random(5, 8)), s.param("b", s.random(5)))
    program = s.program(s.call(aten.linear.default, *args, type=hidden(5)))
    # Weight, bias, inputs and results of 3 tokens, 4 bytes each; 7 sums and the bias for each of 15 results.
    moved = 4 * (5 * 8 + 5 + 3 * 8 + 3 * 5)
    assert cost_of(program, "aten.linear", tokens=3) == Cost(moved, 3 * 5 * 8, 15 * 7 + 15)


def test_an_embedding_reads_its_rows_alone() -> None:
    found = cost_of(tiny_mlp_program(vocab=1000), "aten.embedding", tokens=3)
    assert found == Cost(3 * 8 + 2 * 3 * 16 * 4)


def test_attention_with_a_cache_by_hand() -> None:
    s = Sketch()
    query = s.input("q", TensorType(F32, ("batch", 4, "seq", 8)))
    key, value = (s.input(n, TensorType(F32, ("batch", 2, "past + seq", 8))) for n in "kv")
    mask = s.input("mask", TensorType(F32, ("batch", 1, "seq", "past + seq")))
    out = s.call(
        aten.scaled_dot_product_attention.default, query, key, value, mask, enable_gqa=True, type=query.meta["type"]
    )
    program = s.program(out, symbols=("batch", "seq", "past"))
    rows, seen = 4 * 2, 3 + 2
    scores, results = rows * seen, rows * 8
    multiplies = scores * 8 + results * seen + results + 2 * scores  # products, scale, softmax
    adds = scores * 7 + results * (seen - 1) + scores + (3 * scores - 2 * rows)
    moved = 4 * (2 * results + 2 * 2 * seen * 8 + 2 * seen)
    found = cost_of(program, "aten.scaled_dot_product_attention", tokens=2, past=3)
    assert found == Cost(moved, multiplies, adds)


def test_norms_by_hand() -> None:
    s = Sketch()
    x, gain, bias = s.input("x", hidden(8)), s.param("g", s.random(8)), s.param("b", s.random(8))
    rms = s.call(aten.rms_norm.default, x, [8], gain, 1e-6, type=hidden(8))
    both = s.call(aten.layer_norm.default, rms, [8], gain, bias, type=hidden(8))
    program, n, rows = s.program(both), 16, 2
    # Squares, product with the root, gain; mean and root a row.
    assert cost_of(program, "aten.rms_norm", tokens=2) == Cost(4 * (2 * n + 8), 3 * n + 2 * rows, n)
    centred = Cost(4 * (2 * n + 16), 3 * n + 3 * rows, 4 * n - rows)
    assert cost_of(program, "aten.layer_norm", tokens=2) == centred


def test_experts_are_read_when_a_token_may_meet_them() -> None:
    s = Sketch()
    x, weight = s.input("x", TensorType(F32, ("seq", 8))), s.param("w", s.random(4, 5, 8))
    ends = s.param("ends", torch.ones(4, dtype=torch.int32))
    program = s.program(s.call(nomul.grouped_linear.default, x, weight, ends, type=TensorType(F32, ("seq", 5))))
    for tokens, experts in ((1, 1), (3, 3), (9, 4)):
        moved = 4 * (experts * 5 * 8 + tokens * 13 + 4)
        found = cost_of(program, "nomul.grouped_linear", tokens=tokens)
        assert found == Cost(moved, tokens * 40, tokens * 35)


def test_a_hadamard_transform_adds_and_never_multiplies() -> None:
    s = Sketch()
    x, signs = s.input("x", hidden(16)), s.param("signs", s.bytes(2))
    program = s.program(s.call(nomul.hadamard.default, x, signs, 16, type=hidden(16)))
    found = cost_of(program, "nomul.hadamard", tokens=2)
    assert found == Cost(2 + 4 * 2 * 32, 0, 2 * 16 * 4)


def test_nested_planes_cost_what_their_precision_reads() -> None:
    def at(precision: int) -> Cost:
        s = Sketch()
        alpha = torch.rand(16, 1, 3, generator=torch.Generator().manual_seed(0)) + 0.5
        signs = torch.where(s.random(3, 16, 32) < 0, -1.0, 1.0)
        one = [encode(signs[:p], alpha[..., :p], None, 32, 2) for p in (2, 3)]
        planes = s.param("signs", one[1].signs)
        scales = [s.param(f"scales.{i}", c.scales) for i, c in enumerate(one)]
        exponents = [s.param(f"exponents.{i}", c.exponents) for i, c in enumerate(one) if c.exponents is not None]
        args = (s.input("x", hidden(32)), planes, scales, exponents, [], None, 32, 2, 1, [2, 3], precision)
        program = s.program(s.call(nomul.nested_linear.default, *args, type=hidden(16)))
        return cost_of(program, "nomul.nested_linear")

    low, high = at(2), at(3)
    # One look-up for 8 inputs, row and plane; two shifts for every scale of a row.
    assert (low.multiplies, low.lookups, low.shifts) == (0, 2 * 16 * 4, 2 * 16 * 2)
    assert (high.multiplies, high.lookups, high.shifts) == (0, 3 * 16 * 4, 3 * 16 * 2)
    # A plane more, and a scale of two nibbles a row.
    assert high.bytes - low.bytes == 16 * 4 + 16


@pytest.mark.parametrize("name", CONFIGS)
def test_every_operator_of_every_architecture_has_a_cost(name: str) -> None:
    program = traced(name)[0]
    for lengths in ({"tokens": 5, "past": 0}, {"tokens": 1, "past": 7}):
        found = program_cost(program, **lengths)
        assert not found.unknown and found.total.multiplies > 0


@pytest.mark.parametrize("name", ["gptj", "bloom"])
def test_products_agree_with_torchs_own_count(name: str) -> None:
    program, ids = traced(name)[0], ids_for(1, 6)
    inputs = empty_inputs(program, ids)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.module()(*[inputs[node.name] for node in program.inputs])
    operators = program_cost(program, tokens=6).by_operator()
    multiplies = {op: operators[op][1].multiplies for op in _PRODUCTS if op in operators}
    # Beside 16 products a result, baddbmm's has a scale, which torch leaves out.
    multiplies["aten.baddbmm"] = multiplies.get("aten.baddbmm", 0) // 17 * 16
    assert sum(multiplies.values()) == counter.get_total_flops() // 2


def test_sums_by_operator_and_by_site_are_the_total() -> None:
    found = program_cost(compressed_tiny(), tokens=3, past=4)
    total = Cost()
    for row in found.rows:
        total += row.cost
    assert total == found.total and total.bytes > 0
    for parts in ([c for _, c in found.by_operator().values()], list(found.by_site().values())):
        again = Cost()
        for cost in parts:
            again += cost
        assert again == found.total
    assert sum(calls for calls, _ in found.by_operator().values()) == len(found.rows)
    assert "model.layers.0.mlp.up_proj" in found.by_site()


def test_shift_add_linears_do_not_multiply() -> None:
    program = compressed_tiny()
    found, plain = program_cost(program), program_cost(tiny_program())
    shifted = [row for row in found.rows if row.op == "nomul.shiftadd_linear"]
    assert len(shifted) == 7
    for row in shifted:
        assert row.cost.multiplies == 0 and row.cost.shifts > 0 and row.cost.lookups > 0
        # Every look-up is followed by an add.
        assert row.cost.adds >= row.cost.lookups
    # What is gone is exactly the float products of those sites, and only codes that are not planes still multiply.
    before, after = plain.by_site(), found.by_site()
    for row in shifted:
        assert after[row.site].multiplies == 0 and before[row.site].multiplies > 0
        assert after[row.site].bytes < before[row.site].bytes
    untouched = {
        s for s in before if s not in {r.site for r in found.rows if r.op.startswith("nomul.") and "rope" not in r.op}
    }
    assert all(before[s] == after[s] for s in untouched)


def test_work_grows_with_tokens_and_attention_with_the_past() -> None:
    program = tiny_program()
    one, six, later = program_cost(program), program_cost(program, tokens=6), program_cost(program, past=9)
    linear = "aten.linear"
    assert six.by_operator()[linear][1].multiplies == 6 * one.by_operator()[linear][1].multiplies
    # Weights are read once, however many tokens.
    assert six.by_operator()[linear][1].bytes < 2 * one.by_operator()[linear][1].bytes
    assert later.by_operator()[linear] == one.by_operator()[linear]
    attention = "aten.scaled_dot_product_attention"
    # Two heads' products over 8 channels and the softmax, for each position seen; the scale belongs to the query.
    growth = later.by_operator()[attention][1].multiplies - one.by_operator()[attention][1].multiplies
    assert growth == 2 * 9 * 4 * (8 + 8 + 2)


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a weight was read")

    program = compressed_tiny()
    monkeypatch.setattr(program.params, "get", refuse)
    assert program_cost(program).total.bytes > 0


def test_what_is_not_counted_is_named() -> None:
    s = Sketch()
    x = s.input("x", hidden(8))
    odd = s.call(aten.einsum.default, "bsk,bsk->bs", [x, x], type=TensorType(F32, ("batch", "seq")))
    strange = s.input("y", TensorType(F32, ("elsewhere",)))
    late = s.call(aten.exp.default, strange, type=TensorType(F32, ("elsewhere",)))
    found = program_cost(s.program(odd, late, s.call(aten.exp.default, x, type=hidden(8))), tokens=2)
    assert [line.partition(":")[0] for line in found.unknown] == ["aten.einsum", "aten.exp"]
    assert "elsewhere" in found.unknown[1] and "1 calls" in found.unknown[0]
    # The call that can be counted still is.
    assert found.total == Cost(2 * 4 * 16, 16)


@pytest.mark.parametrize(("tokens", "past"), [(0, 0), (1, -1)])
def test_lengths_out_of_range_are_refused(tokens: int, past: int) -> None:
    with pytest.raises(UsageError):
        program_cost(tiny_mlp_program(), tokens=tokens, past=past)


def test_casts_cost_only_where_the_dtype_changes() -> None:
    s = Sketch()
    ids = s.input("ids", hidden(dtype=I64))
    same = s.call(aten.to.dtype, ids, I64, type=hidden(dtype=I64))
    other = s.call(aten.to.dtype, same, F32, type=hidden())
    rows = program_cost(s.program(other), tokens=2).rows
    assert [row.cost for row in rows] == [Cost(), Cost(2 * 8 + 2 * 4)]


def test_energy_is_counts_times_prices() -> None:
    cost = Cost(bytes=7, multiplies=1000, adds=200, shifts=30, lookups=4)
    assert arithmetic_pj(cost, UNITS["fp16"]) == pytest.approx(900 + 80 + 3.9 + 1.48)
    assert arithmetic_pj(cost, UNITS["int32"]) == pytest.approx(3100 + 20 + 3.9 + 1.48)
    assert arithmetic_pj(replace(cost, bytes=0), UNITS["fp32"]) == arithmetic_pj(cost, UNITS["fp32"])
    assert memory_pj(cost) == 700


def test_counts_in_words() -> None:
    texts = [count_text(n) for n in (0, 999, 1000, 12_345, 999_600, 135_000_000, 4_210_000_000)]
    assert texts == ["0", "999", "1 k", "12.3 k", "1 M", "135 M", "4.21 G"]


def test_an_empty_cost_has_no_rows() -> None:
    assert ProgramCost(1, 0, ()).total == Cost() and not ProgramCost(1, 0, (CostRow("a", "a", "b", Cost()),)).unknown
