"""The precision at which nested weights run: how many of their planes are read."""

from __future__ import annotations

import torch

import ir.ops  # noqa: F401 - registers the nomul operators
from ir.decode import arguments
from ir.edit import Editor
from ir.errors import UsageError
from ir.program import Program


def precisions(program: Program) -> tuple[int, ...]:
    """Return the numbers of planes that every nested linear of a program can run at, ascending; empty without any."""
    sets = [set(arguments(node)["precisions"]) for node in program.calls(torch.ops.nomul.nested_linear)]
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def set_planes(program: Program, planes: int) -> None:
    """Let every nested linear of a program run at `planes` planes, in place.

    Raises UsageError where a linear has no such precision, and for a program without nested linears.
    """
    nodes = list(program.calls(torch.ops.nomul.nested_linear))
    if not nodes:
        raise UsageError(
            f"the program cannot run at {planes} planes",
            where=program.name,
            why="it has no nested linears, whose precision is chosen when they run",
            fix="load it without a number of planes, or compile it with nested ones",
        )
    lacking = [n for n in nodes if planes not in arguments(n)["precisions"]]
    if lacking:
        common = precisions(program)
        raise UsageError(
            f"the program cannot run at {planes} planes",
            where=f"{lacking[0].name} and {len(lacking) - 1} more" if len(lacking) > 1 else lacking[0].name,
            why=f"it runs at {', '.join(map(str, arguments(lacking[0])['precisions']))}",
            fix=f"use {' or '.join(map(str, common))}" if common else "its linears share no precision",
        )
    editor = Editor(program, "planes")
    for node in nodes:
        values = {**arguments(node), "precision": planes}
        editor.set_args(node, tuple(values.values()), {})
