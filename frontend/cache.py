"""Traced graphs on disk: tracing takes longer than anything else before calibration, and depends on the config alone."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frontend.canonical
import frontend.exported
import frontend.hf
import frontend.raising
from frontend.exported import Untraced
from frontend.raising import TransposedSource
from frontend.zoo import cache_dir
from ir.artifact import write_safetensors
from ir.params import Entry, SafetensorsSource
from ir.parse import parse
from ir.program import Program
from ir.text import dump


def traced_program(config: Any, name: str, progress: Callable[[str], None], folder: Path | None = None) -> Program:
    """Return the canonical program of a configuration, its weights unbound; traced once, then read from the cache.

    folder: the cache (default: the user's). A cache file that cannot be read is traced anew.
    """
    program = cached_program(config, name, folder)
    if program is None:
        progress(f"tracing {config.model_type}, once for this configuration")
        program = frontend.hf.trace(config, name)
        frontend.canonical.canonicalise(program)
        _write(_stem(config, folder), program)
    return program


def cached_program(config: Any, name: str, folder: Path | None = None) -> Program | None:
    """Return the canonical program of a configuration from the cache, or None when it was not traced yet."""
    program = _read(_stem(config, folder))
    if program is not None:
        program.name = name
    return program


def _stem(config: Any, folder: Path | None) -> Path:
    key = hashlib.sha256((frontend.hf.fingerprint(config) + _code_version()).encode()).hexdigest()[:32]
    return (folder or cache_dir() / "traces") / key


def _code_version() -> str:
    """Return a hash of the modules that shape the graph, so that a changed rule never meets an old trace."""
    digest = hashlib.sha256()
    for module in (frontend.hf, frontend.exported, frontend.canonical, frontend.raising):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _constants(program: Program) -> list[str]:
    return [n for n in program.params if not isinstance(program.params.entry(n).source, (Untraced, TransposedSource))]


def _write(stem: Path, program: Program) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    types = {n: program.params.type_of(n) for n in _constants(program)}
    # The text goes last: a reader that finds it also finds the constants it needs.
    for suffix, write in (
        (".safetensors", lambda path: write_safetensors(path, types, program.params.get)),
        (".ir", lambda path: path.write_text(dump(program), encoding="utf-8")),
    ):
        handle, scratch = tempfile.mkstemp(dir=stem.parent, suffix=suffix)
        os.close(handle)
        write(Path(scratch))
        os.replace(scratch, stem.with_suffix(suffix))


def _read(stem: Path) -> Program | None:
    text, constants = stem.with_suffix(".ir"), stem.with_suffix(".safetensors")
    if not (text.is_file() and constants.is_file()):
        return None
    stored = SafetensorsSource(constants)
    unbound = parse(text.read_text(encoding="utf-8"))
    params = unbound.params
    known = set(stored.names())
    for name in list(params):
        kind = params.type_of(name)
        if name in known:
            params.enter(name, Entry(stored, name, kind))
        else:
            params.enter(name, Entry(Untraced(name, kind), name, kind))
    return unbound


