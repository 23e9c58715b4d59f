"""Resident memory: the largest amount seen, and giving back what is free."""

from __future__ import annotations

import ctypes
import threading

import psutil


class PeakMemory:
    """Samples this process's resident memory in a thread while it is entered; `bytes` is the largest seen."""

    def __init__(self, every: float = 0.02) -> None:
        self.bytes, self._every, self._stop = 0, every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(self._every):
                return

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def give_back_memory() -> None:
    """Return free memory to the system where the C library can; glibc keeps freed activations for the next pass."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
