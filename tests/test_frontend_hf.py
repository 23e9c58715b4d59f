"""Tracing: a program says what its Hugging Face model says, in canonical form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from frontend.canonical import canonicalise
from frontend.hf import skeleton, trace
from ir.analysis import blocks, linear_sites
from ir.errors import UnsupportedError
from ir.execute import empty_inputs, next_inputs
from ir.parse import parse
from ir.program import TYPE, Program, is_call
from ir.text import dump, op_name
from ir.types import TensorType
from ir.verify import verify
from tests.architectures import CONFIGS, bind, ids_for, randomise, tiny, traced

aten, nomul = torch.ops.aten, torch.ops.nomul
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Form:
    """What an architecture's canonical program holds at two layers.

    norms: calls of rms_norm and layer_norm; linears: of which so many own their weight; rope: (rotations, neighbours
    paired, channels rotated of 16); gqa: attention calls that share keys among query heads; fused: attention calls.
    """

    norms: tuple[int, int]
    linears: tuple[int, int]
    rope: tuple[int, bool, int] = (4, False, 16)
    gqa: int = 2
    fused: int = 2
    attention: str = "sdpa"
    parallel: bool = False


_NO_ROPE = (0, False, 0)
FORMS = {
    "llama": Form((5, 0), (15, 14)),
    "qwen3": Form((9, 0), (15, 15)),
    "gpt2": Form((0, 5), (9, 8), _NO_ROPE, gqa=0),
    "opt": Form((0, 5), (13, 12), _NO_ROPE, gqa=0),
    "mixtral": Form((5, 0), (11, 11)),
    "llama_untied": Form((5, 0), (15, 15)),
    "mistral": Form((5, 0), (15, 15)),
    "qwen2": Form((5, 0), (15, 15)),
    "qwen3_moe": Form((9, 0), (11, 11)),
    "gptj": Form((0, 3), (13, 13), (4, True, 8), gqa=0, fused=0, attention="eager", parallel=True),
    "neox": Form((0, 5), (9, 9), (4, False, 4), gqa=0, parallel=True),
    "phi": Form((0, 3), (13, 13), (4, False, 8), gqa=0, parallel=True),
    "phi3": Form((5, 0), (9, 9)),
    "gemma": Form((5, 0), (15, 14)),
    "gemma2": Form((9, 0), (15, 14), gqa=0, fused=0, attention="eager"),
    "falcon": Form((0, 3), (9, 8), gqa=0, parallel=True),
    "stablelm": Form((0, 5), (15, 15), (4, False, 4)),
    "bloom": Form((0, 6), (9, 8), _NO_ROPE, gqa=0, fused=0, attention="eager"),
    "cohere": Form((0, 3), (15, 14), (4, True, 16), parallel=True),
    "olmo2": Form((9, 0), (15, 15)),
    "granite": Form((5, 0), (15, 15)),
    "starcoder2": Form((0, 5), (13, 12)),
}
REQUIRED = ("llama", "qwen3", "gpt2", "opt", "mixtral")
ARCHITECTURES = [n if n in REQUIRED else pytest.param(n, marks=pytest.mark.slow) for n in FORMS]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def test_all_architectures_are_listed() -> None:
    assert set(FORMS) == set(CONFIGS)


def plain_model(model: nn.Module, config: Any) -> nn.Module:
    """The same model with transformers' eager attention: what a program must equal, whichever attention was traced."""
    plain = skeleton(config, "eager")
    plain.load_state_dict(model.state_dict())
    return plain


def left_padding(batch: int, seq: int, first: int) -> Tensor:
    """Attention mask [batch, seq] whose row r hides `first` + r tokens at the left, but never the last one."""
    hidden = torch.arange(first, first + batch).clamp(max=seq - 1)
    return (torch.arange(seq) >= hidden[:, None]).long()


def run(module: nn.Module, program: Program, ids: Tensor, mask: Tensor, past: tuple[Tensor, ...] = ()) -> Any:
    values = next_inputs(program, ids, past) if past else empty_inputs(program, ids)
    values[program.inputs[1].name] = mask
    with torch.no_grad():
        return module(*[values[n.name] for n in program.inputs])


def largest_difference(found: Tensor, wanted: Tensor, mask: Tensor) -> float:
    # A token that attends to nothing means nothing, yet it must not poison the others: a NaN is never equal.
    assert bool(torch.isfinite(found).all())
    return float((found - wanted)[mask.bool()].abs().max())


@every_architecture
@pytest.mark.parametrize("batch", [1, 3])
def test_program_equals_model(name: str, batch: int) -> None:
    program, model = traced(name)
    module, plain = program.module(), plain_model(model, tiny(name))
    for seq in (1, 2, 17):
        for hidden in (0, 1, 5):
            ids, mask = (
                ids_for(batch, seq),
                left_padding(batch, seq, hidden) if hidden else torch.ones(batch, seq).long(),
            )
            with torch.no_grad():
                wanted = plain(input_ids=ids, attention_mask=mask).logits
            assert wanted.std() > 0.1, "logits that are all alike would prove nothing"
            found = run(module, program, ids, mask)[0]
            assert largest_difference(found, wanted, mask) <= TOLERANCE, (seq, hidden)


@every_architecture
@pytest.mark.parametrize(("batch", "hidden"), [(1, 0), (3, 2)])
def test_cached_decode_equals_full_forward(name: str, batch: int, hidden: int) -> None:
    program, model = traced(name)
    module, ids = program.module(), ids_for(batch, 17)
    mask = left_padding(batch, 17, hidden)
    with torch.no_grad():
        wanted = plain_model(model, tiny(name))(input_ids=ids, attention_mask=mask).logits
    outputs = run(module, program, ids[:, :9], mask[:, :9])
    assert largest_difference(outputs[0], wanted[:, :9], mask[:, :9]) <= TOLERANCE
    for start, stop in ((9, 10), (10, 11), (11, 12), (12, 17)):
        outputs = run(module, program, ids[:, start:stop], mask[:, :stop], outputs)
        assert outputs[1].shape[-2] == stop
        assert largest_difference(outputs[0], wanted[:, start:stop], mask[:, start:stop]) <= TOLERANCE, stop


def test_a_changed_weight_would_be_seen() -> None:
    program, model = traced("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = program.params.get(name).clone()
    wrong[3, 5] += 0.05
    program.params.put(name, wrong, "test")
    ids, mask = ids_for(1, 17), torch.ones(1, 17).long()
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    assert largest_difference(run(program.module(), program, ids, mask)[0], wanted, mask) > TOLERANCE


def test_later_tokens_change_nothing_before_them() -> None:
    program, _ = traced("llama")
    module, ids, mask = program.module(), ids_for(2, 9), torch.ones(2, 9).long()
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 90
    first, second = (run(module, program, i, mask)[0] for i in (ids, other))
    assert torch.equal(first[:, :6], second[:, :6])
    assert (first[:, 6:] - second[:, 6:]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "qwen3"])
def test_sliding_windows_hide_old_tokens(kind: str) -> None:
    config = tiny(kind)
    config.sliding_window = 4
    if kind == "qwen3":
        config.use_sliding_window, config.layer_types = True, ["full_attention", "sliding_attention"]
    program = trace(config, kind)
    canonicalise(program)
    plain = skeleton(config, "eager")
    randomise(plain)
    bind(program, plain.state_dict())
    module, ids, mask = program.module(), ids_for(2, 17), torch.ones(2, 17).long()
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wide = traced(kind)[1](input_ids=ids, attention_mask=mask).logits
    assert (wanted - wide).abs().max() > 0.1, "the window must matter"
    outputs = run(module, program, ids[:, :9], mask[:, :9])
    for stop in range(10, 18):
        outputs = run(module, program, ids[:, stop - 1 : stop], mask[:, :stop], outputs)
        assert largest_difference(outputs[0], wanted[:, stop - 1 : stop], mask[:, :1]) <= TOLERANCE


@pytest.mark.slow
def test_opt_with_narrow_embeddings_and_late_norms() -> None:
    from transformers import OPTConfig

    config = OPTConfig(
        hidden_size=64,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        max_position_embeddings=64,
    )
    program = trace(config, "opt-350m")
    canonicalise(program)
    plain = skeleton(config, "eager")
    randomise(plain)
    bind(program, plain.state_dict())
    ids, mask = ids_for(2, 9), left_padding(2, 9, 1)
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=mask).logits
    assert largest_difference(run(program.module(), program, ids, mask)[0], wanted, mask) <= TOLERANCE
    assert len(blocks(program)) == 2


def is_noop(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    casts = (aten.to, aten._to_copy, aten.type_as, aten.view, aten.reshape, aten.expand)
    same = (
        isinstance(source, fx.Node) and isinstance(node.meta[TYPE], TensorType) and node.meta[TYPE] == source.meta[TYPE]
    )
    return is_call(node, *casts) and same


@every_architecture
def test_canonical_form(name: str) -> None:
    program, _ = traced(name)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    for node in calls:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node.format_node()
        assert not is_noop(node), node.format_node()
        assert not {"device", "layout", "pin_memory"} & set(node.kwargs), node.format_node()
    kinds = Counter(op_name(n.target) for n in calls)
    unwanted = ("view", "addmm", "t", "numpy_T", "rsqrt", "_to_copy", "contiguous", "clone", "alias", "detach")
    assert not [k for k in kinds if "assert" in k or k in {f"aten.{u}" for u in unwanted}]
    for node in program.calls(aten.matmul, aten.mm, aten.bmm):
        assert all(a.op != "get_attr" for a in node.all_input_nodes), f"{node.name} is a linear in disguise"
    form = FORMS[name]
    assert (kinds["aten.rms_norm"], kinds["aten.layer_norm"]) == form.norms
    assert all(n.args[2] is not None for n in program.calls(aten.rms_norm, aten.layer_norm)), "gains belong to norms"
    owned, left = linear_sites(program, calls)
    assert (kinds["aten.linear"], len(owned)) == form.linears
    assert len([r for _, r in left if "stacked per expert" in r]) == kinds["nomul.grouped_linear"]
    assert program.attributes == {"model_type": tiny(name).model_type, "layers": 2, "attention": form.attention}
    assert program.facts == {"canonical"} and program.symbols[:3] == ("batch", "seq", "past")


@every_architecture
def test_rotary_embedding_and_attention_are_raised(name: str) -> None:
    program, form = traced(name)[0], FORMS[name]
    found = [(n.args[3], n.args[1].meta[TYPE].dims[-1]) for n in program.calls(nomul.rope)]
    assert found == [form.rope[1:]] * form.rope[0]
    attention = list(program.calls(aten.scaled_dot_product_attention))
    assert len(attention) == form.fused
    assert [n.kwargs.get("enable_gqa", False) for n in attention] == [form.gqa > 0] * form.fused
    for node in attention:
        for value in node.args[1:3]:
            assert not is_call(value, aten.reshape) or not is_call(value.args[0], aten.expand), "keys are repeated"


@every_architecture
def test_blocks_interface_and_levels(name: str) -> None:
    program, _ = traced(name)
    verify(program, full=True)
    found = blocks(program)
    assert len(found) == 2 and found[0].exit is found[1].entry
    assert len(found[0].nodes) == len(found[1].nodes)
    assert [b.path.rpartition(".")[2] for b in found] == ["0", "1"]
    names = [f"{kind}_{layer}" for layer in range(2) for kind in ("key", "value")]
    assert [n.name for n in program.inputs] == ["input_ids", "attention_mask", *(f"past_{n}" for n in names)]
    assert [n.name for n in program.outputs] == ["logits", *(f"present_{n}" for n in names)]
    sites = [[s.name.removeprefix(b.path) for s in linear_sites(program, b.nodes)[0]] for b in found]
    assert sites[0] == sites[1] and len(sites[0]) == len(set(sites[0])) >= 4


@every_architecture
def test_text_round_trip(name: str) -> None:
    program, _ = traced(name)
    text = dump(program)
    again = parse(text, program.params)
    assert dump(again) == text
    ids, mask = ids_for(2, 7), left_padding(2, 7, 1)
    first, second = (run(p.module(), p, ids, mask) for p in (program, again))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_architecture
def test_canonical_form_is_stable(name: str) -> None:
    program, _ = traced(name)
    before = dump(program)
    canonicalise(program)
    assert dump(program) == before


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "intermediate_size": 64}
REFUSED = {
    "Bert": ({**SMALL, **HEADS}, "no key/value cache"),
    "Roberta": ({**SMALL, **HEADS}, "no key/value cache"),
    "Electra": ({**SMALL, **HEADS}, "no key/value cache"),
    "Mamba": ({**SMALL, "state_size": 4}, "no key/value cache"),
    "Mamba2": ({**SMALL, "state_size": 4, "num_heads": 4, "head_dim": 16}, "cannot be traced"),
    "Rwkv": ({**SMALL, "attention_hidden_size": 32}, "no key/value cache"),
    "XLNet": ({"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64, "vocab_size": 96}, "no key/value cache"),
    "T5": ({"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 96}, "cannot be"),
    "Lfm2": (
        {**SMALL, **HEADS, "num_key_value_heads": 2, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        "cannot be traced",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_with_a_reason(kind: str) -> None:
    import transformers

    fields, what = REFUSED[kind]
    config = getattr(transformers, f"{kind}Config")(**fields)
    with pytest.raises(UnsupportedError, match=what) as caught:
        canonicalise(trace(config, "other"))
    assert caught.value.exit_code == 3
    assert caught.value.why and caught.value.fix and caught.value.where
