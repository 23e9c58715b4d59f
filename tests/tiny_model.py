"""A tiny traced llama with a word tokenizer, plain or with compressed linears, as a folder that commands can read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from frontend.canonical import canonicalise
from frontend.hf import trace
from ir.analysis import LinearSite, linear_sites
from ir.artifact import FORMAT, write_program
from ir.edit import Editor
from ir.ops.packing import pack_bits
from ir.ops.shiftcode import ShiftCodes, encode
from ir.params import Entry, MemorySource
from ir.program import Program

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCAB, END, GROUP, TERMS, BITS = 96, 1, 16, 2, 3
nomul = torch.ops.nomul


def tiny_config() -> LlamaConfig:
    """Two layers of width 32, four query heads on two key heads, tied head."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=END,
    )


@cache
def _traced() -> Program:
    program = trace(tiny_config(), "tiny")
    canonicalise(program)
    return program


def tiny_program(seed: int = 0) -> Program:
    """The float program with seeded random weights."""
    program, generator = _traced().clone(), torch.Generator().manual_seed(seed)
    read = {str(n.target) for n in program.param_nodes()}
    for name in sorted(read):
        kind = program.params.type_of(name)
        if not name.endswith(".weight"):
            continue
        noise = torch.randn([int(d) for d in kind.dims], generator=generator)
        tensor = 1 + 0.1 * noise if len(kind.dims) == 1 else 0.4 * noise
        program.params.enter(name, Entry(MemorySource({name: tensor}), name, kind))
    return program


def compressed_tiny(seed: int = 0) -> Program:
    """The same with the linears of the first block as two sign planes and those of the second as 3-bit codes."""
    program = tiny_program(seed)
    for site in linear_sites(program, program.graph.nodes)[0]:
        (_shift_add if ".0." in site.name else _quantised)(program, site)
    Editor(program, "test").sweep()
    program.level, program.history = "compressed", ("test{planes=2}",)
    return program


def plane_codes(weight: torch.Tensor, planes: int = 2) -> ShiftCodes:
    """Greedy sign planes with the mean magnitude of each group as the scale."""
    rows, inputs = weight.shape
    rest, signs, scales = weight.double(), [], []
    for _ in range(planes):
        sign = torch.where(rest >= 0, 1.0, -1.0).double()
        scale = rest.abs().unflatten(1, (inputs // GROUP, GROUP)).mean(-1)
        rest = rest - sign * scale.repeat_interleave(GROUP, 1)
        signs.append(sign)
        scales.append(scale)
    offset = torch.full((rows, inputs // GROUP), 0.01)
    return encode(torch.stack(signs), torch.stack(scales, -1), offset, GROUP, TERMS)


def _shift_add(program: Program, site: LinearSite) -> None:
    codes, editor = plane_codes(program.params.get(site.weight)), Editor(program, "test")
    assert codes.offsets is not None
    tensors = {"signs": codes.signs, "scales": codes.scales, "exponents": codes.exponents, "offsets": codes.offsets}
    params = [editor.param(f"{site.name}.{key}", tensor) for key, tensor in tensors.items()]
    _replace(editor, site, nomul.shiftadd_linear.default, *params, site.bias, GROUP, TERMS)


def _quantised(program: Program, site: LinearSite) -> None:
    weight, editor = program.params.get(site.weight), Editor(program, "test")
    groups = site.inputs // GROUP
    scales = (weight.unflatten(1, (groups, GROUP)).abs().amax(-1) / 3.5).half()
    steps = scales.float().repeat_interleave(GROUP, 1)
    codes = (weight / steps + 4).round().clamp(0, 7).to(torch.uint8)
    zeros = torch.full((site.rows, groups), 4, dtype=torch.uint8)
    tensors = {"codes": pack_bits(codes, BITS), "scales": scales, "zeros": pack_bits(zeros, BITS)}
    params = [editor.param(f"{site.name}.{key}", tensor) for key, tensor in tensors.items()]
    _replace(editor, site, nomul.quant_linear.default, *params, site.bias, BITS, GROUP)


def _replace(editor: Editor, site: LinearSite, target: Any, *args: Any) -> None:
    new = editor.before(site.node).call(target, site.node.args[0], *args, like=site.node)
    editor.replace(site.node, new, keep_name=True)
    editor.erase(site.node)


def word_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Words `w2` ... as ids, with an unknown and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<end>": END} | {f"w{i}": i for i in range(2, VOCAB)}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="<end>")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}w2 {{ m.content }} w3{% endfor %}"
    return tokenizer


def write_artifact(folder: Path, program: Program, tokenizer: bool = True, chat: bool = False) -> Path:
    """Write a program as an artifact, with or without a tokenizer, and return the folder."""
    folder.mkdir(parents=True)
    write_program(program, folder)
    manifest = {"format": FORMAT, "pipeline": "test{planes=2}", "target": "reference", "seed": 7}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict()), encoding="utf-8")
    if tokenizer:
        word_tokenizer(chat).save_pretrained(str(folder))
    return folder


def some_text(words: int, seed: int = 0) -> str:
    """Seeded words of the tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(2, VOCAB, (words,), generator=generator))
