"""Running a whole program and looking at every value on the way."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ir.execute import empty_inputs
from ir.program import Program
from tests.hf_folder import VOCAB


def batches(*shapes: tuple[int, int], vocab: int = VOCAB) -> list[Tensor]:
    """Seeded token ids, one tensor a shape."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab, shape, generator=generator) for shape in shapes]


class Watch(fx.Interpreter):
    """Runs a whole program and keeps every value by node name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())  # type: ignore[arg-type]
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        self.seen[n.name] = value = super().run_node(n)
        return value


def values(program: Program, ids: Tensor) -> dict[str, Tensor]:
    """What every node of a program computes for these tokens, in one run of the whole."""
    watch = Watch(program)
    with torch.no_grad():
        watch.run(*empty_inputs(program, ids).values())
    return watch.seen
