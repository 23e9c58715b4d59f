"""The promise of an exact pass, put to the test: the same logits before and after, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.analysis import IDS, predicts_tokens
from ir.errors import InvariantError
from ir.execute import (
    MASK,
    Batch,
    batch_inputs,
    batch_rows,
    empty_inputs,
    next_inputs,
    run_in_parts,
    split_batch,
    with_positions_in,
)
from ir.lookups import looked_up
from ir.program import Program, tensor_type_of

_PROMPT, _NEXT, _BATCH = 8, 3, 2
# Float64 weights leave only the arithmetic's rounding; float32 ones are rounded once when a pass writes them, which
# moved the logits of a 30-layer model by 8e-8 when all its gains were folded.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@dataclass(frozen=True)
class Probe:
    """What a program gave in float64: of a language model the logits of a prefill and of a cached continuation, of any
    other program its results of floats."""

    values: tuple[Tensor, ...]


def take_probe(program: Program, seed: int, batch: Batch | None = None) -> Probe:
    """Run seeded random tokens through a program in float64, one block's weights in memory at a time.

    batch: of calibration, of which a program that is no language model is run on a few samples; None for random ones.
    """
    wide, generator = with_positions_in(program, torch.float64), torch.Generator().manual_seed(seed)
    if not predicts_tokens(program):
        few = _random(program, generator) if batch is None else _few(program, batch)
        found = run_in_parts(wide, batch_inputs(wide, few, torch.float64), torch.float64)
        return Probe(tuple(value for value in found if value.is_floating_point() and value.numel()))
    vocabulary = int(wide.outputs[0].meta["type"].dims[-1])
    ids = torch.randint(0, vocabulary, (_BATCH, _PROMPT + _NEXT), generator=generator)
    first = run_in_parts(wide, empty_inputs(wide, ids[:, :_PROMPT], torch.float64), torch.float64)
    then = run_in_parts(wide, next_inputs(wide, ids[:, _PROMPT:], first), torch.float64)
    return Probe((first[0], then[0]))


def _few(program: Program, batch: Batch) -> Batch:
    """Return the first samples of a batch, of token ids the first few."""
    dims = tensor_type_of(program.inputs[0]).dims
    few = split_batch(batch, _BATCH if isinstance(dims[0], str) else batch_rows(batch))[0]
    return few[:, :_PROMPT] if isinstance(few, Tensor) and isinstance(dims[1], str) else few


def _random(program: Program, generator: torch.Generator) -> Batch:
    """Return random inputs: masks of ones, whole numbers that tables hold, and normal floats."""
    found, limits = {}, looked_up(program)
    for node in program.inputs:
        kind = tensor_type_of(node)
        sizes = [d if isinstance(d, int) else _PROMPT if axis else _BATCH for axis, d in enumerate(kind.dims)]
        if kind.dtype.is_floating_point:
            found[node.name] = torch.randn(sizes, generator=generator)
        elif node.name == MASK:
            found[node.name] = torch.ones(sizes, dtype=kind.dtype)
        else:
            most = limits.get(node.name, _PROMPT if node.name == IDS else 1)
            found[node.name] = torch.randint(most, sizes, generator=generator)
    return found


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return max |after - before| / max |before|; infinite when either holds NaN, or infinity that the other lacks."""
    finite, error = before[before.isfinite()].abs(), (after - before).abs()
    scale = finite.max() if finite.numel() else torch.tensor(0.0)
    worst = float(torch.where(after == before, 0.0, error).max() / scale.clamp(min=torch.finfo(before.dtype).tiny))
    return worst if worst == worst else float("inf")


def check_probe(before: Probe, after: Probe, by: str, dtype: torch.dtype) -> float:
    """Return the largest relative error of what was probed; raise InvariantError above what `dtype` explains.

    dtype: the narrowest float that the pass rounded to.
    """
    error = max((relative_error(b, a) for b, a in zip(before.values, after.values, strict=True)), default=0.0)
    limit = _TOLERANCE.get(dtype, 2e-2)
    if not error <= limit:
        raise InvariantError(
            f"pass {by} promises the same function but changed it",
            where="results of a few samples, of a language model logits of random tokens with cache and without",
            why=f"relative error {error:.2e}, allowed {limit:.0e}",
            fix="this is a bug in the pass; run without it, and report the crash folder",
        )
    return error


def float_dtype(program: Program, names: Iterable[str]) -> torch.dtype:
    """Return the narrowest float dtype among parameters, those gone since excepted; float64 when there is none."""
    kinds = {program.params.type_of(n).dtype for n in names if n in program.params}
    floats = [k for k in kinds if k.is_floating_point]
    return min(floats, key=lambda k: k.itemsize, default=torch.float64)
