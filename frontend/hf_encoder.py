"""Hugging Face encoders: a configuration without a cache becomes one graph from token ids to hidden states."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from frontend.exported import import_exported
from frontend.hf import first_traced, hollow, quiet, symbols_of, tied_names
from ir.errors import UnsupportedError
from ir.program import Program

# Sizes of the sample inputs: distinct, and neither 0 nor 1, which the exporter would take for constants.
_BATCH, _SEQ = 2, 5
_PREFIX = "model_."
_OUTPUT = "last_hidden_state"


class Encoder(nn.Module):
    """An encoder as a function of token ids, attention mask and perhaps token types, all [batch, seq]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model_ = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return (self.model_(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state,)


def named_classes(config: Any) -> tuple[str, ...]:
    """Return the classes that a configuration says its checkpoint is of; none when the field is not a list of names."""
    names = getattr(config, "architectures", None)
    return tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else ()


def is_encoder(config: Any) -> bool:
    """Return whether a configuration is that of an encoder: a model that sees every token and keeps no cache.

    Its kind of model can fill in masked tokens, which needs sight of both sides, it is not set to be a decoder, and
    `architectures` names classes of which none predicts the next token.
    """
    from transformers import AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # The same configuration also serves decoders, so one that names no class is not known to be an encoder.
    named = set(named_classes(config))
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if not named or decodes or named & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return False
    return type(config) in AutoModelForMaskedLM._model_mapping


def bare_class(config: Any) -> Any:
    """Return transformers' class of the encoder without a head; raises KeyError when it has none."""
    from transformers import AutoModel
    from transformers.models.auto.auto_factory import _get_model_class

    return _get_model_class(config, AutoModel._model_mapping)


def bare_options(config: Any) -> dict[str, Any]:
    """Return what the bare class must be told to leave out the layer that pools hidden states into one."""
    return (
        {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(bare_class(config)).parameters else {}
    )


def skeleton(config: Any, attention: str = "sdpa") -> nn.Module:
    """Return the encoder of a configuration, without head and pooler, as `frontend.hf.hollow` builds it."""
    from transformers import AutoModel

    return hollow(AutoModel, config, attention, **bare_options(config))


def trace(config: Any, name: str) -> Program:
    """Trace the encoder of `config` into a raw Program with dynamic batch and seq; raises what `first_traced` raises.

    Its inputs are input_ids, attention_mask and, for a model that tells token types apart, token_type_ids, all
    [batch, seq]; its output is last_hidden_state [batch, seq, width].
    """
    return first_traced(config, name, _trace)


def _trace(config: Any, name: str, attention: str) -> Program:
    from torch.export import Dim, export

    with quiet():
        model = skeleton(config, attention)
        count = 3 if _tells_types(config) else 2
        sample = tuple(torch.ones(_BATCH, _SEQ, dtype=torch.long) for _ in range(count))
        # A table of positions bounds the length, and the exporter must be free to find by what.
        dims = ({0: Dim("batch"), 1: Dim.AUTO},) * count
        with torch.no_grad():
            exported = export(Encoder(model), sample, dynamic_shapes=dims, strict=False)
    symbols = symbols_of(exported)
    if tuple(symbols.values()) != ("batch", "seq"):
        raise UnsupportedError(
            f"{config.model_type} does not take batches and sequences of any size",
            where=name,
            why=f"of batch and seq its graph leaves open: {', '.join(symbols.values()) or 'none'}",
            fix="use an encoder whose forward pass works for every size",
        )
    program = import_exported(exported, name, _PREFIX, symbols, tied_names(model))
    program.attributes = {
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "attention": attention,
        "outputs": [_OUTPUT],
    }
    return program


def _tells_types(config: Any) -> bool:
    """Return whether the encoder reads token types of which there is more than one."""
    reads = "token_type_ids" in inspect.signature(bare_class(config).forward).parameters
    return reads and getattr(config, "type_vocab_size", 0) > 1
