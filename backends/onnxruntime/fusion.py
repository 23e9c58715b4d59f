"""Groups of nodes that become one fused ONNX operator, found by dataflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from backends.onnxruntime.emitter import Emitter, Result
from ir.program import Program


@dataclass(frozen=True, eq=False)
class Fused:
    """Nodes emitted together: at `root`, from the values of `reads`, giving values to all of `binds`.

    emit: binds every other node itself and returns the root's value.
    """

    root: fx.Node
    binds: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    emit: Callable[[Emitter, fx.Node], Result]


def plan(program: Program, opset: int) -> tuple[Fused, ...]:
    """Return the groups of a program that the operators of an opset cover; no node is in two of them."""
    return ()
