"""The verifier: runs a level's checks on a program, after every pass and before anything is stored."""

from __future__ import annotations

import torch

from ir.checks import Diagnostic
from ir.errors import InvariantError
from ir.levels import Level, level_named
from ir.program import Program
from ir.propagate import check_runs

SHOWN = 10


def diagnose(program: Program, full: bool = False, level: Level | None = None) -> list[Diagnostic]:
    """Return every broken rule of a program, none when it is well formed.

    full: also read all float parameters and run the program on fake tensors. level: default that of `program.level`;
    raises UsageError when that is `target`, since each backend has its own.
    """
    level = level or level_named(program.level)
    found = [diagnostic for _, check in level.rows() for diagnostic in check(program)]
    if full and not found:
        found = check_finite(program) + check_runs(program)
    return found


def verify(program: Program, full: bool = False, level: Level | None = None) -> None:
    """Raise InvariantError that lists up to ten broken rules; arguments as for `diagnose`."""
    found = diagnose(program, full, level)
    if not found:
        return
    shown = "\n".join(f"  {d}" for d in found[:SHOWN])
    more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    count = "one rule" if len(found) == 1 else f"{len(found)} rules"
    raise InvariantError(
        f"program {program.name} breaks {count} of level {level.name if level else program.level}:\n{shown}{more}"
    )


def check_finite(program: Program) -> list[Diagnostic]:
    """Report float parameters with NaN or infinite entries; reads every weight once."""
    found = []
    for name in program.params:
        if not program.params.type_of(name).dtype.is_floating_point:
            continue
        tensor = program.params.get(name)
        bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if bad:
            nan = int(torch.isnan(tensor).sum())
            by = program.params.entry(name).written_by or "the model's file"
            rule = f"@{name} has {nan} NaN and {bad - nan} infinite entries of {tensor.numel()}; it comes from {by}"
            fix = "look for a division by zero or an overflow where it is written, or a damaged model file"
            found.append(Diagnostic("finite", rule, fix))
    return found
