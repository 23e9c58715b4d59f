"""One linear at a time: our kernels beside ONNX Runtime's own and a plain read of memory, turn by turn in one process.

hot: one layer over and over, as it stays in the cache. cold: each sample runs copies of the layer once, after other
memory has been read that fills every cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends.native.layout import Packed
from backends.native.library import load
from ir.errors import UnsupportedError
from tools.bench_models import SPIN_OVER, Layers, LinearOp, float_op, nbits_op, random_weight, tiled_op
from tools.bench_targets import judged
from tools.bench_timing import Candidate, Plan, Timing, disturbances, interleaved, load_average, machine
from tools.kernel_streams import Streams, name_of, streams_for

WHERE = ("hot", "cold")
FLOAT, FOUR = "float32", "4-bit acc4"
# A run of a session that multiplies two numbers: what is taken off the time of a run, but for what no clock resolves.
_CALL, _LEAST = "call", 1e-9
_ROUNDS, _SECONDS, _QUICK_SECONDS = 7, 0.02, 0.002
# Distinct weights that a cold sample reads, and the other memory read before it.
_COLD_BYTES, _QUICK_COLD_BYTES = 1 << 27, 1 << 20
# Thousands of nodes take long to make.
_COPIES, _QUICK_COPIES = 1024, 8
_SWEEP_BYTES, _QUICK_SWEEP_BYTES = 1 << 29, 1 << 23
# Operators that unpack the whole weight in every call: a few samples do.
_SLOW = ((2, 0), (8, 0))
_SLOW_ROUNDS = 3
# So many tokens take long enough that one large layer makes a sample.
_FEW, _LARGE = 4, 1 << 22


@dataclass(frozen=True)
class Settings:
    """What to measure: layers (rows, columns), tokens, threads, planes, modes, hot or cold, and whether to hurry."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    threads: tuple[int, ...]
    bits: tuple[int, ...]
    modes: tuple[str, ...]
    where: tuple[str, ...]
    quick: bool

    @property
    def cold_bytes(self) -> int:
        """Distinct weights that a cold sample reads."""
        return _QUICK_COLD_BYTES if self.quick else _COLD_BYTES

    @property
    def sweep_bytes(self) -> int:
        """Other memory that is read before a cold sample."""
        return _QUICK_SWEEP_BYTES if self.quick else _SWEEP_BYTES


Bind = Callable[[Tensor, Tensor], Callable[[int], None]]


@dataclass(frozen=True)
class _Subject:
    """A linear of one form: by how many copies of it at a time, how to bind them to input and output."""

    name: str
    nbytes: int
    bind: dict[int, Bind]
    most: int


def measure(settings: Settings, note: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures as one JSON object; note: called with a word on what comes next."""
    from tools.kernel_details import details

    found = {"machine": machine(), **_how(settings)}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows: list[dict[str, Any]] = []
        left_out: list[dict[str, str]] = []
        for shape in settings.shapes:
            for threads in settings.threads:
                rows += _of_shape(shape, threads, settings, note, left_out)
        note("table build, errors, nodes")
        found |= {"rows": rows, "left_out": left_out, **details(settings.modes, settings.quick)}
    finally:
        torch.set_num_threads(before)
    return {**found, "targets": judged(found)}


def _how(settings: Settings) -> dict[str, Any]:
    return {
        "rounds": _ROUNDS,
        "statistic": "median of the rounds, all candidates in each; what an empty run takes is taken off",
        "hot": "one layer over and over, run once before each sample",
        "cold": f"copies of about {settings.cold_bytes} bytes, read once after {settings.sweep_bytes} others",
        "quick": settings.quick,
    }


def _of_shape(
    shape: tuple[int, int],
    threads: int,
    settings: Settings,
    note: Callable[[str], None],
    left_out: list[dict[str, str]],
) -> Iterator[dict[str, Any]]:
    subjects = list(_subjects(shape, threads, settings, left_out))
    sweep = torch.ones(settings.sweep_bytes, dtype=torch.uint8)
    for tokens in settings.tokens:
        for where in settings.where:
            note(f"{shape[0]}x{shape[1]}, {tokens} tokens, {threads} threads, {where}")
            case = {"shape": f"{shape[0]}x{shape[1]}", "tokens": tokens, "threads": threads, "where": where}
            yield from _of_case(case, shape, subjects, sweep, settings)


def _subjects(
    shape: tuple[int, int], threads: int, settings: Settings, left_out: list[dict[str, str]]
) -> Iterator[_Subject]:
    """Give every form of a layer that the runtime takes, and say of the others why not."""
    weights = {planes: random_weight(*shape, planes) for planes in settings.bits}
    for name, op, most in _ops(shape, weights, settings.modes):
        try:
            yield _in_session(name, op, most, threads, settings)
        except UnsupportedError as error:
            left_out.append({"name": name, "shape": f"{shape[0]}x{shape[1]}", "why": str(error)})
    for planes, weight in weights.items():
        yield from _direct(planes, weight, threads, settings)


def _ops(
    shape: tuple[int, int], weights: dict[int, Packed], modes: tuple[str, ...]
) -> Iterator[tuple[str, LinearOp, int]]:
    """Give the operators by name, and in how many rounds they take part."""
    every = 1 << 30
    yield FLOAT, float_op(*shape), every
    for bits in (4, 2, 8):
        for level in (4, 0):
            most = _SLOW_ROUNDS if (bits, level) in _SLOW else every
            yield f"{bits}-bit acc{level}", nbits_op(*shape, bits, level), most
    for planes, weight in weights.items():
        for mode in modes:
            yield f"{planes} planes {mode}", tiled_op(weight, mode), every


def _in_session(name: str, op: LinearOp, most: int, threads: int, settings: Settings) -> _Subject:
    # What unpacks a weight in every call waits for no memory.
    counts = {1} if most < _ROUNDS else {1, *_copies(op.nbytes, settings)}
    return _Subject(name, op.nbytes, {n: Layers(op, n, threads).bound for n in counts}, most)


def _direct(planes: int, weight: Packed, threads: int, settings: Settings) -> Iterator[_Subject]:
    """Give our kernel called without a runtime around it, tables included; modes share the copies."""
    nbytes = weight.data.numel()
    copies = {
        count: [Packed(weight.data.clone(), weight.layout) for _ in range(count)]
        for count in {1, *_copies(nbytes, settings)}
    }
    for mode in settings.modes:
        bind: dict[int, Bind] = {n: partial(_bound_direct, held, mode, threads) for n, held in copies.items()}
        yield _Subject(f"{planes} planes {mode} direct", nbytes, bind, 1 << 30)


def _bound_direct(copies: list[Packed], mode: str, threads: int, x: Tensor, out: Tensor) -> Callable[[int], None]:
    calls = [load().linear_call(x, copy, out, mode, threads) for copy in copies]

    def times(count: int) -> None:
        for _ in range(count):
            for call in calls:
                call()

    return times


def _copies(nbytes: int, settings: Settings) -> tuple[int, ...]:
    """Return how many copies of a weight a cold sample reads; none where nothing cold is measured."""
    most = _QUICK_COPIES if settings.quick else _COPIES
    return (max(1, min(most, round(settings.cold_bytes / nbytes))),) if "cold" in settings.where else ()


def _of_case(
    case: dict[str, Any], shape: tuple[int, int], subjects: list[_Subject], sweep: Tensor, settings: Settings
) -> Iterator[dict[str, Any]]:
    tokens, threads, cold = case["tokens"], case["threads"], case["where"] == "cold"
    x, out = torch.randn(tokens, shape[1]), torch.empty(tokens, shape[0])
    streams = streams_for([s.nbytes for s in subjects], sweep, threads, settings.cold_bytes if cold else 0)
    call = Layers(float_op(1, 1), 1, threads).bound(torch.ones(1, 1), torch.empty(1, 1))
    candidates = [*streams.candidates(), Candidate(_CALL, call)]
    for subject in subjects:
        count = 1 if not cold or (tokens > _FEW and subject.nbytes > _LARGE) else max(subject.bind)
        candidates.append(Candidate(subject.name, subject.bind[count](x, out), count, subject.most))
    load_before = load_average()
    timings = interleaved(candidates, _plan(cold, threads, sweep, settings))
    layers = {c.name: c.layers for c in candidates}
    rows = [row for size in streams.sizes for row in _stream_rows(case, size, timings)]
    rows += _subject_rows(case, subjects, layers, streams, timings)
    marks = disturbances(load_before, [timings[name_of(n, False)] for n in streams.sizes])
    yield from (row | {"load": load_before, "marks": marks} for row in rows)


def _plan(cold: bool, threads: int, sweep: Tensor, settings: Settings) -> Plan:
    def before() -> None:
        if threads > 1:
            time.sleep(SPIN_OVER)
        if cold:
            load().stream(sweep)

    return Plan(_ROUNDS, _QUICK_SECONDS if settings.quick else _SECONDS, not cold, before)


def _stream_rows(case: dict[str, Any], size: int, timings: dict[str, Timing]) -> Iterator[dict[str, Any]]:
    best = timings[name_of(size, False)].seconds
    for in_order in (False, True):
        timing = timings.get(name_of(size, in_order))
        if timing is not None:
            name = "stream in order" if in_order else "stream"
            yield _row(case, name, size, timing.seconds, timing) | {"to_stream": best / timing.seconds}


def _subject_rows(
    case: dict[str, Any],
    subjects: list[_Subject],
    layers: dict[str, int],
    streams: Streams,
    timings: dict[str, Timing],
) -> Iterator[dict[str, Any]]:
    # What is called without a runtime has no cost of a run to take off.
    call = {s.name: 0.0 if s.name.endswith("direct") else timings[_CALL].seconds / layers[s.name] for s in subjects}
    seconds = {s.name: max(timings[s.name].seconds - call[s.name], _LEAST) for s in subjects}
    for subject in subjects:
        took = seconds[subject.name]
        yield {
            **_row(case, subject.name, subject.nbytes, took, timings[subject.name]),
            "call_seconds": call[subject.name],
            "to_stream": streams.seconds(subject.nbytes, timings) / took,
            "to_float32": seconds[FLOAT] / took,
            "to_4bit": seconds[FOUR] / took if FOUR in seconds else None,
        }


def _row(case: dict[str, Any], name: str, nbytes: int, seconds: float, timing: Timing) -> dict[str, Any]:
    return {
        **case,
        "name": name,
        "bytes": nbytes,
        "seconds": seconds,
        "gigabytes_per_second": nbytes / seconds / 1e9,
        "spread": timing.spread,
        "samples": len(timing.samples),
    }
