"""A program as a directory: its text form, and its weights in safetensors shards that go a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ir.errors import InvariantError, UnsupportedError
from ir.params import ParamStore, SafetensorsSource
from ir.parse import parse
from ir.program import Program
from ir.text import dump
from ir.types import TensorType, tensor_type

SHARD_BYTES = 1 << 30
PROGRAM_FILE, MANIFEST_FILE = "program.ir", "manifest.json"
FORMAT = 1

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_program(
    program: Program, folder: Path, shard_bytes: int = SHARD_BYTES, step: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Write `program.ir` and `weights-*.safetensors` into an existing folder; return file name -> sha256.

    shard_bytes: size at which a new shard starts; step: called once a tensor, for progress. Tensors are written in a
    fixed order, one in memory at a time, so that the same program gives the same bytes.
    """
    hashes = {PROGRAM_FILE: _write_text(folder / PROGRAM_FILE, dump(program))}
    for index, names in enumerate(_shards(program.params, shard_bytes), 1):
        file = f"weights-{index:05d}.safetensors"
        types = {name: program.params.type_of(name) for name in names}
        hashes[file] = write_safetensors(folder / file, types, program.params.get, step)
    return hashes


def read_program(folder: Path) -> Program:
    """Return the program of an artifact folder, its weights left on disk.

    Raises UnsupportedError when a file is missing or a shard is damaged; what `ir.parse.parse` raises for bad text.
    """
    text_file = folder / PROGRAM_FILE
    if not text_file.is_file():
        raise UnsupportedError(
            "this is not a nomul artifact", where=str(folder), why=f"it holds no {PROGRAM_FILE}", fix="compile it again"
        )
    params = ParamStore()
    for shard in sorted(folder.glob("weights-*.safetensors")):
        params.add_source(SafetensorsSource(shard))
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnsupportedError(
            "the program text is damaged", where=str(text_file), why=str(error), fix="compile the model again"
        ) from None
    return parse(text, params)


def read_manifest(folder: Path) -> dict[str, object]:
    """Return an artifact's manifest; raises UnsupportedError when it is missing, damaged or of a later format."""
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            "this is not a nomul artifact", where=str(path), why=str(error), fix="compile it again"
        ) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise UnsupportedError(
            "the artifact is of another format",
            where=str(path),
            why=f"this nomul reads formats up to {FORMAT}",
            fix="read it with the version that wrote it, or compile it again",
        )
    return manifest


def write_safetensors(
    path: Path,
    types: dict[str, TensorType],
    load: Callable[[str], torch.Tensor],
    step: Callable[[], None] = lambda: None,
) -> str:
    """Write tensors to a safetensors file one at a time, widest dtype first for alignment; return the sha256.

    Raises InvariantError for a tensor that is not of its type.
    """
    names = sorted(types, key=lambda n: (-types[n].dtype.itemsize, n))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        kind = types[name]
        span = [offset, offset + kind.nbytes]
        header[name] = {"dtype": _NAMES[kind.dtype], "shape": list(kind.dims), "data_offsets": span}
        offset += kind.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as handle:
        for chunk in (len(text).to_bytes(8, "little"), text):
            handle.write(chunk)
            digest.update(chunk)
        for name in names:
            # A zero-sized tensor has no bytes, and numpy refuses to view it as some.
            if types[name].nbytes:
                tensor = load(name).detach()
                if tensor_type(tensor) != types[name]:
                    raise InvariantError(f"{name} is {tensor_type(tensor)} but was promised to be {types[name]}")
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                handle.write(data)
                digest.update(data)
            step()
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def _shards(params: ParamStore, limit: int) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for name in params:
        if shard and size + params.nbytes(name) > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += params.nbytes(name)
    if shard:
        yield shard
