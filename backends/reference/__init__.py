"""The reference backend: any program, run in eager torch on the CPU, from the artifact as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import fx

from backends.base import Backend
from backends.detours import Detour
from backends.reference.execute import DEFAULT_MODE
from backends.reference.runtime import ReferenceRuntime
from ir.artifact import read_program
from ir.errors import NomulError
from ir.levels import COMPRESSED, Level
from ir.program import Program
from ir.rewrite import No
from ir.text import op_name


@dataclass(frozen=True)
class Reference(Backend):
    """Runs whatever the `compressed` level allows."""

    name: ClassVar[str] = "reference"
    level: ClassVar[Level] = COMPRESSED

    def refuses(self, node: fx.Node) -> No | None:
        """Return why a call cannot be run: it has no text form, or `compressed` does not allow it."""
        try:
            name = op_name(node.target)
        except NomulError as error:
            return No(error.what, node)
        return None if self.level.allows(name) else No(f"{name} is not allowed at level {self.level.name}", node)

    def lower(self, program: Program, folder: Path) -> tuple[Detour, ...]:
        """Check that the program can be run; `program.ir` and its weights are all that the runtime reads."""
        del folder
        self.require(program)
        return ()

    def load(self, folder: Path, mode: str = DEFAULT_MODE) -> ReferenceRuntime:
        """Return the runtime of an artifact folder; mode: as for `backends.reference.execute.executable`."""
        return ReferenceRuntime(read_program(folder), folder, mode=mode)


BACKEND = Reference()
