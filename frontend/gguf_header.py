"""The header of a GGUF file: metadata and tensor table, every read checked against the file before it happens."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ir.errors import UnsupportedError, UsageError

_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
# Name, dims in row-major order, ggml type id, offset in the data section.
Row = tuple[str, tuple[int, ...], int, int]
_VERSIONS = (2, 3)
_FIXED_BYTES = 24
# The least a metadata pair and a tensor row can take: lengths, type tags and one byte of value.
_LEAST_PAIR, _LEAST_ROW = 13, 24
# ggml's own limits: four dims to a tensor; arrays of arrays are legal, but none deeper than this is known.
_MOST_DIMS, _MOST_NESTING = 4, 4


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table: dims in row-major (torch) order, ggml type id, absolute start and size in bytes."""

    name: str
    dims: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header; arrays of numbers in the metadata are numpy arrays, arrays of strings are lists."""

    path: Path
    metadata: Mapping[str, object]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """The `general.architecture` of the file, such as `llama`."""
        return text_field(self, "general.architecture")

    def tensor(self, name: str) -> GgufTensor | None:
        """Return the row of a tensor, or None when the file has none of that name."""
        return next((row for row in self.tensors if row.name == name), None)


def damaged(path: Path, why: str) -> UnsupportedError:
    """Return the error for a file that contradicts itself."""
    return UnsupportedError(
        "the GGUF file is damaged", where=str(path), why=why, fix="fetch the file again, or convert it again"
    )


def text_field(header: GgufHeader, key: str) -> str:
    """Return a metadata string; raise UnsupportedError when it is absent or not a string."""
    value = header.metadata.get(key)
    if not isinstance(value, str):
        raise damaged(header.path, f"its metadata has no text under {key}")
    return value


def count_field(header: GgufHeader, key: str, default: int | None = None) -> int:
    """Return a positive metadata integer, or `default` when absent; raise UnsupportedError for anything else."""
    value = header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        shown = "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]}"
        raise damaged(header.path, f"its metadata has {shown} under {key}, where a positive integer belongs")
    return value


def open_map(path: Path) -> mmap.mmap:
    """Return the whole file memory-mapped for reading; raise UsageError or UnsupportedError when it cannot be."""
    try:
        size = path.stat().st_size
        if size < _FIXED_BYTES:
            raise damaged(path, f"it has {size} bytes, fewer than the {_FIXED_BYTES} every GGUF file begins with")
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UsageError(
            "cannot open the GGUF file", where=str(path), why=error.strerror or str(error), fix="check the path"
        ) from None


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file without touching tensor data.

    Raises UsageError when the file cannot be opened, UnsupportedError when it is damaged, big-endian, of an unknown
    version, one part of several, or holds tensors of a type that cannot be dequantised.
    """
    with open_map(path) as view:
        return _parse(path, view)


def _parse(path: Path, view: mmap.mmap) -> GgufHeader:
    if view[:4] != b"GGUF":
        raise UnsupportedError(
            "this is not a GGUF file",
            where=str(path),
            why=f"it begins with {view[:4]!r} instead of b'GGUF'",
            fix="give a .gguf file, a Hugging Face directory, or an .onnx file",
        )
    cursor = _Cursor(path, view)
    _check_version(path, cursor.number(4))
    rows, pairs = cursor.number(8), cursor.number(8)
    if pairs * _LEAST_PAIR + rows * _LEAST_ROW > len(view) - _FIXED_BYTES:
        raise damaged(path, f"it claims {pairs} metadata pairs and {rows} tensors, too many for {len(view)} bytes")
    metadata: dict[str, object] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in metadata:
            raise damaged(path, f"the metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.number(4))
    _check_single(path, metadata)
    table = [_read_row(cursor) for _ in range(rows)]
    return GgufHeader(path, metadata, _place(path, table, _data_start(path, metadata, cursor.pos), len(view)))


def _check_version(path: Path, version: int) -> None:
    if version in _VERSIONS:
        return
    swapped = version & 0xFFFF == 0
    raise UnsupportedError(
        "this kind of GGUF file is not supported",
        where=str(path),
        why="it is big-endian" if swapped else f"it is of version {version}, not {' or '.join(map(str, _VERSIONS))}",
        fix="convert the model again with a current llama.cpp",
    )


def _check_single(path: Path, metadata: dict[str, object]) -> None:
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedError(
            "a GGUF model split over several files is not supported",
            where=str(path),
            why=f"this file is one of {parts}",
            fix="merge the parts with llama.cpp's gguf-split --merge",
        )


class _Cursor:
    """A reading position in the mapped file that refuses to leave it."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.path, self.view, self.pos = path, view, 4

    def take(self, count: int, what: str) -> bytes:
        left = len(self.view) - self.pos
        if count > left:
            raise damaged(
                self.path, f"{what} at byte {self.pos} takes {count} bytes and {left} follow: it is truncated"
            )
        self.pos += count
        return self.view[self.pos - count : self.pos]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width, "a number"), "little")

    def text(self) -> str:
        at = self.pos
        raw = self.take(self.number(8), "a string")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"the string at byte {at} is not UTF-8") from None

    def value(self, tag: int, depth: int = 0) -> object:
        if tag == _STRING:
            return self.text()
        if tag == _ARRAY:
            return self._array(depth)
        scalar = np.frombuffer(self.take(self._scalar(tag).itemsize, "a number"), self._scalar(tag))[0]
        # The shortest decimal that is the same float32 is the number the model's author wrote (1e-05, not
        # 9.999999747378752e-06).
        return float(str(scalar)) if tag == _FLOAT32 else scalar.item()

    def _array(self, depth: int) -> object:
        tag, count = self.number(4), self.number(8)
        if tag in _SCALARS:
            dtype = self._scalar(tag)
            return np.frombuffer(self.take(count * dtype.itemsize, f"an array of {count}"), dtype)
        # Eight bytes of length is the least a string or an inner array takes.
        if count * 8 > len(self.view) - self.pos:
            raise damaged(self.path, f"the array at byte {self.pos} claims {count} items, more than the file holds")
        if depth == _MOST_NESTING:
            raise damaged(self.path, f"arrays are nested more than {_MOST_NESTING} deep at byte {self.pos}")
        return [self.value(tag, depth + 1) for _ in range(count)]

    def _scalar(self, tag: int) -> np.dtype[Any]:
        if tag not in _SCALARS:
            raise damaged(self.path, f"a metadata value at byte {self.pos} has the unknown type {tag}")
        return _SCALARS[tag]


def _read_row(cursor: _Cursor) -> Row:
    name = cursor.text()
    count = cursor.number(4)
    if not 1 <= count <= _MOST_DIMS:
        raise damaged(cursor.path, f"tensor {name!r} has {count} dims, not 1 to {_MOST_DIMS}")
    # The file lists the fastest-moving dim first, torch lists it last.
    dims = tuple(reversed([cursor.number(8) for _ in range(count)]))
    return name, dims, cursor.number(4), cursor.number(8)


def _data_start(path: Path, metadata: dict[str, object], pos: int) -> tuple[int, int]:
    align = metadata.get("general.alignment", 32)
    if isinstance(align, bool) or not isinstance(align, int) or align <= 0 or align % 8:
        raise damaged(path, f"general.alignment is {str(align)[:40]}, not a positive multiple of 8")
    return -(-pos // align) * align, align


def _place(path: Path, table: list[Row], layout: tuple[int, int], size: int) -> tuple[GgufTensor, ...]:
    data, align = layout
    placed: dict[str, GgufTensor] = {}
    for name, dims, kind, offset in table:
        if name in placed:
            raise damaged(path, f"tensor {name!r} occurs twice")
        nbytes = _nbytes(path, name, dims, kind)
        if offset % align:
            raise damaged(path, f"tensor {name!r} starts at offset {offset}, which is not a multiple of {align}")
        if data + offset + nbytes > size:
            raise damaged(
                path, f"tensor {name!r} ends at byte {data + offset + nbytes} but the file has {size}: it is truncated"
            )
        placed[name] = GgufTensor(name, dims, kind, data + offset, nbytes)
    order = sorted(placed.values(), key=lambda row: row.start)
    for before, after in itertools.pairwise(order):
        if before.start + before.nbytes > after.start:
            raise damaged(path, f"tensors {before.name!r} and {after.name!r} overlap")
    return tuple(placed.values())


def _nbytes(path: Path, name: str, dims: tuple[int, ...], kind: int) -> int:
    if min(dims) == 0:
        raise damaged(path, f"tensor {name!r} has dims {list(dims)}: it is empty")
    block, block_bytes = _block_layout(path, name, kind)
    if dims[-1] % block:
        raise damaged(path, f"tensor {name!r} has rows of {dims[-1]}, not a multiple of its block of {block}")
    return math.prod(dims) // block * block_bytes


def _block_layout(path: Path, name: str, kind: int) -> tuple[int, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    shown = str(kind)
    if kind in list(GGMLQuantizationType):
        shown = f"{GGMLQuantizationType(kind).name} ({kind})"
        if _dequantisable(kind):
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            return int(block), int(block_bytes)
    raise UnsupportedError(
        "the GGUF file holds a tensor of an unsupported type",
        where=f"{path}: {name}",
        why=f"the installed gguf package cannot dequantise ggml type {shown}",
        fix="update the gguf package, or convert the model to a type such as F16, Q8_0 or Q4_K",
    )


@functools.cache
def _dequantisable(kind: int) -> bool:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    # The package lists its dequantisers nowhere public, so it is asked with one block of zeros.
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType(kind)][1]), np.uint8), GGMLQuantizationType(kind))
    except NotImplementedError:
        return False
    return True
