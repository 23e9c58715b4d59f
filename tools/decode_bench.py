"""Whole models in ONNX Runtime, turn by turn in one process: an artifact, its float32 model, and that in 4 bits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.onnxruntime import BACKEND
from backends.onnxruntime.lowering import DATA_FILE, MODEL_FILE
from backends.onnxruntime.runtime import OnnxRuntime
from backends.onnxruntime.session import SessionOptions
from frontend.open import open_model
from ir.artifact import read_manifest
from tools import llama_decode
from tools.bench_timing import Candidate, Plan, Timing, disturbances, interleaved, load_average, machine
from tools.decode_models import source_of, write_float, write_four_bits
from tools.node_times import breakdown
from tools.session_memory import measured

OURS, FLOAT = "artifact", "float32"
FOURS = {"float": "4-bit acc4, float head", "quantized": "4-bit acc4, 4-bit head"}
# Threads of a session spin for tens of milliseconds after a run.
_REST = 0.1
# Nodes are timed over so many steps, which the trace of a session can hold.
_TRACED, _QUICK_TRACED = 16, 2


@dataclass(frozen=True)
class Settings:
    """What to measure: the artifact, its source model (None: as its report says), threads, 4-bit heads, rounds."""

    artifact: Path
    against: str | None
    threads: tuple[int, ...]
    heads: tuple[str, ...]
    rounds: int
    quick: bool

    @property
    def prompts(self) -> tuple[int, int]:
        """Tokens of the two prompts; the shorter is the one that decoding goes on from."""
        return (8, 16) if self.quick else (128, 512)

    @property
    def new(self) -> int:
        """Tokens that are decoded."""
        return 4 if self.quick else 64


@dataclass(frozen=True)
class _Model:
    """A model to measure: its folder, the library its file needs, and how to open it on some threads."""

    name: str
    folder: Path
    library: Path | None
    open: Callable[[SessionOptions], OnnxRuntime]

    def runtime(self, threads: int, profile: str | None = None) -> OnnxRuntime:
        """Return a runtime; profile: the prefix of the trace it writes."""
        return self.open(SessionOptions(threads=threads, library=self.library, profile=profile))


def measure(settings: Settings, note: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures as one JSON object; note: called with a word on what comes next.

    Raises UnsupportedError for an artifact without a file for ONNX Runtime, UsageError where its source is not known.
    """
    BACKEND.load(settings.artifact)
    manifest = read_manifest(settings.artifact)
    source = source_of(settings.artifact, settings.against)
    found: dict[str, Any] = {"artifact": str(settings.artifact), "pipeline": manifest.get("pipeline"), "source": source}
    found |= {"machine": machine(), "prompts": settings.prompts, "new": settings.new, "rounds": settings.rounds}
    opened = open_model(source, note)
    named: Any = manifest.get("source") or {}
    if opened.fingerprint != named.get("fingerprint"):
        note(f"{source} is not the very model that the artifact was made from")
    with tempfile.TemporaryDirectory(prefix="nomul-bench-") as scratch:
        models = list(_models(settings, opened.program, Path(scratch), note))
        rows = [row for threads in settings.threads for row in _speeds(models, threads, settings, note)]
        memory = [_memory(m, threads, settings, note) for m in models for threads in settings.threads]
        steps = [_steps(m, threads, settings, Path(scratch), note) for m in models for threads in settings.threads]
        sizes = [{"name": m.name, "model_bytes": _size(m.folder, (MODEL_FILE, DATA_FILE))} for m in models]
    sizes[0]["folder_bytes"] = _size(settings.artifact, None)
    others = llama_decode.measure(opened.path, settings.threads, settings.prompts, settings.new, note)
    return {**found, "rows": rows, "memory": memory, "steps": steps, "sizes": sizes, "llama_cpp": others}


def _models(settings: Settings, program: Any, scratch: Path, note: Callable[[str], None]) -> Iterator[_Model]:
    def opened(folder: Path) -> Callable[[SessionOptions], OnnxRuntime]:
        return lambda options: OnnxRuntime(program, folder, options=options)

    library = BACKEND.load(settings.artifact).options.library
    yield _Model(OURS, settings.artifact, library, lambda options: BACKEND.load(settings.artifact, options))
    note("writing the float32 model")
    write_float(program, scratch / "float32")
    yield _Model(FLOAT, scratch / "float32", None, opened(scratch / "float32"))
    for head in settings.heads:
        note(f"writing the model in 4 bits, its head {head}")
        folder = scratch / f"four-{head}"
        write_four_bits(program, folder, head == "quantized")
        yield _Model(FOURS[head], folder, None, opened(folder))


def _size(folder: Path, names: Sequence[str] | None) -> int:
    files = [p for p in folder.iterdir() if p.is_file() and (names is None or p.name in names)]
    return sum(p.stat().st_size for p in files)


def _speeds(
    models: list[_Model], threads: int, settings: Settings, note: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    note(f"speeds, {threads} threads")
    candidates = [c for m in models for c in _candidates(m, m.runtime(threads), settings)]
    load_before = load_average()
    plan = Plan(settings.rounds, 0.0, False, lambda: time.sleep(_REST))
    timings = interleaved(candidates, plan)
    marks = disturbances(load_before, [])
    rows = [_row(m.name, threads, timings, settings) | {"marks": marks} for m in models]
    float_row = rows[1]
    for row in rows:
        for key in ("prefill_short", "prefill_long", "decode"):
            row[f"{key}_to_float32"] = row[key] / float_row[key]
        yield row


def _candidates(model: _Model, runtime: OnnxRuntime, settings: Settings) -> Iterator[Candidate]:
    vocabulary = runtime.interface.vocabulary or 2
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocabulary, (1, n), generator=generator) for n in settings.prompts]
    for ids in prompts:
        yield Candidate(_key(model.name, ids.shape[1]), lambda count, ids=ids: _first(runtime, ids))  # type: ignore[misc]
    token, past = _first(runtime, prompts[0])
    yield Candidate(_key(model.name, None), lambda count: _decode(runtime, token, past, settings.new), settings.new)


def _first(runtime: OnnxRuntime, ids: Tensor) -> tuple[int, list[Tensor]]:
    logits, past = runtime.forward(ids)
    return int(logits[0, -1].argmax()), past


def _decode(runtime: OnnxRuntime, token: int, past: list[Tensor], new: int) -> None:
    for _ in range(new):
        logits, past = runtime.forward(torch.tensor([[token]]), None, past)
        token = int(logits[0, -1].argmax())


def _key(name: str, prompt: int | None) -> str:
    return f"{name}, {'decode' if prompt is None else f'prompt of {prompt}'}"


def _row(name: str, threads: int, timings: dict[str, Timing], settings: Settings) -> dict[str, Any]:
    short, long = (timings[_key(name, n)] for n in settings.prompts)
    decode = timings[_key(name, None)]
    return {
        "name": name,
        "threads": threads,
        "prefill_short": settings.prompts[0] / short.seconds,
        "prefill_long": settings.prompts[1] / long.seconds,
        "first_token_seconds": short.seconds,
        "decode": 1 / decode.seconds,
        "spread": max(t.spread for t in (short, long, decode)),
    }


def _memory(model: _Model, threads: int, settings: Settings, note: Callable[[str], None]) -> dict[str, Any]:
    note(f"memory of {model.name}, {threads} threads")
    found = measured(model.folder / MODEL_FILE, model.library, threads, settings.prompts[0], settings.new)
    return {"name": model.name, "threads": threads, **found}


def _steps(
    model: _Model, threads: int, settings: Settings, scratch: Path, note: Callable[[str], None]
) -> dict[str, Any]:
    """Return the parts of one decoding step after the shorter prompt; tracing costs every node a little."""
    note(f"a step of {model.name}, {threads} threads")
    steps = _QUICK_TRACED if settings.quick else _TRACED
    token, past = _first(model.runtime(threads), torch.ones(1, settings.prompts[0], dtype=torch.long))
    # A step before the trace would be in it, so the first of the traced ones warms up the rest.
    runtime = model.runtime(threads, str(scratch / "trace"))
    _decode(runtime, token, past, steps)
    trace = Path(runtime.session.end_profiling())
    return {"name": model.name, "threads": threads, **breakdown(trace, steps)}
