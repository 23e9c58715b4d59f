"""`rotate`: the same function in a random basis for every architecture, at the price of the operators it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from ir.analysis import blocks, sibling_sites
from ir.edit import Editor
from ir.errors import InvariantError
from ir.ops.packing import pack_bits, unpack_bits
from ir.parse import parse
from ir.program import Program, is_call
from ir.text import dump
from ir.verify import verify
from passes.base import Context
from passes.equiv.heads import value_heads
from passes.equiv.turns import random_signs
from passes.fold import Fold
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse as parse_pipeline
from passes.rotate import Rotate
from passes.rotation import rotate_sites
from tests.architectures import (
    CONFIGS,
    VOCAB,
    doubled,
    traced,
)
from tests.golden import check_golden
from tests.rotation_cases import (
    bound,
    error,
    nasty,
    ops,
    rotated,
    rotated_in_double,
    shaped,
    sites_of,
    turn_matrix,
)

aten, nomul = torch.ops.aten, torch.ops.nomul
F64 = torch.float64

QUICK = ["llama", "qwen2", "qwen3", "gemma", "mixtral", "phi3", "olmo2", "gpt2", "neox", "opt", "phi", "falcon"]
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in QUICK)]


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
    program = nasty(shaped(width, heads, shared, inner))
    turned, log = rotated(program, Rotate(side=side))
    orders = {r.site.rpartition(".")[2]: r.figures["order"] for r in log.reports if "order" in r.figures}
    assert orders["o_proj"] == order and orders["q_proj"] == orders["gate_proj"] == input_order
    assert error(turned, program) < 1e-10


def test_an_odd_head_dim_leaves_the_output_projection_to_an_operator() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=28, n_head=4, n_layer=1, vocab_size=VOCAB, n_positions=64)
    program = nasty(bound(config, "odd"))
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


def test_rotating_twice_is_rotating_once() -> None:
    program, _ = rotated(traced("llama", 1)[0])
    before = dump_with_weights(program)
    twice, log = rotated(parse(dump(program), program.params))
    assert dump_with_weights(twice) == before
    assert sum("rotated already" in d.reason for d in log.diagnostics) == 7


def test_the_manager_finds_rotation_exact() -> None:
    program = traced("llama")[0]
    reports = run_pipeline(program, parse_pipeline("fold,rotate"), Context(), Settings(verify="full"))
    assert reports[1].changed and reports[1].probe_error is not None and reports[1].probe_error < 1e-5
    assert {"folded", "rotated"} <= program.facts


def test_golden_text_of_a_rotated_llama(request: pytest.FixtureRequest) -> None:
    program = traced("llama", 1)[0]
    Fold().run(program, Context())
    check_golden("rotate_llama.ir", dump(rotated(program)[0]), request)
