"""The ONNX Runtime backend: a program as `model.onnx` and its weights, run without Python model code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from torch import fx

from backends.base import Backend
from backends.detours import Detour
from backends.native.library import DEFAULT_MODE, MODES
from backends.onnxruntime.emitter import Uniform
from backends.onnxruntime.lowering import (
    DEFAULT_OPSET,
    accuracy_of,
    detours_of,
    emit_program,
    missing,
    write_model,
)
from backends.onnxruntime.runtime import OnnxRuntime
from backends.onnxruntime.session import SessionOptions, library_for
from backends.onnxruntime.tables import op_names
from ir.artifact import read_program
from ir.errors import UsageError
from ir.levels import Level, target_level
from ir.program import Program
from ir.rewrite import No


@dataclass(frozen=True)
class OnnxRuntimeBackend(Backend):
    """Runs programs whose every operator has an ONNX form.

    opset: version of the standard operators, 21 to 23; fuse: use fused operators for attention, norms and activations,
    or write everything out; mode: how kernels take activations: `14bit`, `8bit` or `exact` (float); uniform: who runs
    uniform codes, nomul's kernel or, with `contrib`, `com.microsoft::MatMulNBits` where it takes them; accuracy_level:
    of that operator, 4 for activations of 8 bits, 0 for float (default: 4, and 0 in mode `exact`); narrow: store
    float32 weights that consist of 16-bit floats as these, and multiply with them so. Raises UsageError for settings
    that there are not.
    """

    name: ClassVar[str] = "onnxruntime"
    level: ClassVar[Level] = target_level(op_names())
    opset: int = DEFAULT_OPSET
    fuse: bool = True
    mode: str = DEFAULT_MODE
    uniform: Uniform = "own"
    accuracy_level: int | None = None
    narrow: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kernel mode", self.mode, tuple(MODES)),
            ("form of uniform codes", self.uniform, get_args(Uniform)),
            ("accuracy level", self.accuracy_level, (None, *range(5))),
        ):
            if value not in known:
                choices = ", ".join(str(k) for k in known if k is not None)
                raise UsageError(f"there is no {name} {value}", where=self.name, fix=f"use one of {choices}")
        if self.accuracy_level is not None and self.uniform != "contrib":
            why = "nomul's kernels have modes instead"
            raise UsageError("only MatMulNBits has an accuracy level", why=why, fix="set uniform to contrib as well")

    def settings(self) -> dict[str, Any]:
        """Return the settings, with the accuracy level that is used, None where no codes go to MatMulNBits."""
        level = accuracy_of(self.mode, self.accuracy_level) if self.uniform == "contrib" else None
        return super().settings() | {"accuracy_level": level}

    def refuses(self, node: fx.Node) -> No | None:
        """Return why a call cannot be run: the emitter has no entry for it."""
        reason = missing(node)
        return None if reason is None else No(reason, node)

    def lower(self, program: Program, folder: Path) -> tuple[Detour, ...]:
        """Write `model.onnx` and `model.onnx.data`; raises UnsupportedError before anything is written.

        Returns the sites that standard operators run, or that nomul's kernel runs where `contrib` was asked for.
        """
        self.require(program)
        settings = self.opset, self.fuse, self.mode, self.uniform, self.accuracy_level, self.narrow
        model = emit_program(program, *settings)
        write_model(model, folder)
        return detours_of(model)

    def load(self, folder: Path, options: SessionOptions | None = None) -> OnnxRuntime:
        """Return the runtime of an artifact folder; raises UnsupportedError when it holds nothing for this backend.

        options: default: all cores, and the library that the file's operators need.
        """
        program = read_program(folder)
        return OnnxRuntime(program, folder, options=options or SessionOptions(library=library_for(folder)))


BACKEND = OnnxRuntimeBackend()
