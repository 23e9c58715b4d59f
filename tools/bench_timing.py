"""Timing several things against each other in one process: turn by turn, medians, and what may have disturbed them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a read of memory may vary by within a run before the run says little.
STREAM_SPREAD = 0.25
_MANY = 5


@dataclass(frozen=True)
class Candidate:
    """Something to time: `run(n)` does it n times over; `layers` is how many times the work of one it is.

    most: of the rounds it takes part in no more than these, for what takes very long.
    """

    name: str
    run: Callable[[int], object]
    layers: int = 1
    most: int = 1 << 30


@dataclass(frozen=True)
class Plan:
    """How to take turns: rounds, seconds that a sample should last, and what to do before each sample.

    warm: run once before each sample, so that what it reads is in the cache; else each sample is a single run.
    """

    rounds: int
    seconds: float
    warm: bool
    before: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds of one layer's work: the samples in order."""

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Largest less smallest, in medians; of many samples without the one at either end, which a median ignores."""
        kept = sorted(self.samples)[1:-1] if len(self.samples) >= _MANY else self.samples
        return (max(kept) - min(kept)) / self.seconds


def interleaved(candidates: Sequence[Candidate], plan: Plan) -> dict[str, Timing]:
    """Return name -> timing, every candidate having had its turn in each round."""
    repeats = {c.name: _repeats(c, plan) for c in candidates}
    samples: dict[str, list[float]] = {c.name: [] for c in candidates}
    for turn in range(plan.rounds):
        for candidate in candidates:
            if turn < candidate.most:
                samples[candidate.name].append(_sample(candidate, repeats[candidate.name], plan))
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def _sample(candidate: Candidate, repeats: int, plan: Plan) -> float:
    plan.before()
    if plan.warm:
        candidate.run(1)
    start = time.perf_counter()
    candidate.run(repeats)
    return (time.perf_counter() - start) / (repeats * candidate.layers)


def _repeats(candidate: Candidate, plan: Plan) -> int:
    """Return how many runs last a sample; the first run, which may allocate and pack, counts for nothing."""
    candidate.run(1)
    if not plan.warm:
        return 1
    start = time.perf_counter()
    candidate.run(1)
    return max(1, round(plan.seconds / max(time.perf_counter() - start, 1e-7)))


def disturbances(load: float, streams: Sequence[Timing]) -> list[str]:
    """Return reasons to distrust what was timed: others on the machine, or a read of memory that varied."""
    cores = os.cpu_count() or 1
    found = [f"load {load:.1f} on {cores} cores"] if load > cores else []
    worst = max((t.spread for t in streams), default=0.0)
    if worst > STREAM_SPREAD:
        found.append(f"stream read varied {worst:.0%}")
    return found


def machine() -> dict[str, Any]:
    """Return what figures depend on: processor, cores, scheduling, versions and the load before."""
    import onnxruntime
    import torch

    from backends.native.library import load

    fifo = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_FIFO
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "usable_cores": usable_cores(),
        "scheduling": "fifo" if fifo else "normal",
        "load_before": load_average(),
        "level": load().level,
        "levels": list(load().levels),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
    }


def load_average() -> float:
    """Return the load average of the last minute, 0 where the system keeps none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the processor's name with family and model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = (line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
    fields: dict[str, str] = {}
    for key, value in lines:
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    numbers = (f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return ", ".join([name, *numbers])
