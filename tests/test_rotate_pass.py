"""`rotate`: the same function in a random basis for every architecture, at the price of the operators it says."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from frontend.canonical import canonicalise
from frontend.hf import skeleton, trace
from ir.analysis import LinearSite, blocks, linear_sites, sibling_sites
from ir.edit import Editor
from ir.errors import InvariantError, UnsupportedError, UsageError
from ir.ops.hadamard import hadamard_matrix
from ir.ops.packing import pack_bits, unpack_bits
from ir.parse import parse
from ir.program import Program, is_call
from ir.text import dump
from ir.verify import verify
from passes.base import Context, Log
from passes.equiv.heads import value_heads
from passes.equiv.turns import Turn, peak, random_signs, turned_bias, turned_weight
from passes.fold import Fold
from passes.manager import Settings, run_pipeline
from passes.pipeline import check, schedule
from passes.pipeline import parse as parse_pipeline
from passes.rotate import Rotate
from passes.rotation import rotate_sites
from passes.stream import observe
from tests.architectures import (
    CONFIGS,
    VOCAB,
    bind,
    doubled,
    ids_for,
    prefill_and_decode,
    randomise,
    relative_error,
    traced,
)
from tests.golden import check_golden

aten, nomul = torch.ops.aten, torch.ops.nomul
F64 = torch.float64

QUICK = ["llama", "qwen2", "qwen3", "gemma", "mixtral", "phi3", "olmo2", "gpt2", "neox", "opt", "phi", "falcon"]
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in QUICK)]


@cache
def _shaped(width: int, heads: int, shared: int, inner: int) -> Program:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        num_hidden_layers=1,
        vocab_size=VOCAB,
        attention_bias=True,
        mlp_bias=True,
    )
    return _bound(config, f"llama{width}")


def _bound(config: Any, name: str) -> Program:
    program = trace(config, name)
    canonicalise(program)
    model = skeleton(config, program.attributes["attention"])
    randomise(model)
    bind(program, model.state_dict())
    return program


def nasty(program: Program) -> Program:
    """A float64 copy whose weights span twelve decades within every row, rows scaled back to unit norm."""
    wide, generator = doubled(program), torch.Generator().manual_seed(11)
    for name in linear_weights(wide):
        weight = wide.params.get(name)
        scales = 10.0 ** (12 * torch.rand(weight.shape, generator=generator, dtype=F64) - 6)
        Editor(wide, "test").param(name, torch.nn.functional.normalize(weight * scales, dim=-1))
    return wide


def linear_weights(program: Program) -> list[str]:
    return [s.weight for s in linear_sites(program, program.graph.nodes)[0]]


def sites_of(program: Program) -> list[LinearSite]:
    return linear_sites(program, [n for b in blocks(program) for n in b.nodes])[0]


def rotated(program: Program, pass_: Rotate | None = None) -> tuple[Program, Log]:
    """A rotated copy, verified by running it on fake tensors, and what the pass said."""
    copy, log = program.clone(), Log("rotate")
    (pass_ or Rotate()).run(copy, Context(log=log))
    verify(copy, full=True)
    return copy, log


def ops(program: Program) -> list[fx.Node]:
    return list(program.calls(nomul.hadamard))


def turn_matrix(signs: Tensor, order: int) -> Tensor:
    """H D, block diagonal, in float64."""
    h = torch.block_diag(*[hadamard_matrix(order).double()] * (signs.numel() // order))
    return h * (signs.double() * 2 - 1)


def error(found: Program, wanted: Program) -> float:
    return relative_error(prefill_and_decode(found, ids_for()), prefill_and_decode(wanted, ids_for()))


@pytest.mark.parametrize("side", ["inputs", "both"])
@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_under_nasty_weights(name: str, side: Any) -> None:
    program = nasty(traced(name, 1)[0])
    turned, log = rotated(program, Rotate(side=side))
    assert error(turned, program) < 1e-10
    reported = {r.site for r in log.reports if "order" in r.figures}
    assert reported == {s.name for s in sites_of(program)}
    for site in sites_of(program):
        assert not torch.equal(turned.params.get(site.weight), program.params.get(site.weight))


@pytest.mark.parametrize(
    ("name", "side"),
    [("llama", "inputs"), ("gpt2", "inputs"), *(pytest.param(n, "both", marks=pytest.mark.slow) for n in QUICK)],
)
def test_blocks_stay_alike(name: str, side: Any) -> None:
    program = doubled(traced(name)[0])
    turned, _ = rotated(program, Rotate(side=side))
    before, after = blocks(program), blocks(turned)
    assert [b.path for b in after] == [b.path for b in before] and len(after) == 2
    assert [b.entry.name for b in after] == [b.entry.name for b in before]
    assert len({len(b.nodes) for b in after}) == 1 and len(after[0].nodes) > len(before[0].nodes)
    assert sum(n in set(after[0].nodes) for n in ops(turned)) * 2 == len(ops(turned))
    assert error(turned, program) < 1e-10


@pytest.mark.real
def test_a_real_model_keeps_its_blocks_and_pays_little() -> None:
    from frontend.open import open_model

    program = open_model("smollm2-135m").program.clone()
    Fold().run(program, Context())
    done = rotate_sites(program, sites_of(program), seed=0, by="test")
    assert len(blocks(program)) == 30 and not done.left
    assert [adds for _, adds in done.online] == [576 * 24, 576 * 24, 1536 * 18] * 30
    orders = {row.site.rpartition(".")[2]: row.order for row in done.sites}
    assert (orders["q_proj"], orders["o_proj"], orders["down_proj"]) == (576, 64, 1536)
    before, after = (sum(getattr(row, key) for row in done.sites) for key in ("before", "after"))
    assert after < 0.6 * before


@pytest.mark.parametrize("name", QUICK)
def test_values_turn_inside_the_weights_of_every_architecture(name: str) -> None:
    program = traced(name, 1)[0]
    turned, _ = rotated(program)
    heads, blocked = value_heads(program, {s.node for s in sites_of(program)})
    assert len(heads) == 1 and not blocked
    for sink in heads[0].sinks:
        reader = turned.node(sink.node.name)
        assert not is_call(reader.args[0], nomul.hadamard)
    others = {s.node.args[0].name for s in sites_of(program)} - {s.node.args[0].name for s in heads[0].sinks}  # type: ignore[union-attr]
    assert {n.args[0].name for n in ops(turned)} == others  # type: ignore[union-attr]
    assert error(*(doubled(p) for p in rotated_in_double(program, online=False))) < 1e-10


def rotated_in_double(program: Program, **options: Any) -> tuple[Program, Program]:
    wide = doubled(program)
    return rotated(wide, Rotate(**options))[0], wide


@pytest.mark.parametrize(
    ("width", "heads", "shared", "inner", "order", "input_order"),
    [
        (48, 4, 2, 44, 12, 48),
        (40, 2, 1, 60, 20, 40),
        (72, 2, 2, 28, 36, 72),
        (24, 4, 2, 52, 2, 24),
        (576, 9, 3, 1536, 64, 576),
    ],
)
@pytest.mark.parametrize("side", ["inputs", "both"])
def test_head_dims_and_widths_that_are_no_powers_of_two(
    width: int, heads: int, shared: int, inner: int, order: int, input_order: int, side: Any
) -> None:
    program = nasty(_shaped(width, heads, shared, inner))
    turned, log = rotated(program, Rotate(side=side))
    orders = {r.site.rpartition(".")[2]: r.figures["order"] for r in log.reports if "order" in r.figures}
    assert orders["o_proj"] == order and orders["q_proj"] == orders["gate_proj"] == input_order
    assert error(turned, program) < 1e-10


def test_an_odd_head_dim_leaves_the_output_projection_to_an_operator() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=28, n_head=4, n_layer=1, vocab_size=VOCAB, n_positions=64)
    program = nasty(_bound(config, "odd"))
    turned, _ = rotated(program)
    assert error(turned, program) < 1e-10
    assert len(ops(turned)) == 4
    kept, log = rotated(program, Rotate(online=False))
    assert not ops(kept) and {d.site for d in log.diagnostics} >= {s.name for s in sites_of(program)}


def test_every_head_turns_by_its_own_rotation_in_both_weights() -> None:
    program = doubled(traced("llama", 1)[0])
    turned, _ = rotated(program, Rotate(online=False, seed=5))
    v, o = (next(s for s in sites_of(program) if s.name.endswith(n)) for n in ("v_proj", "o_proj"))
    signs = random_signs(5, f"{o.name}/values", 32).view(2, 16)
    assert not torch.equal(signs[0], signs[1])
    rows = torch.block_diag(*[turn_matrix(s, 16) / 4 for s in signs])
    # Four query heads read two value heads in turn: 0 0 1 1.
    columns = torch.block_diag(*[turn_matrix(signs[h], 16) / 4 for h in (0, 0, 1, 1)])
    torch.testing.assert_close(turned.params.get(v.weight), rows @ program.params.get(v.weight))
    torch.testing.assert_close(turned.params.get(o.weight), program.params.get(o.weight) @ columns.T)
    wrong = torch.block_diag(*[turn_matrix(signs[h], 16) / 4 for h in (0, 1, 0, 1)])
    Editor(turned, "test").param(o.weight, program.params.get(o.weight) @ wrong.T)
    assert error(turned, program) > 0.01


def test_one_operator_serves_all_that_read_a_value() -> None:
    program = doubled(traced("llama")[0])
    turned, log = rotated(program)
    groups = [[s.name.rpartition(".")[2] for s in g] for g in sibling_sites(sites_of(turned))]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2
    assert [n.name.partition("layers_0_")[2] for n in ops(turned)[:3]] == [
        "input_layernorm_hadamard",
        "post_attention_layernorm_hadamard",
        "mlp_mul_hadamard",
    ]
    assert {r.site: r.figures["adds"] for r in log.reports if "adds" in r.figures} == {
        n.name: 64 * 6 if "norm" in n.name else 128 * 7 for n in ops(turned)
    }
    q = next(s for s in sites_of(program) if s.name.endswith("q_proj"))
    signs = unpack_bits(turned.value(ops(turned)[0].args[1]), 1, 64)  # type: ignore[arg-type]
    torch.testing.assert_close(
        turned.params.get(q.weight), program.params.get(q.weight) @ turn_matrix(signs, 64).T / 64, atol=1e-14, rtol=0
    )


@pytest.mark.parametrize("what", ["sign", "order", "transposed", "missing"])
def test_a_wrong_operator_changes_the_function(what: str) -> None:
    program = doubled(traced("llama", 1)[0])
    turned, _ = rotated(program)
    node = ops(turned)[1]
    source, signs, order = node.args[:3]
    if what == "sign":
        assert isinstance(signs, fx.Node)
        flipped = turned.value(signs).clone()
        flipped[2] ^= 16
        Editor(turned, "test").param(str(signs.target), flipped)
    elif what == "missing":
        node.replace_all_uses_with(source, propagate_meta=False)  # type: ignore[arg-type]
    else:
        node.args = (source, signs, 32) if what == "order" else (source, signs, order, True)
    assert error(turned, program) > 1e-3


def test_the_verifier_knows_the_operator() -> None:
    turned, _ = rotated(traced("llama", 1)[0])
    node = ops(turned)[0]
    node.args = (*node.args[:2], 52)
    with pytest.raises(InvariantError, match="known Hadamard matrix"):
        verify(turned)


def test_biases_follow_the_rows() -> None:
    program = doubled(traced("qwen2", 1)[0])
    turned, _ = rotated(program, Rotate(side="both"))
    v, q = (next(s for s in sites_of(program) if s.name.endswith(n)) for n in ("v_proj", "q_proj"))
    assert v.bias is not None and q.bias is not None
    for bias in (v.bias, q.bias):
        assert not torch.equal(turned.value(turned.node(bias.name)), program.value(bias))
    spoilt = turned.clone()
    Editor(spoilt, "test").param(str(v.bias.target), program.value(v.bias))
    assert error(turned, program) < 1e-10 < 1e-4 < error(spoilt, program)


def test_a_bias_of_two_linears_is_not_turned_for_both() -> None:
    program = doubled(traced("qwen2", 1)[0])
    k, v = (next(s for s in sites_of(program) if s.name.endswith(n)) for n in ("k_proj", "v_proj"))
    k.node.args = (*k.node.args[:2], v.bias)
    program.graph.eliminate_dead_code()
    turned, _ = rotated(program)
    assert error(turned, program) < 1e-10


def test_seeds_and_sites_determine_the_signs() -> None:
    program = traced("llama")[0]
    one, again, other = (dump_with_weights(rotated(program, Rotate(seed=s))[0]) for s in (0, 0, 1))
    assert one == again and one != other
    whole, part = rotated(program)[0], rotated(program, Rotate(skip=("q_proj", "model.layers.1.mlp.*")))[0]
    for name in ("k_proj", "v_proj", "o_proj"):
        site = next(s for s in sites_of(program) if s.name.endswith(name))
        assert torch.equal(whole.params.get(site.weight), part.params.get(site.weight))
    assert len(ops(part)) == 4


def dump_with_weights(program: Program) -> tuple[str, list[bytes]]:
    return dump(program), [program.params.get(n).numpy().tobytes() for n in program.params]


def test_signs_are_the_same_on_every_machine() -> None:
    assert pack_bits(random_signs(0, "x/inputs", 20), 1).tolist() == [137, 33, 13]


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
    turned, log = rotated(program, Rotate(online=False))
    assert not ops(turned)
    reasons = {d.site.rpartition(".")[2]: d.reason for d in log.diagnostics}
    assert set(reasons) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert "at run time" in reasons["down_proj"] and "shared with another reader" in reasons["lm_head"]
    assert error(turned, program) < 1e-10


def test_a_weight_of_two_linears_is_left_with_its_reason() -> None:
    program = doubled(traced("llama", 1)[0])
    gate, up = (n for n in program.calls(aten.linear) if n.name.endswith(("gate_proj", "up_proj")))
    up.args = (up.args[0], gate.args[1])
    turned, log = rotated(program)
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


def test_rotating_twice_is_rotating_once() -> None:
    program, _ = rotated(traced("llama", 1)[0])
    before = dump_with_weights(program)
    twice, log = rotated(parse(dump(program), program.params))
    assert dump_with_weights(twice) == before
    assert sum("rotated already" in d.reason for d in log.diagnostics) == 7


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


def test_the_manager_finds_rotation_exact() -> None:
    program = traced("llama")[0]
    reports = run_pipeline(program, parse_pipeline("fold,rotate"), Context(), Settings(verify="full"))
    assert reports[1].changed and reports[1].probe_error is not None and reports[1].probe_error < 1e-5
    assert {"folded", "rotated"} <= program.facts


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
    run_pipeline(program, parse_pipeline("fold,rotate,shiftadd{group=16 sweeps=0}"), context, Settings(verify="full"))
    coded = list(program.calls(nomul.shiftadd_linear))
    assert len(coded) == 14 and len(ops(program)) == 6
    assert sum(is_call(n.args[0], nomul.hadamard) for n in coded) == 12
    assert len(blocks(program)) == 2


def kurtosis(x: Tensor) -> float:
    centred = x.double() - x.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


def test_outliers_are_spread_out() -> None:
    program = doubled(_shaped(576, 9, 3, 1536))
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


def test_golden_text_of_a_rotated_llama(request: pytest.FixtureRequest) -> None:
    program = traced("llama", 1)[0]
    Fold().run(program, Context())
    check_golden("rotate_llama.ir", dump(rotated(program)[0]), request)
