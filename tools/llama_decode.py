"""The source model in llama.cpp, for comparison, where its Python package is installed and the model is a GGUF file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGE = "llama_cpp"
_ROUNDS, _TOKEN = 3, 1


def measure(
    model: Path, threads: Sequence[int], prompts: Sequence[int], new: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return tokens per second for each thread count; none, with a note why, where it cannot be run."""
    if find_spec(_PACKAGE) is None:
        note("llama.cpp is left out: the package llama_cpp is not installed")
        return []
    if model.suffix.lower() != ".gguf":
        note(f"llama.cpp is left out: {model.name} is no GGUF file")
        return []
    note("llama.cpp")
    return [_row(model, count, prompts, new) for count in threads]


def _row(model: Path, threads: int, prompts: Sequence[int], new: int) -> dict[str, Any]:
    room = max(prompts) + new + 1
    llama = import_module(_PACKAGE).Llama(
        str(model), n_ctx=room, n_batch=max(prompts), n_threads=threads, n_threads_batch=threads, verbose=False
    )
    speeds = [[length / _seconds(llama, length, 0) for _ in range(_ROUNDS)] for length in prompts]
    decode = [new / _seconds(llama, prompts[0], new) for _ in range(_ROUNDS)]
    short, long, step = (statistics.median(values) for values in (*speeds, decode))
    return {"name": model.name, "threads": threads, "prefill_short": short, "prefill_long": long, "decode": step}


def _seconds(llama: Any, prompt: int, new: int) -> float:
    """Return the seconds of a prompt, or where `new` is not 0 of so many tokens after it."""
    llama.reset()
    start = time.perf_counter()
    llama.eval([_TOKEN] * prompt)
    if new:
        start = time.perf_counter()
    for _ in range(new):
        llama.eval([_TOKEN])
    return time.perf_counter() - start
