"""Hugging Face models: a configuration becomes one graph with key/value cache, traced without weight memory."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from frontend.exported import import_exported
from ir.errors import UnsupportedError
from ir.program import Program, rename

# Sizes of the sample inputs: distinct, and neither 0 nor 1, which the exporter would take for constants.
_BATCH, _SEQ, _PAST = 2, 5, 3
_PREFIX = "model_."


@dataclass(frozen=True)
class CacheShape:
    """Key/value cache of one layer: heads and head sizes of keys and of values."""

    heads: int
    key_dim: int
    value_dim: int


class CausalWithCache(nn.Module):
    """A causal language model as a function of token ids, attention mask and flat past keys and values.

    Returns logits and the new cache as a flat list, in the order `[key 0, value 0, key 1, value 1, ...]`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model_ = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        from transformers.cache_utils import DynamicCache

        # Without a configuration every layer keeps all keys and values; a sliding window is then the mask's business.
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model_(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        flat = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return out.logits, flat


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the advice that transformers and the exporter log while a model is built and traced."""
    names = ("transformers", "torch.export", "torch._dynamo", "torch.fx")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def skeleton(config: Any, attention: str = "sdpa", **options: Any) -> nn.Module:
    """Return the causal language model of a configuration as `hollow` builds it."""
    from transformers import AutoModelForCausalLM

    return hollow(AutoModelForCausalLM, config, attention, **options)


def hollow(auto: Any, config: Any, attention: str, **options: Any) -> nn.Module:
    """Return the model that an auto class of transformers makes of a configuration, in float32 and without weights.

    Weights are allocated but never touched, which takes address space, not memory; buffers such as rotary frequencies
    are computed.
    """
    from transformers.initialization import no_init_weights

    with quiet(), no_init_weights(), _skip_torch_init():
        # Building a model writes dtype and attention into its configuration, which is the caller's.
        own = copy.deepcopy(config)
        model: nn.Module = auto.from_config(own, dtype=torch.float32, attn_implementation=attention, **options)
    model.tie_weights()  # type: ignore[operator]  # part of the initialisation that was skipped
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _skip_torch_init() -> Iterator[None]:
    """Make `torch.nn` modules keep their weights untouched while they are built."""
    kinds: list[Any] = [nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d]
    before = {kind: kind.reset_parameters for kind in kinds}
    try:
        for kind in kinds:
            kind.reset_parameters = lambda self: None
        yield
    finally:
        for kind, method in before.items():
            kind.reset_parameters = method


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return alias -> canonical name of parameters that are one tensor; the first name in module order is canonical."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    return aliases


def cache_shapes(config: Any, attention: str) -> tuple[CacheShape, ...]:
    """Return the cache shape of every layer, found by running the model on fake tensors.

    Raises UnsupportedError when a layer keeps anything but keys and values (recurrent state, compressed latents).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.cache_utils import DynamicCache

    with torch.no_grad(), FakeTensorMode():
        # The default expert product has no fake form in float32; the batched one has, and caches do not depend on it.
        model = skeleton(config, attention, experts_implementation="batched_mm")
        out = model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=DynamicCache(), use_cache=True)
    # An encoder fills the cache it is given too, but returns none.
    layers = getattr(getattr(out, "past_key_values", None), "layers", ())
    if not layers:
        raise UnsupportedError(
            "the model keeps no key/value cache",
            where=str(getattr(config, "model_type", "") or type(config).__name__),
            why="its state is not attention keys and values (Mamba, RWKV), or it is an encoder not configured as one",
            fix="use a decoder with attention in every layer, or an encoder whose config names its class (BertModel)",
        )
    shapes = []
    for index, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or values.ndim != 4:
            raise UnsupportedError(
                "the model's cache is not one key and one value tensor per layer",
                where=f"layer {index}: {type(layer).__name__}",
                why="recurrent or hybrid layers carry state that this graph form does not hold",
                fix="use a decoder with ordinary attention in every layer",
            )
        shapes.append(CacheShape(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3])))
    return tuple(shapes)


def trace(config: Any, name: str) -> Program:
    """Trace a causal language model of `config` into a raw Program with dynamic batch, seq and past.

    Raises UnsupportedError when the model keeps another state than keys and values, and what `first_traced` raises.
    """
    return first_traced(config, name, _trace)


def first_traced(config: Any, name: str, one: Callable[[Any, str, str], Program]) -> Program:
    """Return what `one(config, name, attention)` makes with fused attention, or with eager for models that need it.

    Raises UnsupportedError with the exporter's reason when neither traces.
    """
    reasons = []
    for attention in ("sdpa", "eager"):
        try:
            return one(config, name, attention)
        except UnsupportedError:
            raise
        # The exporter lets through whatever the model's own code raises, which may be anything.
        except Exception as error:  # noqa: BLE001
            reasons.append(f"{attention}: {type(error).__name__}: {_first_line(error)}")
    raise UnsupportedError(
        f"{getattr(config, 'model_type', 'the model')} cannot be traced",
        where=name,
        why="; ".join(reasons),
        fix="nomul takes decoder-only language models and encoders whose forward pass torch.export can follow",
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]


def _trace(config: Any, name: str, attention: str) -> Program:
    from torch.export import Dim, export

    with quiet():
        model = skeleton(config, attention)
        shapes = cache_shapes(config, attention)
        past = [torch.zeros(_BATCH, s.heads, _PAST, d) for s in shapes for d in (s.key_dim, s.value_dim)]
        ids = torch.zeros(_BATCH, _SEQ, dtype=torch.long)
        mask = torch.ones(_BATCH, _SEQ + _PAST, dtype=torch.long)
        batch, seq, length = Dim("batch"), Dim("seq"), Dim("past")
        dims = ({0: batch, 1: seq}, {0: batch, 1: Dim.AUTO}, [{0: batch, 2: length}] * len(past))
        with torch.no_grad():
            exported = export(CausalWithCache(model), (ids, mask, past), dynamic_shapes=dims, strict=False)
    program = import_exported(exported, name, _PREFIX, symbols_of(exported), tied_names(model))
    _name_interface(program)
    program.attributes = {"model_type": config.model_type, "layers": len(shapes), "attention": attention}
    return program


def symbols_of(exported: Any) -> dict[str, str]:
    """Return exporter symbol -> declared name, read off the shapes of the user inputs."""
    names: dict[str, str] = {}

    def bind(value: Any, dim: int, name: str) -> None:
        expr = getattr(getattr(value.shape[dim], "node", None), "expr", None)
        if expr is not None and expr.is_Symbol:
            names.setdefault(str(expr), name)

    inputs = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    bind(inputs["input_ids"], 0, "batch")
    bind(inputs["input_ids"], 1, "seq")
    for name, value in inputs.items():
        if name.startswith("past_"):
            bind(value, 2, "past")
    bind(inputs["attention_mask"], 1, "total")
    return names


def _name_interface(program: Program) -> None:
    past = [n for n in program.inputs if n.name.startswith("past_")]
    for index, node in enumerate(past):
        rename(node, f"past_{'value' if index % 2 else 'key'}_{index // 2}")
        node.target = node.name


def fingerprint(config: Any) -> str:
    """Return a text that changes whenever the traced graph of this configuration could."""
    import transformers

    fields = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return json.dumps([fields, torch.__version__, transformers.__version__], sort_keys=True, default=str)
