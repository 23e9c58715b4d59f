"""The weights of a program: names to tensors that stay on disk until they are asked for."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from ir.errors import InvariantError, UnsupportedError
from ir.types import TensorType, tensor_type

SPILL_BYTES = 1 << 20

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Source(Protocol):
    """A file or mapping that tensors are read from, one at a time and by name."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in file order."""
        ...

    def type_of(self, name: str) -> TensorType:
        """Return the type `load` will give, from headers alone."""
        ...

    def stored_bytes(self, name: str) -> int:
        """Return the bytes the tensor takes in the source (less than its type's for quantised files)."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Return the tensor, memory-mapped where the format allows; callers never write into it."""
        ...


class MemorySource:
    """Tensors held in a dictionary."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def type_of(self, name: str) -> TensorType:
        return tensor_type(self._tensors[name])

    def stored_bytes(self, name: str) -> int:
        return self.type_of(name).nbytes

    def load(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class SafetensorsSource:
    """One safetensors file, memory-mapped; its header is checked against the file before any tensor is read.

    Raises UnsupportedError for a truncated file, a header that is not JSON, offsets that lie, or an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self._data_start = _read_safetensors_header(path)
        with path.open("rb") as handle:
            size = path.stat().st_size
            self._map = mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_COPY)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def type_of(self, name: str) -> TensorType:
        return self._entries[name][0]

    def stored_bytes(self, name: str) -> int:
        _, start, end = self._entries[name]
        return end - start

    def load(self, name: str) -> torch.Tensor:
        kind, start, end = self._entries[name]
        if start == end:
            return torch.empty([int(d) for d in kind.dims], dtype=kind.dtype)
        view = memoryview(self._map)[self._data_start + start : self._data_start + end]
        # An unaligned view cannot be reinterpreted in place, so the rare unaligned file costs a copy.
        aligned = (self._data_start + start) % kind.dtype.itemsize == 0
        buffer = view if aligned else bytearray(view)
        return torch.frombuffer(buffer, dtype=kind.dtype).view([int(d) for d in kind.dims])


class ScratchFile:
    """A nameless temporary file that tensors are put into and read back from, outside resident memory.

    The file has no name from the start, so that a killed run leaves nothing behind.
    """

    def __init__(self, folder: Path) -> None:
        # It is open for as long as a tensor may be asked for, and closed when nothing refers to it any more.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[str, tuple[int, TensorType]] = {}

    def keep(self, tensor: torch.Tensor) -> str:
        """Append a tensor and return the name to load it by."""
        place, name = self._file.seek(0, os.SEEK_END), str(len(self._places))
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._file.flush()
        self._places[name] = (place, tensor_type(tensor))
        return name

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def type_of(self, name: str) -> TensorType:
        return self._places[name][1]

    def stored_bytes(self, name: str) -> int:
        return self.type_of(name).nbytes

    def load(self, name: str) -> torch.Tensor:
        place, kind = self._places[name]
        buffer = bytearray(kind.nbytes)
        if os.preadv(self._file.fileno(), [buffer], place) != kind.nbytes:
            raise InvariantError("a scratch file came back short", where=name, fix="check the disk")
        return torch.frombuffer(buffer, dtype=kind.dtype).view([int(d) for d in kind.dims])


def _lying(path: Path, why: str) -> UnsupportedError:
    return UnsupportedError(
        "the safetensors file is damaged", where=str(path), why=why, fix="fetch or write the file again"
    )


def _read_safetensors_header(path: Path) -> tuple[dict[str, tuple[TensorType, int, int]], int]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise _lying(path, f"it has {size} bytes, fewer than the 8 of the header length")
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            raise _lying(path, f"the header claims {length} bytes but only {size - 8} follow")
        try:
            header = json.loads(handle.read(length))
        # Besides malformed text: nesting that exhausts the stack, and integers longer than Python converts.
        except (ValueError, RecursionError) as error:
            raise _lying(path, f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _lying(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    available = size - 8 - length
    entries = {name: _header_entry(path, name, row, available) for name, row in header.items()}
    _check_apart(path, entries)
    return entries, 8 + length


def _check_apart(path: Path, entries: dict[str, tuple[TensorType, int, int]]) -> None:
    end, before = 0, ""
    for name, (_, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start < end:
            raise _lying(path, f"{name} begins at byte {start}, inside {before}")
        end, before = stop, name


def _header_entry(path: Path, name: str, row: object, available: int) -> tuple[TensorType, int, int]:
    try:
        dtype_name, dims, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise _lying(path, f"the header row of {name} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype_name, str) or dtype_name not in _SAFETENSORS_DTYPES:
        raise _lying(path, f"{name} has dtype {dtype_name}, which is none of {', '.join(_SAFETENSORS_DTYPES)}")
    if not all(isinstance(d, int) and d >= 0 for d in (*dims, start, end)):
        raise _lying(path, f"{name} has a negative or non-integer size or offset")
    kind = TensorType(_SAFETENSORS_DTYPES[dtype_name], dims)
    if end - start != kind.nbytes:
        raise _lying(path, f"{name} is {kind} and needs {kind.nbytes} bytes, but its offsets span {end - start}")
    if end > available:
        raise _lying(path, f"{name} ends at byte {end} but the file holds {available}: it is truncated")
    return kind, start, end


@dataclass(frozen=True)
class Entry:
    """Where one parameter comes from, and which pass wrote it last (empty: it is as the model brought it)."""

    source: Source
    key: str
    type: TensorType
    written_by: str = ""


class ParamStore:
    """Names to lazily read tensors; tied names are explicit aliases of one canonical name.

    Tensors of a mebibyte and more that passes write go to a scratch file once `spill_to` named one, so that memory
    stays bounded. Raises KeyError for unknown names, InvariantError for a name that extends another (fx resolves
    dots through modules, so `a.weight` and `a.weight.codes` cannot both exist).
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        self._scratch: ScratchFile | None = None
        self.writes: list[tuple[str, str]] = []

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add_source(self, source: Source, names: Iterable[str] | None = None) -> None:
        """Enter tensors of a source under their own names (all of them when `names` is None)."""
        for name in source.names() if names is None else names:
            self.enter(name, Entry(source, name, source.type_of(name)))

    def spill_to(self, folder: Path) -> None:
        """Keep large tensors that are written from now on in a nameless file on the disk of `folder`."""
        self._scratch = ScratchFile(folder)

    def enter(self, name: str, entry: Entry) -> None:
        """Enter one parameter without counting it as a pass's write."""
        self._entries[name] = entry

    def tie(self, alias: str, name: str) -> None:
        """Declare `alias` to be the same parameter as `name`."""
        target = self.resolve(name)
        if alias != target:
            self._entries.pop(alias, None)
            self._aliases[alias] = target

    def resolve(self, name: str) -> str:
        """Return the canonical name behind a possibly tied name; raise KeyError if unknown."""
        name = self._aliases.get(name, name)
        if name not in self._entries:
            raise KeyError(f"no parameter named {name}")
        return name

    def aliases(self) -> dict[str, str]:
        """Return tied name -> canonical name."""
        return dict(self._aliases)

    def entry(self, name: str) -> Entry:
        """Return where a parameter comes from."""
        return self._entries[self.resolve(name)]

    def type_of(self, name: str) -> TensorType:
        """Return a parameter's type without reading it."""
        return self.entry(name).type

    def nbytes(self, name: str) -> int:
        """Return a parameter's size in bytes as the program sees it."""
        return self.type_of(name).nbytes

    def total_bytes(self) -> int:
        """Return the bytes of all parameters, tied ones once."""
        return sum(entry.type.nbytes for entry in self._entries.values())

    def get(self, name: str) -> torch.Tensor:
        """Return a parameter's tensor; treat it as read-only."""
        entry = self.entry(name)
        tensor = entry.source.load(entry.key)
        if tensor_type(tensor) != entry.type:
            raise InvariantError(
                f"parameter {name} is {tensor_type(tensor)} but its source promised {entry.type}",
                where=name,
                why="the file changed while it was open, or its reader is wrong",
                fix="run again on an unchanged file",
            )
        return tensor

    def put(self, name: str, tensor: torch.Tensor, by: str) -> None:
        """Write a parameter on behalf of pass `by`; a tied name is written for all its aliases."""
        name = self._aliases.get(name, name)
        kind = tensor_type(tensor)
        if self._scratch is not None and kind.nbytes >= SPILL_BYTES:
            self._entries[name] = Entry(self._scratch, self._scratch.keep(tensor), kind, by)
        else:
            kept = tensor.detach().clone().contiguous()
            self._entries[name] = Entry(MemorySource({name: kept}), name, kind, by)
        self.writes.append((by, name))

    def drop(self, name: str) -> None:
        """Forget a canonical parameter that nothing reads any more, with its aliases."""
        del self._entries[name]
        for alias in [a for a, target in self._aliases.items() if target == name]:
            del self._aliases[alias]

    def untie(self, alias: str) -> None:
        """Make a tied name a parameter of its own that starts from the shared tensor."""
        entry = self._entries[self._aliases.pop(alias)]
        self._entries[alias] = replace(entry)

    def clone(self) -> ParamStore:
        """Return a store with its own names and aliases that shares the tensors."""
        twin = ParamStore()
        twin._scratch = self._scratch
        twin._entries, twin._aliases = dict(self._entries), dict(self._aliases)
        twin.writes = list(self.writes)
        return twin
