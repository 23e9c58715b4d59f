"""An ONNX file as a canonical program: traced once, then read from the cache of traces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as onnx
import torch

import frontend.decomposed
import frontend.transposed
from frontend.cache import code_version, read_trace, trace_folder, write_trace
from frontend.canonical import canonicalise, drop_empty_constants, name_values
from frontend.exported import Untraced
from frontend.onnx.decoded import decode_weights
from frontend.onnx.load import load
from frontend.onnx.plain_shapes import plain_shapes
from frontend.onnx.scalars import inline_scalars
from frontend.onnx.tensors import OnnxSource
from frontend.onnx.trace import is_weight, trace
from frontend.onnx.unpacked import RowsSource, unpack
from frontend.transposed import PointsSource, TransposedSource, turn_shared
from ir.params import Entry, Source
from ir.program import Program
from ir.types import TensorType

Progress = Callable[[str], None]

# Attribute of a kept trace: {parameter: [initializer, whether it is turned, its first row and that after its last]}.
_INITIALIZERS = "initializers"
# A trace with more constants, such as the codes of a large model, is not kept: it would be a second copy of them.
_MOST_BYTES = 1 << 26


def open_program(path: Path, progress: Progress, folder: Path | None = None) -> tuple[Program, str]:
    """Return the canonical program of an ONNX file, and a sha256 of its graph and of what is stored beside it.

    folder: the cache of traces (default: the user's). Raises UsageError and UnsupportedError as `load` and `trace` do.
    """
    progress(f"reading {path.name}")
    model = load(path)
    graph = _digest(path, model)
    stem = (folder or trace_folder()) / hashlib.sha256((graph + _CODE).encode()).hexdigest()[:32]
    kept = read_trace(stem)
    program = None if kept is None else _bound(kept, model)
    if program is None:
        program = _traced(model, path.stem, progress)
        _keep(stem, program, progress)
    program.name = path.stem
    digest = hashlib.sha256(graph.encode())
    for name in sorted(program.params):
        entry = program.params.entry(name)
        digest.update(f"{name} {entry.source.type_of(entry.key)} {entry.source.stored_bytes(entry.key)}".encode())
    return program, digest.hexdigest()


def _traced(model: onnx.Model, name: str, progress: Progress) -> Program:
    progress(f"tracing {name}, once for this file")
    program = trace(model, name)
    inline_scalars(program)
    plain_shapes(program)
    turn_shared(program, "onnx")
    canonicalise(program)
    unpack(program)
    drop_empty_constants(program)
    name_values(program)
    return program


def _digest(path: Path, model: onnx.Model) -> str:
    """Hash a file, and what decides its trace besides: values in other files that are no weights."""
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256")
    for value in model.graph.initializers.values():
        stored = value.const_value
        if isinstance(stored, onnx.ExternalTensor) and not is_weight(stored):
            digest.update(stored.tobytes())
    return digest.hexdigest()


def _code() -> str:
    """Return a text that changes whenever the same file could give another program."""
    own = sorted(Path(__file__).parent.rglob("*.py"))
    others = [Path(str(m.__file__)) for m in (frontend.decomposed, frontend.transposed)]
    return f"{code_version((*own, *others))} {torch.__version__} {onnx.__version__}"


# Read when the code is: a file that is edited afterwards is not what runs.
_CODE = _code()


def _keep(stem: Path, program: Program, progress: Progress) -> None:
    """Write a program without its weights, unless its other constants are large."""
    found, constants = dict[str, list[Any]](), 0
    for name in program.params:
        entry = program.params.entry(name)
        place = _initializer(entry)
        if place is None:
            constants += entry.source.stored_bytes(entry.key)
        else:
            found[name] = list(place)
    if constants > _MOST_BYTES:
        return
    clone = program.clone()
    for name in found:
        kind = clone.params.type_of(name)
        clone.params.enter(name, Entry(Untraced(name, kind), name, kind))
    clone.attributes = {**clone.attributes, _INITIALIZERS: found}
    try:
        write_trace(stem, clone)
    except OSError as error:
        progress(f"the trace could not be kept for the next run: {error}")


def _initializer(entry: Entry) -> tuple[Any, ...] | None:
    """Return which initializer a parameter is, whether turned, and its rows; None for a constant of the trace."""
    source, key, turned, rows = entry.source, entry.key, False, (0, 0)
    if isinstance(source, RowsSource):
        rows, source = (source.start, source.stop), source.source
    if isinstance(source, TransposedSource):
        key, turned = source.key, True
        source = source.source
    if isinstance(source, PointsSource):
        key = source.key
        source = source.source
    return (source.initializer(key), turned, *rows) if isinstance(source, OnnxSource) else None


def _bound(program: Program, model: onnx.Model) -> Program | None:
    """Give a kept trace the weights of its model; None where one of them is missing."""
    decode_weights(model.graph)
    found: dict[str, list[Any]] = program.attributes.get(_INITIALIZERS, {})
    program.attributes = {k: v for k, v in program.attributes.items() if k != _INITIALIZERS}
    stored = {str(v.name): v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    if any(place[0] not in stored for place in found.values()):
        return None
    for name, place in found.items():
        kind = program.params.type_of(name)
        program.params.enter(name, _entry(OnnxSource(stored), kind, *place))
    return program


def _entry(source: Source, kind: TensorType, initializer: str, turned: bool, start: int, stop: int) -> Entry:
    """Return a parameter that is an initializer of a model, turned or in part; the inverse of `_initializer`."""
    if len(source.type_of(initializer).dims) > len(kind.dims):
        source = PointsSource(source, initializer)
    source = TransposedSource(source, initializer) if turned else source
    if stop:
        return Entry(RowsSource(source, initializer, start, stop), initializer, kind, "onnx")
    return Entry(source, initializer, kind, "canonical" if turned else "")
