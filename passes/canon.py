"""`canon`: dead code, duplicates and constants, at any time before lowering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.edit import Editor
from ir.program import Program
from ir.simplify import fold_constants, merge_duplicates
from passes.base import Context, Pass, Stage


@dataclass(frozen=True)
class Canon(Pass):
    """Remove dead code, merge equal calls and evaluate small constant expressions."""

    name: ClassVar[str] = "canon"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.CANON
    gives: ClassVar[frozenset[str]] = frozenset({"canonical"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> None:
        """Simplify until nothing changes: folding a constant can make two calls equal, and the reverse."""
        total = {"merged": 0, "folded": 0, "removed": 0}
        while True:
            version = program.version
            total["merged"] += merge_duplicates(program, self.name)
            # Folding sweeps up after itself, so what was dead before it is swept and counted first.
            total["removed"] += Editor(program, self.name).sweep()
            total["folded"] += fold_constants(program, self.name)
            if program.version == version:
                break
        ctx.log.report(site=program.name, **{k: float(v) for k, v in total.items()})
