"""Writing small GGUF files the way llama.cpp's converter does, for the tests that read them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE = {**SHAPES, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128}
FLAT = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def tiny_model(arch: str, **settings: Any) -> PreTrainedModel:
    """Return a random float32 model of two blocks, hidden size 64, four heads over two key-value heads."""
    configs = {
        "llama": lambda: LlamaConfig(**{**DENSE, "rms_norm_eps": 1e-5, **settings}),
        "qwen2": lambda: Qwen2Config(**{**DENSE, **settings}),
        "qwen3": lambda: Qwen3Config(**{**DENSE, "head_dim": 32, **settings}),
        "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=96, **settings),
    }
    model = AutoModelForCausalLM.from_config(configs[arch]()).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.2)
    return model


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return q or k rows in the interleaved rotary order llama files use (the converter's own formula)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def file_tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """Return the float32 arrays of a model under GGUF names, in GGUF layout."""
    config = model.config
    key = next(key for key, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        file_name, array = f"{names.get_name(stem)}.{suffix}", value.numpy()
        if arch == "llama" and ".attn_q." in file_name:
            array = interleave(array, config.num_attention_heads)
        if arch == "llama" and ".attn_k." in file_name:
            array = interleave(array, config.num_key_value_heads)
        found[file_name] = np.ascontiguousarray(array.T if arch == "gpt2" and file_name.endswith(FLAT) else array)
    return found


def write_model(
    path: Path, model: PreTrainedModel, arch: str, kinds: dict[str, Kind] | None = None, **more: Any
) -> Path:
    """Write a model as GGUF; `kinds` maps the end of a tensor name to its type (else F32), `more` adds metadata."""
    writer = gguf.GGUFWriter(path, arch)
    _write_settings(writer, model, arch)
    for key, value in more.items():
        add(writer, key, value)
    for name, array in file_tensors(model, arch).items():
        kind = next((kind for end, kind in (kinds or {}).items() if name.endswith(end)), Kind.F32)
        raw = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, raw, raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)
    return finish(writer)


def _write_settings(writer: gguf.GGUFWriter, model: PreTrainedModel, arch: str) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_context_length(config.max_position_embeddings)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if arch == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value of the GGUF type nearest to its Python type; `__` in the key stands for a dot."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key.replace("__", "."), value)


def finish(writer: gguf.GGUFWriter) -> Path:
    """Write the file out and return its path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def write_tokenizer_file(path: Path, pre: str | None = "smollm", **more: Any) -> Path:
    """Write a GGUF file that holds a byte-level tokenizer of every byte, a few merges and three control tokens."""
    merges = ["Ġ t", "h e", "Ġt he", "1 2", "i n"]
    tokens = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges), "<think>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL) - 1) + [4])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for key, value in more.items():
        add(writer, key, value)
    return finish(writer)
