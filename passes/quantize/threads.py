"""Independent pieces of tensor work on all cores, one single-threaded piece a core."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_threads(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """Return work(piece) of every piece in order, run on as many threads as torch is set to use.

    Thousands of small operations gain nothing from threads inside each; torch releases the interpreter while it
    computes, so pieces side by side do. Each piece computes exactly what it would alone.
    """
    count = min(torch.get_num_threads(), len(pieces))
    if count <= 1:
        return [work(piece) for piece in pieces]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        # The setting of a worker reaches libraries that keep one count for the whole process.
        torch.set_num_threads(threads)
        give_back_memory()


def give_back_memory() -> None:
    """Return free memory to the system where the C library can; glibc keeps a heap a thread, each with its gaps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
