"""Traced graphs on disk: tracing is the slowest step before calibration, and depends on the configuration alone."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import frontend.canonical
import frontend.exported
import frontend.hf
import frontend.hf_encoder
import frontend.raising
import ir.edit
import ir.pattern
import ir.rewrite
import ir.simplify
from frontend.exported import Untraced
from frontend.transposed import TransposedSource
from frontend.zoo import cache_dir
from ir.artifact import file_hash, write_safetensors
from ir.errors import NomulError
from ir.params import Entry, SafetensorsSource
from ir.parse import parse
from ir.program import Program
from ir.text import dump

_CHECK = "# sha256 of the constants and of the text below: "
_SHAPERS = (
    frontend.hf,
    frontend.hf_encoder,
    frontend.exported,
    frontend.canonical,
    frontend.raising,
    ir.edit,
    ir.pattern,
    ir.rewrite,
    ir.simplify,
)


def traced_program(config: Any, name: str, progress: Callable[[str], None], folder: Path | None = None) -> Program:
    """Return the canonical program of a configuration, its weights unbound; traced once, then read from the cache.

    folder: the cache (default: the user's). A damaged cache file is traced anew; a folder that cannot be written is
    reported through `progress`, and the trace is used all the same.
    """
    program = cached_program(config, name, folder)
    if program is None:
        progress(f"tracing {config.model_type}, once for this configuration")
        program = _trace(config, name)
        try:
            write_trace(_stem(config, folder), program)
        except OSError as error:
            progress(f"the trace could not be kept for the next run: {error}")
    return program


def _trace(config: Any, name: str) -> Program:
    encoder = frontend.hf_encoder.is_encoder(config)
    program = frontend.hf_encoder.trace(config, name) if encoder else frontend.hf.trace(config, name)
    frontend.canonical.canonicalise(program)
    return program


def cached_program(config: Any, name: str, folder: Path | None = None) -> Program | None:
    """Return the canonical program of a configuration from the cache, or None when it was not traced yet."""
    program = read_trace(_stem(config, folder))
    if program is not None:
        program.name = name
    return program


def _stem(config: Any, folder: Path | None) -> Path:
    key = hashlib.sha256((frontend.hf.fingerprint(config) + code_version(())).encode()).hexdigest()[:32]
    return (folder or trace_folder()) / key


def trace_folder() -> Path:
    """Return the user's folder of traces."""
    return cache_dir() / "traces"


def code_version(files: Iterable[Path]) -> str:
    """Return a hash of the code that shapes graphs and of more files, so that no changed rule meets an old trace."""
    digest = hashlib.sha256()
    for file in (*(Path(str(module.__file__)) for module in _SHAPERS), *files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _constants(program: Program) -> list[str]:
    return [n for n in program.params if not isinstance(program.params.entry(n).source, (Untraced, TransposedSource))]


def write_trace(stem: Path, program: Program) -> None:
    """Write a program with its constants under a path to which suffixes are added; raises OSError."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    types = {n: program.params.type_of(n) for n in _constants(program)}
    text = dump(program)
    with tempfile.TemporaryDirectory(dir=stem.parent) as scratch:
        constants, graph = Path(scratch, "constants"), Path(scratch, "graph")
        digest = write_safetensors(constants, types, program.params.get)
        graph.write_text(f"{_CHECK}{digest} {_text_hash(text)}\n{text}", encoding="utf-8")
        # The text goes last: a reader that finds it also finds the constants it needs.
        os.replace(constants, stem.with_suffix(".safetensors"))
        os.replace(graph, stem.with_suffix(".ir"))


def read_trace(stem: Path) -> Program | None:
    """Return the program under `stem`, or None when it is absent, damaged or of another release's text form."""
    constants = stem.with_suffix(".safetensors")
    try:
        check, _, text = stem.with_suffix(".ir").read_text(encoding="utf-8").partition("\n")
        if check != f"{_CHECK}{file_hash(constants)} {_text_hash(text)}":
            return None
        return _bound(parse(text), SafetensorsSource(constants))
    except (OSError, UnicodeDecodeError, NomulError):
        return None


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bound(program: Program, stored: SafetensorsSource) -> Program:
    """Give a parsed program its stored constants; every other parameter waits for a checkpoint."""
    params, known = program.params, set(stored.names())
    for name in list(params):
        kind = params.type_of(name)
        params.enter(name, Entry(stored if name in known else Untraced(name, kind), name, kind))
    return program
