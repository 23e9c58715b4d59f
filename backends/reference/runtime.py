"""The reference runtime: a program's graph as an eager torch module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backends.base import Runtime
from backends.reference.execute import DEFAULT_MODE, executable
from ir.program import Program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReferenceRuntime(Runtime):
    """Runs a program in eager torch; the program itself stays as it is.

    mode: `multiply`, `shift` or `codes`, as for `backends.reference.execute.executable`. Raises UsageError for
    another mode, UnsupportedError for a language model with inputs that none has.
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
        self._module = executable(program, mode)

    def execute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the program on tensors for its inputs, in order, and return its outputs."""
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self._module(*inputs)
        return outputs
