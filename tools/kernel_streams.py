"""Reads of memory to hold kernels against: as many bytes as a weight has, hot or cold as the kernels are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.native.library import load
from tools.bench_timing import Candidate, Timing

# Weights within this factor are held against one read.
_ALIKE = 1.15


@dataclass(frozen=True, eq=False)
class Streams:
    """Reads of `sizes` bytes out of `memory`, uint8, on some threads; cold_bytes: what a cold sample reads, or 0."""

    sizes: tuple[int, ...]
    memory: Tensor
    threads: int
    cold_bytes: int

    def candidates(self) -> list[Candidate]:
        """Return the reads, and of the cold ones those in order too: eight pages at once are faster there."""
        orders = (False, True) if self.cold_bytes else (False,)
        return [self._candidate(size, in_order) for in_order in orders for size in self.sizes]

    def seconds(self, nbytes: int, timings: dict[str, Timing]) -> float:
        """Return how long a read of a weight's bytes takes, by the read of about as many."""
        nearest = max(size for size in self.sizes if size <= nbytes)
        return timings[name_of(nearest, False)].seconds * nbytes / nearest

    def _candidate(self, size: int, in_order: bool) -> Candidate:
        copies = max(1, min(round(self.cold_bytes / size), self.memory.numel() // size))
        # What was swept first is what the caches have lost first.
        library, part = load(), self.memory[: copies * size]
        return Candidate(
            name_of(size, in_order), lambda count: library.stream(part, count, self.threads, in_order), copies
        )


def streams_for(sizes: Sequence[int], sweep: Tensor, threads: int, cold_bytes: int) -> Streams:
    """Return reads so that every size has one that is at most a little smaller."""
    found: list[int] = []
    for size in sorted(set(sizes)):
        if not found or size > found[-1] * _ALIKE:
            found.append(size)
    memory = sweep if sweep.numel() >= found[-1] else torch.ones(found[-1], dtype=torch.uint8)
    return Streams(tuple(found), memory, threads, cold_bytes)


def name_of(size: int, in_order: bool) -> str:
    """Return what the read of so many bytes is called among candidates."""
    return f"stream{' in order' if in_order else ''}, {size} bytes"
