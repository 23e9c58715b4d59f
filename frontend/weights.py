"""Checkpoints on disk as sources of float32 weights under the names of the traced graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from frontend.exported import Untraced
from frontend.hf_encoder import bare_options, is_encoder
from frontend.transposed import TransposedSource
from ir.errors import UnsupportedError
from ir.params import Entry, MemorySource, ParamStore, SafetensorsSource, Source
from ir.program import Program
from ir.types import TensorType


class Float32Source:
    """Another source whose narrower floats are widened to float32 when they are read."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def type_of(self, name: str) -> TensorType:
        kind = self._source.type_of(name)
        return replace(kind, dtype=torch.float32) if kind.dtype.is_floating_point else kind

    def stored_bytes(self, name: str) -> int:
        return self._source.stored_bytes(name)

    def load(self, name: str) -> torch.Tensor:
        tensor = self._source.load(name)
        return tensor.float() if tensor.is_floating_point() else tensor


class JoinedSource:
    """Several sources as one, optionally under other names."""

    def __init__(self, parts: list[Source], rename: Mapping[str, str] | None = None) -> None:
        rename = rename or {}
        self._home = {rename.get(n, n): (part, n) for part in parts for n in part.names()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._home)

    def type_of(self, name: str) -> TensorType:
        part, key = self._home[name]
        return part.type_of(key)

    def stored_bytes(self, name: str) -> int:
        part, key = self._home[name]
        return part.stored_bytes(key)

    def load(self, name: str) -> torch.Tensor:
        part, key = self._home[name]
        return part.load(key)


def open_checkpoint(folder: Path) -> Source:
    """Return the safetensors weights of a Hugging Face directory, sharded or not, memory-mapped.

    Raises UnsupportedError when there are none (pickled weights are never loaded) or a shard is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    files = _shards(index) if index.is_file() else sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        pickles = ", ".join(p.name for p in folder.glob("*.bin"))
        raise UnsupportedError(
            "the model directory holds no safetensors weights",
            where=str(folder),
            why=f"{pickles} is a pickle, which can run code" if pickles else "no *.safetensors file is there",
            fix="save the model with safe_serialization=True",
        )
    missing = [f for f in files if not (folder / f).is_file()]
    if missing:
        raise UnsupportedError("weight shards are missing", where=str(folder), why=", ".join(missing))
    return JoinedSource([SafetensorsSource(folder / f) for f in files])


def _shards(index: Path) -> list[str]:
    """Return the files that a shard index names; raises UnsupportedError unless they are all names in its folder."""
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedError("the shard index is damaged", where=str(index), why=repr(error)) from None
    strange = [f for f in files if not isinstance(f, str) or Path(f).name != f]
    if strange or not files:
        why = f"{strange[0]!r} is no file name" if strange else "it names no files"
        raise UnsupportedError("the shard index is damaged", where=str(index), why=why)
    return sorted(files)


def bind_weights(program: Program, source: Source, prefixes: tuple[str, ...] = ()) -> list[str]:
    """Give every traced parameter its tensor in `source`; return the names that `source` does not have.

    prefixes: module prefixes a checkpoint may lack or have in excess, as with a bare backbone's. Widths, ties and
    transposes follow the graph. Raises UnsupportedError when a tensor has another shape than the configuration gives.
    """
    wide, params = Float32Source(source), program.params
    # Older checkpoints store the positions that models count up themselves, some with another type or length.
    known = {name for name in wide.names() if name.rpartition(".")[2] != "position_ids"}
    missing = []
    for name in list(params):
        entry = params.entry(name)
        key, turned = _find(name, known, params, prefixes)
        if key is None:
            if isinstance(entry.source, (Untraced, TransposedSource)):
                missing.append(name)
            continue
        found: Source = TransposedSource(wide, key) if turned else wide
        kind = found.type_of(key)
        if kind != entry.type:
            raise UnsupportedError(
                "a weight does not fit the configuration",
                where=name,
                why=f"the checkpoint holds {kind}, the configuration makes it {entry.type}",
                fix="use the config.json that belongs to these weights",
            )
        params.enter(name, Entry(found, key, kind, entry.written_by))
    return missing


def _find(name: str, known: set[str], params: ParamStore, prefixes: tuple[str, ...]) -> tuple[str | None, bool]:
    """Return the checkpoint's name of a parameter or of one of its ties, and whether it is stored transposed."""
    ties = [alias for alias, target in params.aliases().items() if target == name]
    for candidate in (name, *ties):
        spellings = [candidate]
        for prefix in prefixes:
            spellings += [candidate.removeprefix(prefix), prefix + candidate]
        for spelling in spellings:
            if spelling in known:
                return spelling, False
        if candidate.endswith("_t"):
            key, _ = _find(candidate[:-2], known, ParamStore(), prefixes)
            if key is not None:
                return key, True
    return None, False


def bind_through_transformers(program: Program, folder: Path, config: Any) -> None:
    """Load a checkpoint whose names transformers converts on load (merged experts, legacy spellings), wholly in memory.

    Raises UnsupportedError when transformers cannot load it or weights are still missing.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    auto, options = (AutoModel, bare_options(config)) if is_encoder(config) else (AutoModelForCausalLM, {})
    try:
        model, loaded = auto.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UnsupportedError("transformers cannot load the weights", where=str(folder), why=str(error)) from None
    # What transformers does not find it makes up at random, and only logs that it did.
    absent = sorted(str(name) for name in loaded["missing_keys"])
    if absent:
        raise missing_weights(folder, absent)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    missing = bind_weights(program, MemorySource(tensors))
    if missing:
        raise missing_weights(folder, missing)


def missing_weights(where: Path, names: list[str]) -> UnsupportedError:
    """Return the error for weights a checkpoint does not hold."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return UnsupportedError(
        "the checkpoint lacks weights the model reads",
        where=str(where),
        why=shown,
        fix="use a complete checkpoint of the architecture that config.json names",
    )
