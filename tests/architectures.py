"""Tiny models of many decoder architectures: configurations, seeded weights, traced programs, and how to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from frontend.canonical import canonicalise
from frontend.hf import skeleton, trace
from ir.edit import Editor
from ir.execute import empty_inputs, next_inputs
from ir.program import TYPE, Program
from ir.types import TensorType, ValueType

VOCAB = 96
_SHAPE: dict[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}
_MULTI_HEAD = {**_SHAPE, "num_key_value_heads": 4}
_ENDS = {"bos_token_id": 0, "eos_token_id": 1}
_GPT: dict[str, int] = {"n_embd": 64, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, **_ENDS}


def _of(kind: str, layers_key: str = "num_hidden_layers", **fields: Any) -> Callable[[int], Any]:
    """Return a function from the number of layers to a configuration of transformers' class `kind`."""

    def build(layers: int) -> Any:
        import transformers

        return getattr(transformers, f"{kind}Config")(**fields, **{layers_key: layers})

    return build


_OPT = {"ffn_dim": 128, "max_position_embeddings": 64, "word_embed_proj_dim": 64}
_NO_KV = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
_NO_MLP = {k: v for k, v in _NO_KV.items() if k != "intermediate_size"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": _of("Llama", tie_word_embeddings=True, **_SHAPE),
    "llama_untied": _of("Llama", tie_word_embeddings=False, **_SHAPE),
    "mistral": _of("Mistral", head_dim=16, **_SHAPE),
    "qwen2": _of("Qwen2", **_SHAPE),
    "qwen3": _of("Qwen3", head_dim=16, **_SHAPE),
    "qwen3_moe": _of("Qwen3Moe", head_dim=16, **_EXPERTS, **_SHAPE),
    "mixtral": _of("Mixtral", num_local_experts=4, **_SHAPE),
    "gpt2": _of("GPT2", "n_layer", **_GPT),
    "gptj": _of("GPTJ", "n_layer", rotary_dim=8, **_GPT),
    "opt": _of("OPT", **_OPT, **_NO_MLP),
    "neox": _of("GPTNeoX", **_NO_KV),
    "phi": _of("Phi", **_MULTI_HEAD),
    "phi3": _of("Phi3", pad_token_id=0, **_SHAPE),
    "gemma": _of("Gemma", head_dim=16, **_SHAPE),
    "gemma2": _of("Gemma2", head_dim=16, **_SHAPE),
    "falcon": _of("Falcon", **_NO_MLP),
    "stablelm": _of("StableLm", **_SHAPE),
    "bloom": _of("Bloom", "n_layer", hidden_size=64, n_head=4, vocab_size=VOCAB),
    "cohere": _of("Cohere", pad_token_id=0, **_ENDS, **_SHAPE),
    "olmo2": _of("Olmo2", pad_token_id=0, **_SHAPE),
    "granite": _of("Granite", **_SHAPE),
    "starcoder2": _of("Starcoder2", **_ENDS, **_SHAPE),
}


def tiny(name: str, layers: int = 2) -> Any:
    """Return the configuration of a tiny model: width 64, four heads of 16, 96 tokens; raises KeyError."""
    return CONFIGS[name](layers)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give a model seeded weights: matrices of unit gain, small biases, norm gains log-normal with random signs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            value = noise / parameter.shape[-1] ** 0.5
        elif name.endswith("bias"):
            value = 0.1 * noise
        else:
            value = noise.exp() * torch.where(torch.rand(noise.shape, generator=generator) < 0.2, -1.0, 1.0)
        parameter.data.copy_(value)


def bind(program: Program, weights: Mapping[str, Tensor]) -> None:
    """Write a model's weights into a program's parameters; others (rotary frequencies) came with the program.

    A parameter `X_t` that the weights lack is the transpose of `X`.
    """
    for name in list(program.params):
        if name in weights:
            program.params.put(name, weights[name], "test")
        elif name.removesuffix("_t") in weights:
            program.params.put(name, weights[name.removesuffix("_t")].T, "test")


@cache
def _traced(name: str, layers: int) -> tuple[Program, nn.Module]:
    config = tiny(name, layers)
    program = trace(config, name)
    canonicalise(program)
    model = skeleton(config, program.attributes["attention"])
    randomise(model)
    bind(program, model.state_dict())
    return program, model


def traced(name: str, layers: int = 2) -> tuple[Program, nn.Module]:
    """Return a fresh clone of a canonical float32 program with seeded weights, and the model it was traced from.

    The model is shared between callers, so it must not be changed.
    """
    program, model = _traced(name, layers)
    return program.clone(), model


def doubled(program: Program) -> Program:
    """Return a clone whose parameters, casts and recorded types are float64 wherever they were float32."""
    clone = program.clone()
    for node in clone.graph.nodes:
        if TYPE in node.meta:
            node.meta[TYPE] = _doubled_type(node.meta[TYPE])
        if node.op == "call_function":
            node.args = tuple(torch.float64 if a is torch.float32 else a for a in node.args)
            node.kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in node.kwargs.items()}
    editor = Editor(clone, "test")
    for name in list(clone.params):
        if clone.params.type_of(name).dtype is torch.float32:
            editor.param(name, clone.params.get(name).double())
    return clone


def _doubled_type(kind: ValueType) -> ValueType:
    if isinstance(kind, tuple):
        return tuple(map(_doubled_type, kind))
    if isinstance(kind, TensorType) and kind.dtype is torch.float32:
        return TensorType(torch.float64, kind.dims)
    return kind


def ids_for(batch: int = 2, seq: int = 7, seed: int = 1) -> Tensor:
    """Return seeded token ids [batch, seq]."""
    return torch.randint(2, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def prefill_and_decode(program: Program, ids: Tensor) -> list[Tensor]:
    """Return the logits of a prefill of all tokens but the last, and of the last decoded on the prefill's cache."""
    module = program.module()
    kind = program.inputs[2].meta[TYPE]
    with torch.no_grad():
        first = module(*_in_order(program, empty_inputs(program, ids[:, :-1], kind.dtype)))
        return [first[0], module(*_in_order(program, next_inputs(program, ids[:, -1:], first)))[0]]


def _in_order(program: Program, values: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return [values[node.name] for node in program.inputs]


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest ||found - wanted|| / ||wanted|| of several tensors."""
    return max(float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))
