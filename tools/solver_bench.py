"""The shift-add solver against the float work on the same layer: seconds, growth with size and options, peak memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from passes.memory import PeakMemory, give_back_memory
from passes.quantize.hessian import Gram, empty_gram, update
from passes.shiftcode.solver import metric_of, solve
from passes.shiftcode.spec import ShiftSpec
from tools.console import size_text, table

# Calibration the solver is held against: 128 windows of 512 tokens.
TOKENS = 1 << 16
_SLICE, _QUICK_SLICE = 1 << 13, 1 << 10
_GROUP, _ROUNDS = 64, 10
_WARM = (64, 128)
# Fewer repetitions of what takes long anyway; the least of several times is the one that others disturbed least.
_REPEATS, _LONG = 3, 5.0


@dataclass(frozen=True)
class Settings:
    """What to measure: layers as (rows, columns), sign planes, and whether to hurry."""

    shapes: tuple[tuple[int, int], ...]
    bits: int
    quick: bool

    @property
    def tokens(self) -> int:
        """Tokens that the float work is measured on."""
        return _QUICK_SLICE if self.quick else _SLICE


@dataclass(frozen=True)
class _Layer:
    """A seeded layer: weight [N, K] with a few large rows, inputs [T, K] with a falling spectrum, their Gram matrix."""

    weight: Tensor
    inputs: Tensor
    gram: Gram


def measure(settings: Settings, note: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures as JSON-able data; note: takes a line on what is being measured.

    Everything runs in this process on its threads; the solver is warmed up on a small layer first.
    """
    # Of the last minute: what others do on these cores slows the solver and the float work unequally.
    load = psutil.getloadavg()[0]
    _warm_up(settings)
    layers = []
    for rows, columns in settings.shapes:
        note(f"solve {rows}x{columns}")
        layers.append(_layer_figures(rows, columns, settings))
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": load,
        "torch": torch.__version__,
        "bits": settings.bits,
        "group": _GROUP,
        "rounds": _ROUNDS,
        "tokens": TOKENS,
        "tokens_measured": settings.tokens,
        "layers": layers,
        "growth": _growth(settings, note),
    }


def as_text(found: dict[str, Any]) -> str:
    """Return the figures as tables with a line on how they were taken."""
    head = ("layer", "s", "s/M weights", "matmul s", "x matmul", "Gram s", "x Gram", "beyond the layer", "x layer")
    rows = [
        (
            row["shape"], row["seconds"], row["seconds_per_million_weights"], row["matmul_seconds"],
            row["ratio_to_matmul"], row["gram_seconds"], row["ratio_to_gram"],
            size_text(row["peak_bytes_beyond_layer"]), row["peak_beyond_to_layer"],
        )
        for row in found["layers"]
    ]  # fmt: skip
    scaled = f"on {found['tokens_measured']} tokens, scaled to {found['tokens']}"
    growth = [
        (row["varied"], row["value"], row["shape"], row["bits"], row["rounds"], row["seconds"], row["ratio_to_first"])
        for row in found["growth"]
    ]
    return "\n".join(
        [
            table(head, rows),
            f"float     matmul and Gram (Hessian accumulation) in float32, measured {scaled}, same cores, same run",
            "memory    peak resident memory of the solver beyond what the process held with weight and Hessian loaded",
            "",
            table(("varied", "value", "layer", "bits", "rounds", "s", "x first"), growth),
            f"machine   {found['threads']} of {found['cores']} cores, load before {found['load_before']:.1f}, "
            f"torch {found['torch']}; "
            f"{found['bits']} bits, groups of {found['group']}, {found['rounds']} rounds",
        ]
    )


def _warm_up(settings: Settings) -> None:
    """Have everything compiled, loaded and allocated before a clock runs."""
    for bits in {settings.bits, *_bits_around(settings)}:
        layer = _layer(*_WARM, _QUICK_SLICE)
        _solved(layer, ShiftSpec(bits=bits, group=_GROUP, rounds=_ROUNDS))
    torch.mm(layer.inputs, layer.weight.T)


def _layer(rows: int, columns: int, tokens: int) -> _Layer:
    generator = torch.Generator().manual_seed(rows * 65537 + columns)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= 1 + 4 * (torch.rand(rows, 1, generator=generator) < 0.02)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs *= torch.logspace(0.5, -1, columns)[torch.randperm(columns, generator=generator)]
    # Neighbours share half their variance, so that errors can be compensated as in a real layer.
    inputs += inputs.roll(1, 1)
    gram = empty_gram(columns)
    update(gram, inputs)
    return _Layer(weight, inputs, gram)


def _solved(layer: _Layer, spec: ShiftSpec) -> float:
    """Return the seconds of ordering and factoring the Hessian and solving the layer."""
    start = time.perf_counter()
    metric = metric_of(layer.gram.matrix, spec, tokens=layer.gram.tokens, site="bench")
    solve(layer.weight, metric, spec, site="bench")
    return time.perf_counter() - start


def _least(run: Callable[[], float], quick: bool) -> float:
    """Return the least seconds of a few runs, of one when hurried or when it takes long."""
    best = run()
    for _ in range(0 if quick or best > _LONG else _REPEATS - 1):
        best = min(best, run())
    return best


def _timed(action: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return run


def _layer_figures(rows: int, columns: int, settings: Settings) -> dict[str, Any]:
    layer = _layer(rows, columns, settings.tokens)
    scale = TOKENS / settings.tokens
    matmul = scale * _least(_timed(lambda: layer.inputs @ layer.weight.T), settings.quick)
    accumulation = scale * _least(_timed(lambda: update(layer.gram, layer.inputs)), settings.quick)
    spec = ShiftSpec(bits=settings.bits, group=_GROUP, rounds=_ROUNDS)
    beyond, first = _peak_beyond(layer, spec)
    seconds = first if settings.quick or first > _LONG else min(first, _least(lambda: _solved(layer, spec), False))
    held = layer.weight.nbytes + layer.gram.matrix.nbytes
    return {
        "shape": f"{rows}x{columns}",
        "rows": rows,
        "columns": columns,
        "seconds": seconds,
        "seconds_per_million_weights": seconds / (rows * columns / 1e6),
        "matmul_seconds": matmul,
        "ratio_to_matmul": seconds / matmul,
        "gram_seconds": accumulation,
        "ratio_to_gram": seconds / accumulation,
        "layer_bytes": held,
        "peak_bytes_beyond_layer": beyond,
        "peak_beyond_to_layer": beyond / held,
    }


def _peak_beyond(layer: _Layer, spec: ShiftSpec) -> tuple[int, float]:
    """Return the peak resident bytes of a solve beyond what the process held before it, and its seconds."""
    give_back_memory()
    held = psutil.Process().memory_info().rss
    with PeakMemory() as peak:
        seconds = _solved(layer, spec)
    return max(0, peak.bytes - held), seconds


def _bits_around(settings: Settings) -> tuple[int, ...]:
    around = (settings.bits - 1, settings.bits, settings.bits + 1)
    return tuple(b for b in (around[1:] if settings.quick else around) if 1 <= b <= 8)


def _growth(settings: Settings, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the seconds of the smallest layer with one thing varied at a time, relative to the first of each."""
    rows, columns = min(settings.shapes, key=lambda shape: shape[0] * shape[1])
    times = (1, 2) if settings.quick else (1, 2, 4)
    cases = [("rows", rows * m, (rows * m, columns), settings.bits, _ROUNDS) for m in times]
    cases += [("columns", columns * m, (rows, columns * m), settings.bits, _ROUNDS) for m in times]
    cases += [("bits", bits, (rows, columns), bits, _ROUNDS) for bits in _bits_around(settings)]
    cases += [("rounds", _ROUNDS * m, (rows, columns), settings.bits, _ROUNDS * m) for m in times]
    found: list[dict[str, Any]] = []
    for varied, value, shape, bits, rounds in cases:
        note(f"growth with {varied} {value}")
        layer, spec = _layer(*shape, _QUICK_SLICE), ShiftSpec(bits=bits, group=_GROUP, rounds=rounds)
        seconds = _least(lambda layer=layer, spec=spec: _solved(layer, spec), settings.quick)  # type: ignore[misc]
        first = next((row["seconds"] for row in found if row["varied"] == varied), seconds)
        found.append(
            {
                "varied": varied,
                "value": value,
                "shape": f"{shape[0]}x{shape[1]}",
                "bits": bits,
                "rounds": rounds,
                "seconds": seconds,
                "ratio_to_first": seconds / first,
            }
        )
    return found
