"""The promise of an exact pass, put to the test: the same logits before and after, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import InvariantError
from ir.execute import empty_inputs, next_inputs, run_in_parts, with_positions_in
from ir.program import Program

_PROMPT, _NEXT, _BATCH = 8, 3, 2
# Float64 weights leave only the arithmetic's rounding; float32 ones are rounded once when a pass writes them, which
# moved the logits of a 30-layer model by 8e-8 when all its gains were folded.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@dataclass(frozen=True)
class Probe:
    """Logits of a prefill and of a cached continuation, float64 [batch, seq, vocabulary] each."""

    prefill: Tensor
    decode: Tensor


def take_probe(program: Program, seed: int) -> Probe:
    """Run seeded random tokens through a program in float64, one block's weights in memory at a time."""
    wide = with_positions_in(program, torch.float64)
    vocabulary = int(wide.outputs[0].meta["type"].dims[-1])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (_BATCH, _PROMPT + _NEXT), generator=generator)
    first = run_in_parts(wide, empty_inputs(wide, ids[:, :_PROMPT], torch.float64), torch.float64)
    then = run_in_parts(wide, next_inputs(wide, ids[:, _PROMPT:], first), torch.float64)
    return Probe(first[0], then[0])


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return max |after - before| / max |before|; infinite when either holds NaN or infinity."""
    error = float((after - before).abs().max() / before.abs().max())
    return error if error == error else float("inf")


def check_probe(before: Probe, after: Probe, by: str, dtype: torch.dtype) -> float:
    """Return the larger relative error of prefill and continuation; raise InvariantError above what `dtype` explains.

    dtype: the narrowest float that the pass rounded to.
    """
    error = max(relative_error(before.prefill, after.prefill), relative_error(before.decode, after.decode))
    limit = _TOLERANCE.get(dtype, 2e-2)
    if not error <= limit:
        raise InvariantError(
            f"pass {by} promises the same function but changed it",
            where=f"logits of {_BATCH}x{_PROMPT} random tokens and {_NEXT} more with cache",
            why=f"relative error {error:.2e}, allowed {limit:.0e}",
            fix="this is a bug in the pass; run without it, and report the crash folder",
        )
    return error


def float_dtype(program: Program, names: Iterable[str]) -> torch.dtype:
    """Return the narrowest float dtype among parameters, those gone since excepted; float64 when there is none."""
    kinds = {program.params.type_of(n).dtype for n in names if n in program.params}
    floats = [k for k in kinds if k.is_floating_point]
    return min(floats, key=lambda k: k.itemsize, default=torch.float64)
