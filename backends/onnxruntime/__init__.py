"""The ONNX Runtime backend: a program as `model.onnx` and its weights, run without Python model code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import fx

from backends.base import Backend
from backends.native.library import DEFAULT_MODE
from backends.onnxruntime.lowering import DEFAULT_OPSET, emit_program, missing, write_model
from backends.onnxruntime.runtime import OnnxRuntime
from backends.onnxruntime.session import SessionOptions
from backends.onnxruntime.tables import library_for, op_names
from ir.artifact import read_program
from ir.levels import Level, target_level
from ir.program import Program
from ir.rewrite import No


@dataclass(frozen=True)
class OnnxRuntimeBackend(Backend):
    """Runs programs whose every operator has an ONNX form.

    opset: version of the standard operators, 21 to 23; fuse: use fused operators for attention, norms and activations,
    or write everything out; mode: how kernels take activations: `14bit`, `8bit` or `exact` (float).
    """

    name: ClassVar[str] = "onnxruntime"
    level: ClassVar[Level] = target_level(op_names())
    opset: int = DEFAULT_OPSET
    fuse: bool = True
    mode: str = DEFAULT_MODE

    def refuses(self, node: fx.Node) -> No | None:
        """Return why a call cannot be run: the emitter has no entry for it."""
        reason = missing(node)
        return None if reason is None else No(reason, node)

    def lower(self, program: Program, folder: Path) -> None:
        """Write `model.onnx` and `model.onnx.data`; raises UnsupportedError before anything is written."""
        self.require(program)
        write_model(emit_program(program, self.opset, self.fuse, self.mode), folder)

    def load(self, folder: Path, options: SessionOptions | None = None) -> OnnxRuntime:
        """Return the runtime of an artifact folder; raises UnsupportedError when it holds nothing for this backend.

        options: default: all cores, and the library that the program's operators need.
        """
        program = read_program(folder)
        return OnnxRuntime(program, folder, options=options or SessionOptions(library=library_for(program)))


BACKEND = OnnxRuntimeBackend()
