"""Language models and a sentence encoder as ONNX files by torch's exporter, and where real weights come from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frontend.hf import CausalWithCache, cache_shapes
from frontend.open import Model, open_model
from frontend.tokenizer import load_tokenizer
from frontend.zoo import fetch


def smollm2_folder(folder: Path, layers: int | None = None) -> Path:
    """Write the zoo's SmolLM2, or its first layers, as a Hugging Face directory with tokenizer; return it."""
    opened = open_model("smollm2-135m")
    smollm2(opened, layers).save_pretrained(str(folder))
    load_tokenizer(opened.path).save_pretrained(str(folder))
    return folder


def smollm2(opened: Model, layers: int | None = None) -> Any:
    """Return transformers' model of SmolLM2, or of its first layers, with the zoo's weights in float32."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(opened.config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    stored = opened.program.params
    missing = model.load_state_dict({n: stored.get(n) for n in model.state_dict() if n in stored}, strict=False)
    assert [n for n in missing.missing_keys if n != "lm_head.weight"] == []
    model.tie_weights()
    return model


def export_causal(model: nn.Module, path: Path) -> Path:
    """Write a causal language model with cache by torch's exporter; return the file."""
    shapes = cache_shapes(model.config, "sdpa")
    past = [torch.zeros(2, s.heads, 3, d) for s in shapes for d in (s.key_dim, s.value_dim)]
    batch, seq, length = (torch.export.Dim(n) for n in ("batch", "seq", "past"))
    dims = ({0: batch, 1: seq}, {0: batch, 1: torch.export.Dim.AUTO}, [{0: batch, 2: length}] * len(past))
    kinds = [f"{i // 2}.{'value' if i % 2 else 'key'}" for i in range(len(past))]
    torch.onnx.export(
        CausalWithCache(model),
        (torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), past),
        path,
        dynamic_shapes=dims,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{k}" for k in kinds)],
        output_names=["logits", *(f"present.{k}" for k in kinds)],
        dynamo=True,
        verbose=False,
    )
    return path


class _Sentences(nn.Module):
    """An encoder from the three inputs of a sentence encoder to hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        found = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)
        return found.last_hidden_state  # type: ignore[no-any-return]


def export_minilm(folder: Path) -> Path:
    """Write the zoo's MiniLM by torch's exporter, its tokenizer beside it; return the file."""
    from transformers import AutoModel

    source = fetch("all-minilm-l6-v2")
    model = AutoModel.from_pretrained(str(source), attn_implementation="sdpa", add_pooling_layer=False).eval()
    given = tuple(torch.ones(2, 5, dtype=torch.long) for _ in range(3))
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=512)},) * 3
    torch.onnx.export(
        _Sentences(model),
        given,
        folder / "model.onnx",
        dynamic_shapes=dims,
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=["last_hidden_state"],
        dynamo=True,
        verbose=False,
    )
    load_tokenizer(source).save_pretrained(str(folder))
    return folder / "model.onnx"
