"""A tiny llama as a Hugging Face directory, tokenizer included, the way a user would bring one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB, WIDTH, INNER, LAYERS = 300, 32, 64, 2
SETTINGS = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WEIGHTS = "model.safetensors"


@cache
def _tokenizer_text() -> str:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<e>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:20]], trainer)
    return str(tokenizer.to_str())


def write_folder(folder: Path, seed: int = 0, tokenizer: bool = True, **settings: Any) -> Path:
    """Write config.json, model.safetensors and, unless told otherwise, a byte-pair tokenizer; return the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SETTINGS, "tie_word_embeddings": True, **settings}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                # Gains of one would hide a pass that forgets them.
                value.normal_(1.0, 0.1)
    model.save_pretrained(str(folder))
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a folder."""
    (folder / "tokenizer.json").write_text(_tokenizer_text(), encoding="utf-8")
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "bos_token": "<e>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")


def some_text(characters: int = 20_000) -> str:
    """Return a part of the text that every Python installation carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:characters]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors by name."""
    return dict(load_file(str(folder / WEIGHTS)))


def change_weights(folder: Path, **tensors: torch.Tensor) -> None:
    """Overwrite tensors of the checkpoint; `__` in a key stands for a dot."""
    changed = weights_of(folder) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(changed, str(folder / WEIGHTS), metadata={"format": "pt"})
