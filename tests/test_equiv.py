"""Equivalence groups: which are found, how their channels are tied, that each is exact, and what is refused and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from ir.edit import Editor
from ir.errors import InvariantError
from ir.parse import parse
from ir.program import Program
from ir.text import dump
from passes.base import Context
from passes.equiv.apply import Factors, apply
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, TieMap, annotate
from passes.equiv.transfer import expand, fold_cols, fold_norm, fold_rows, unit_scales
from passes.equiv.untied import untied
from passes.fold import Fold
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced

aten = torch.ops.aten

LLAMA = ["norm->linears", "q<->k", "v->o", "norm->linears", "up->down"]
GPT = ["norm->linears", "q<->k", "v->o", "norm->linears"]
PARALLEL = ["norm->linears", "q<->k", "v->o"]

# Groups of a one-block model in graph order, and the kinds that are absent.
EXPECTED = {
    "llama": (LLAMA, ["norm->head"]),
    "qwen3": ([*LLAMA, "norm->head"], []),
    "gemma": (LLAMA, ["norm->head"]),
    "mixtral": ([*LLAMA, "norm->head"], []),
    "phi3": ([*LLAMA, "norm->head"], []),
    "olmo2": (["q<->k", "v->o", "up->down", "norm->head"], ["norm->linears", "norm->linears"]),
    "gpt2": (GPT, ["fc1->fc2", "norm->head"]),
    "neox": ([*GPT, "norm->head"], ["fc1->fc2"]),
    "opt": ([*GPT, "fc1->fc2"], ["norm->head"]),
    "phi": ([*PARALLEL, "norm->head"], ["fc1->fc2"]),
    "falcon": (PARALLEL, ["fc1->fc2", "norm->head"]),
    "cohere": ([*PARALLEL, "up->down"], ["norm->head"]),
}
RARE = {
    "stablelm": ([*LLAMA, "norm->head"], []),
    "granite": ([*LLAMA, "norm->head"], []),
    "qwen3_moe": ([*LLAMA, "norm->head"], []),
    "starcoder2": (GPT, ["fc1->fc2", "norm->head"]),
    "gptj": ([*PARALLEL, "norm->head"], ["fc1->fc2"]),
    "gemma2": (LLAMA, ["norm->head", "norm->linears", "norm->linears"]),
    "bloom": (GPT, ["norm->linears", "norm->head"]),
}
CASES = [*EXPECTED, *(pytest.param(name, marks=pytest.mark.slow) for name in RARE)]


def nasty(group: EquivGroup, seed: int = 0) -> Tensor:
    """Log-normal scales (sigma 1), with random signs where the group allows them."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(group.size, generator=generator, dtype=torch.float64).exp()
    signs = torch.where(torch.rand(group.size, generator=generator) < 0.5, -1.0, 1.0)
    return s * signs if "sign" in group.supports else s


def group_of(program: Program, kind: str) -> EquivGroup:
    """The first group of a kind."""
    return discover(program).of(kind)[0]


def reason_of(program: Program, kind: str) -> str:
    """The reason on record for the first absence of a kind, which no group contradicts."""
    found = discover(program)
    assert not found.of(kind)
    return next(a.reason for a in found.absences if a.kind == kind)


@pytest.mark.parametrize("name", CASES)
def test_groups_and_absences_of_every_architecture(name: str) -> None:
    found = discover(traced(name, 1)[0])
    kinds, absent = (EXPECTED | RARE)[name]
    assert sorted(g.kind for g in found.groups) == sorted(kinds)
    assert sorted(a.kind for a in found.absences) == sorted(absent)
    assert all(a.reason for a in found.absences)
    assert len({g.site for g in found.groups}) == len(found.groups)


@pytest.mark.parametrize("name", CASES)
def test_every_group_is_exact_under_nasty_scales(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    before = prefill_and_decode(program, ids)
    for group in discover(program).groups:
        scaled = program.clone()
        annotate(scaled, group, nasty(group), "test")
        Fold().run(scaled, Context())
        error = relative_error(prefill_and_decode(scaled, ids), before)
        assert error < 1e-10, f"{group.kind} {group.site}: {error}"


@pytest.mark.parametrize("name", CASES)
def test_all_groups_together_are_exact(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    scaled = program.clone()
    for group in discover(program).groups:
        annotate(scaled, group, nasty(group), "test")
    Fold().run(scaled, Context())
    weights = [n for n in program.params if n in scaled.params and program.params.type_of(n).dtype.is_floating_point]
    assert any(not torch.equal(program.params.get(n), scaled.params.get(n)) for n in weights)
    assert relative_error(prefill_and_decode(scaled, ids), prefill_and_decode(program, ids)) < 1e-10


def test_router_choice_is_unchanged_bit_for_bit_in_order() -> None:
    program = doubled(traced("mixtral", 1)[0])
    scaled = program.clone()
    annotate(scaled, discover(program).of("norm->linears")[1], nasty(discover(program).of("norm->linears")[1]), "test")
    Fold().run(scaled, Context())
    picks = []
    for candidate in (program, scaled):
        top = next(iter(candidate.calls(aten.topk)))
        pick = next(u for u in top.users if u.args[1] == 1)
        candidate.graph.output_node().args = ((candidate.outputs[0], pick),)
        picks.append(candidate.module()(*_prefill(candidate))[1])
    assert torch.equal(*picks)


def _prefill(program: Program) -> list[Tensor]:
    from ir.execute import empty_inputs

    return list(empty_inputs(program, ids_for(), torch.float64).values())


def test_ties_of_half_split_rotary_and_grouped_queries() -> None:
    group = group_of(traced("llama", 1)[0], "q<->k")
    q, k = group.sources[0].tie.index.view(4, 16), group.sinks[0].tie.index.view(2, 16)
    assert torch.equal(k[:, :8], k[:, 8:])
    assert torch.equal(q, k.repeat_interleave(2, 0))
    assert group.size == k.unique().numel() == 16


def test_ties_of_interleaved_rotary() -> None:
    group = group_of(traced("cohere", 1)[0], "q<->k")
    k = group.sinks[0].tie.index.view(2, 16)
    assert torch.equal(k[:, 0::2], k[:, 1::2])
    assert group.size == k.unique().numel() == 16


def test_channels_past_a_partial_rotation_are_free() -> None:
    group = group_of(traced("phi", 1)[0], "q<->k")
    k = group.sinks[0].tie.index.view(4, 16)
    assert torch.equal(k[:, :4], k[:, 4:8])
    assert k[:, 8:].unique().numel() == 32
    assert group.size == 4 * 4 + 32


def test_without_rotary_every_key_channel_is_free() -> None:
    assert group_of(traced("opt", 1)[0], "q<->k").size == 64


def test_values_expand_over_the_query_heads_of_their_group() -> None:
    group = group_of(traced("llama", 1)[0], "v->o")
    assert torch.equal(group.sources[0].tie.index, torch.arange(32))
    assert torch.equal(group.sinks[0].tie.index.view(4, 16), torch.arange(32).view(2, 16).repeat_interleave(2, 0))


def test_rows_of_fused_projections() -> None:
    neox = group_of(traced("neox", 1)[0], "v->o").sources[0].tie.index.view(4, 3, 16)
    assert bool((neox[:, :2] == -1).all()) and torch.equal(neox[:, 2].flatten(), torch.arange(64))
    gpt2 = group_of(traced("gpt2", 1)[0], "v->o").sources[0].tie.index
    assert bool((gpt2[:128] == -1).all()) and torch.equal(gpt2[128:], torch.arange(64))
    gate_up = group_of(traced("phi3", 1)[0], "up->down").sources[0].tie.index
    assert bool((gate_up[:128] == -1).all()) and torch.equal(gate_up[128:], torch.arange(128))
    falcon = group_of(traced("falcon", 1)[0], "v->o").sources[0].tie.index.view(6, 16)
    assert bool((falcon[:5] == -1).all()) and torch.equal(falcon[5], torch.arange(16))


def test_query_and_key_norms_carry_the_scale_tied_over_heads() -> None:
    group = group_of(traced("qwen3", 1)[0], "q<->k")
    assert [s.axis for s in group.slots] == ["gain", "gain"]
    assert group.size == 8


def test_a_parallel_block_and_a_router_are_all_sinks() -> None:
    assert len(group_of(traced("phi", 1)[0], "norm->linears").sinks) == 4
    experts = discover(traced("mixtral", 1)[0]).of("norm->linears")[1]
    assert {s.weight.rpartition(".")[2] for s in experts.sinks} == {"weight", "gate_up_proj"}
    assert "shift" not in experts.supports


def test_what_groups_support() -> None:
    opt = discover(traced("opt", 1)[0])
    assert opt.of("fc1->fc2")[0].supports == {"scale"}
    assert opt.of("norm->linears")[0].supports == {"scale", "sign", "shift"}
    assert opt.of("q<->k")[0].supports == {"scale", "sign"}


def test_discovery_survives_the_text_form() -> None:
    program = traced("neox", 1)[0]
    again = parse(dump(program), program.params)
    for a, b in zip(discover(program).groups, discover(again).groups, strict=True):
        assert (a.kind, a.site, a.size) == (b.kind, b.site, b.size)
        assert all(torch.equal(s.tie.index, t.tie.index) for s, t in zip(a.slots, b.slots, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_without_rotary_untied_groups_are_the_groups_as_found(name: str) -> None:
    group = group_of(traced(name, 1)[0], "q<->k")
    free = untied(group)
    assert free.size == group.size
    assert all(torch.equal(a.tie.index, b.tie.index) for a, b in zip(free.slots, group.slots, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3", "stablelm", "phi3", "gptj"])
def test_scales_untied_under_rotary_are_exact_only_where_pairs_agree(name: str) -> None:
    program, ids = doubled(traced(name, 1)[0]), ids_for()
    group = group_of(program, "q<->k")
    free = untied(group)
    assert free.size > group.size
    tied = {}
    for slot, loose in zip(group.slots, free.slots, strict=True):
        for parameter, own in zip(slot.tie.index.tolist(), loose.tie.index.tolist(), strict=True):
            assert (own < 0) == (parameter < 0)
            assert tied.setdefault(own, parameter) == parameter  # a free parameter serves one pair
    before = prefill_and_decode(program, ids)

    def error(scales: Tensor) -> float:
        scaled, factors = program.clone(), Factors()
        factors.add(free, scales)
        apply(scaled, factors, "test")
        return relative_error(prefill_and_decode(scaled, ids), before)

    of_pairs = torch.tensor([tied[i] for i in range(free.size)])
    assert error(nasty(group)[of_pairs]) < 1e-10
    assert error(nasty(free)) > 0.01


def _error_of(program: Program, group: EquivGroup, ids: Tensor) -> float:
    scaled, factors = program.clone(), Factors()
    factors.add(group, nasty(group))
    apply(scaled, factors, "test")
    return relative_error(prefill_and_decode(scaled, ids), prefill_and_decode(program, ids))


def test_a_perturbed_weight_fails_the_exactness_check() -> None:
    program, ids = doubled(traced("llama", 1)[0]), ids_for()
    spoilt = program.clone()
    name = discover(program).of("v->o")[0].sinks[0].weight
    Editor(spoilt, "test").param(name, program.params.get(name) * (1 + 1e-6))
    assert relative_error(prefill_and_decode(spoilt, ids), prefill_and_decode(program, ids)) > 1e-10


def test_gelu_blocks_and_says_so() -> None:
    assert "gelu" in reason_of(traced("gpt2", 1)[0], "fc1->fc2")


def test_a_tied_head_is_absent_with_its_reason() -> None:
    assert "embed_tokens reads it too" in reason_of(traced("llama", 1)[0], "norm->head")


def test_a_post_norm_is_absent_because_of_the_residual() -> None:
    assert "does not carry the scale" in reason_of(traced("olmo2", 1)[0], "norm->linears")


def test_a_softmax_over_a_logit_of_no_key_is_no_attention_and_says_so() -> None:
    program = traced("gptj", 1)[0]
    softmax = next(iter(program.calls(aten.softmax)))
    scores, mix = softmax.args[0], next(iter(softmax.users))
    assert isinstance(scores, fx.Node)
    editor = Editor(program, "test").before(softmax)
    sink = editor.call(aten.slice, scores, -1, 0, 1, like=softmax)
    joined = editor.call(aten.cat, [scores, sink], -1, like=softmax)
    softmax.args = (joined, -1)
    kept = editor.before(mix).call(aten.slice, softmax, -1, 0, -1, like=softmax)
    mix.replace_input_with(softmax, kept)
    found = discover(program)
    assert not found.of("v->o", "q<->k")
    assert {a.kind for a in found.absences if a.site == mix.name} == {"v->o", "q<->k"}
    assert joined.name in reason_of(program, "v->o")


def test_an_extra_reader_of_a_norm_makes_it_absent() -> None:
    program = traced("llama", 1)[0]
    norm = next(iter(program.calls(aten.rms_norm)))
    residual = next(n for n in program.calls(aten.add) if n.meta["type"] == norm.meta["type"])
    residual.args = (residual.args[0], norm)
    found = discover(program)
    assert norm.name not in {g.site for g in found.groups}
    assert any(a.site == norm.name and residual.name in a.reason for a in found.absences)


def test_a_returned_norm_is_absent() -> None:
    program = traced("llama", 1)[0]
    norm = next(iter(program.calls(aten.rms_norm)))
    program.output.args = ((*program.outputs, norm),)
    assert any(a.site == norm.name and "output" in a.reason for a in discover(program).absences)


def test_cached_state_that_is_not_returned_in_its_place_blocks() -> None:
    program = traced("llama", 1)[0]
    logits, key, value = program.outputs
    program.output.args = ((logits, value, key),)
    assert "not returned in its place" in reason_of(program, "v->o")
    assert "not returned in its place" in reason_of(program, "q<->k")


def test_cached_state_with_another_reader_blocks() -> None:
    program = traced("llama", 1)[0]
    past = next(n for n in program.inputs if n.name == "past_value_0")
    editor = Editor(program, "test").before(program.output)
    extra = editor.call(aten.neg, past, like=past)
    program.output.args = ((program.outputs[0], extra, *program.outputs[1:]),)
    assert "read elsewhere" in reason_of(program, "v->o")


def test_a_layout_that_mixes_positions_blocks() -> None:
    program = traced("llama", 1)[0]
    attention = next(iter(program.calls(aten.scaled_dot_product_attention)))
    back = next(iter(attention.users))
    # Without the transpose back, [batch, heads, seq, 16] is read as [batch, seq, heads * 16]: it runs, but scrambled.
    back.replace_all_uses_with(attention, propagate_meta=False)
    assert "differs between positions" in reason_of(program, "v->o")


def test_a_weight_of_two_linears_is_absent() -> None:
    program = traced("llama", 1)[0]
    gate, up = (n for n in program.calls(aten.linear) if n.name.endswith(("gate_proj", "up_proj")))
    up.args = (up.args[0], gate.args[1])
    assert "is tied" in reason_of(program, "up->down")


def test_a_query_norm_without_gain_is_absent() -> None:
    program = traced("qwen3", 1)[0]
    norm = next(n for n in program.calls(aten.rms_norm) if n.name.endswith("q_norm"))
    norm.args = (*norm.args[:2], None, *norm.args[3:])
    assert "no gain" in reason_of(program, "q<->k")


def test_scales_that_cannot_be_folded_are_refused() -> None:
    program = traced("opt", 1)[0]
    group = group_of(program, "fc1->fc2")
    for bad, why in ((torch.ones(3), "to a group of 128"), (torch.zeros(128), "zero"), (-torch.ones(128), "negative")):
        with pytest.raises(InvariantError, match=why):
            annotate(program, group, bad, "test")


def test_transfer_functions_by_hand() -> None:
    s = torch.tensor([2.0, 4.0])
    assert expand(TieMap(torch.tensor([0, 1, 0, -1])), s).tolist() == [2, 4, 2, 1]
    gain, beta = fold_norm(torch.tensor([2.0, 8.0]), torch.tensor([4.0, 4.0]), s)
    assert gain.tolist() == [1, 2] and beta is not None and beta.tolist() == [2, 1]
    weight, bias = fold_rows(torch.ones(2, 3), torch.tensor([2.0, 2.0]), s)
    assert weight[:, 0].tolist() == [0.5, 0.25] and bias is not None and bias.tolist() == [1, 0.5]
    assert fold_cols(torch.ones(5, 3, 2), s)[4, 2].tolist() == [2, 4]
    assert fold_norm(gain, None, s)[1] is None and fold_rows(weight, None, s)[1] is None


def test_unit_scales_leave_gains_next_to_zero_where_an_offset_stands() -> None:
    gain = torch.tensor([3.0, 0.0, 1e-9])
    assert unit_scales(gain, torch.ones(3)).tolist() == [3, 1, 1]
    assert unit_scales(gain, None).tolist() == [3, 1, pytest.approx(1e-9)]


def test_transfer_functions_are_differentiable() -> None:
    tie = TieMap(torch.tensor([0, 1, 1, -1]))
    s = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64)

    def path(scales: Tensor) -> Tensor:
        factor = expand(tie, scales)
        rows, bias = fold_rows(weight, weight[0], factor)
        gain, beta = fold_norm(weight[1], weight[2], factor)
        assert bias is not None and beta is not None
        return torch.cat([fold_cols(rows, factor.square()), bias[None], gain[None], beta[None]])

    assert torch.autograd.gradcheck(path, (s,))
