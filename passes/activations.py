"""Activations of a calibration set, batch by batch: in memory up to a budget, beyond it in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class Room:
    """The bytes of activations that may stay in memory, for all shelves of a walk together.

    limit: None for any number; parent: the folder under which files go, None for the system's own place for them.
    """

    limit: int | None = None
    parent: Path | None = None
    used: int = 0
    _folder: Path | None = None
    _files: int = 0

    def take(self, size: int) -> bool:
        """Claim bytes of memory; return whether there was room."""
        fits = self.limit is None or self.used + size <= self.limit
        self.used += size if fits else 0
        return fits

    def give_back(self, size: int) -> None:
        """Return bytes of memory that were claimed."""
        self.used -= size

    def new_file(self) -> Path:
        """Return a path that no batch is kept under."""
        if self._folder is None:
            if self.parent is not None:
                self.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=self.parent))
        self._files += 1
        return self._folder / f"{self._files}.bin"

    def close(self) -> None:
        """Remove all files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


@dataclass(frozen=True)
class _Filed:
    """A tensor whose bytes are in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype

    def load(self) -> Tensor:
        data = bytearray(self.path.read_bytes())
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape(self.shape)


@dataclass
class Shelf:
    """Tensors by their place; what does not fit into the room's budget is read from its file whenever asked for."""

    room: Room
    _held: list[Tensor | _Filed] = field(default_factory=list)

    def append(self, tensor: Tensor) -> None:
        """Keep one more tensor."""
        self._held.append(self._keep(tensor))

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, place: int) -> Tensor:
        held = self._held[place]
        return held if isinstance(held, Tensor) else held.load()

    def __setitem__(self, place: int, tensor: Tensor) -> None:
        self._drop(self._held[place])
        self._held[place] = self._keep(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(len(self)))

    def clear(self) -> None:
        """Let go of all tensors."""
        for held in self._held:
            self._drop(held)
        self._held.clear()

    def _keep(self, tensor: Tensor) -> Tensor | _Filed:
        if self.room.take(tensor.nbytes):
            return tensor
        found = _Filed(self.room.new_file(), tensor.shape, tensor.dtype)
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(found.path)
        return found

    def _drop(self, held: Tensor | _Filed) -> None:
        if isinstance(held, Tensor):
            self.room.give_back(held.nbytes)
        else:
            held.path.unlink(missing_ok=True)


def shelved(room: Room, tensors: Iterable[Tensor]) -> Shelf:
    """Return a shelf of tensors, taken one at a time."""
    shelf = Shelf(room)
    for tensor in tensors:
        shelf.append(tensor)
    return shelf
