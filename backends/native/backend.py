"""The native backend: any program in eager torch, its compressed linears by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, fx

from backends.base import Backend, Runtime
from backends.detours import Detour
from backends.native.library import DEFAULT_MODE
from backends.native.torch_ops import lacks_kernel, with_kernels
from backends.reference import BACKEND as REFERENCE
from ir.artifact import read_program
from ir.decode import is_coded
from ir.errors import UnsupportedError
from ir.levels import Level
from ir.program import Program
from ir.rewrite import No

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NativeRuntime(Runtime):
    """Runs a program in eager torch with the kernels; the program itself stays as it is.

    mode: one of `backends.native.library.MODES`. Weights are put in the kernels' order when the runtime is made. Raises
    UsageError for another mode, UnsupportedError where there is no kernel, or the library cannot be had.
    """

    def __init__(
        self,
        program: Program,
        folder: Path | None = None,
        tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
        mode: str = DEFAULT_MODE,
    ) -> None:
        super().__init__(program, folder, tokenizer)
        self.mode = mode
        self._module = with_kernels(program, mode).module()

    def execute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the program on tensors for its inputs, in order, and return its outputs."""
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self._module(*inputs)
        return outputs


@dataclass(frozen=True)
class Native(Backend):
    """Runs what the reference backend runs, where every compressed linear has a kernel.

    mode: how kernels take activations: `14bit`, `8bit` or `exact` (float).
    """

    name: ClassVar[str] = "native"
    level: ClassVar[Level] = REFERENCE.level
    mode: str = DEFAULT_MODE

    def refuses(self, node: fx.Node) -> No | None:
        """Return why a call cannot be run; whether codes have a kernel is seen in `lower`, where they are at hand."""
        return REFERENCE.refuses(node)

    def lower(self, program: Program, folder: Path) -> tuple[Detour, ...]:
        """Check that the program can be run; `program.ir` and its weights are all that the runtime reads.

        Returns no detours: what has no kernel is refused.
        """
        del folder
        self.require(program)
        for node in program.graph.nodes:
            if is_coded(node) and (no := lacks_kernel(program, node)) is not None:
                raise UnsupportedError(
                    "native cannot run this program",
                    where=node.name,
                    why=no.reason,
                    fix="choose --target reference, which runs every program",
                )
        return ()

    def load(self, folder: Path) -> NativeRuntime:
        """Return the runtime of an artifact folder; raises UnsupportedError as `NativeRuntime` does."""
        return NativeRuntime(read_program(folder), folder, mode=self.mode)


BACKEND = Native()
