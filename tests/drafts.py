"""Small hand-built programs for tests of the IR: float64, two rows of four unless told otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.params import MemorySource, ParamStore
from ir.program import PATH, TYPE, Program
from ir.types import TensorType, tensor_type


class Draft:
    """A graph under construction; `tensors` are its parameters."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.graph, self.tensors = fx.Graph(), tensors
        self.kind = TensorType(torch.float64, (2, 4))

    def typed(self, node: fx.Node, kind: Any = None) -> fx.Node:
        node.meta[TYPE] = kind or self.kind
        return node

    def input(self, name: str, kind: Any = None) -> fx.Node:
        return self.typed(self.graph.placeholder(name), kind)

    def param(self, name: str) -> fx.Node:
        return self.typed(self.graph.create_node("get_attr", name), tensor_type(self.tensors[name]))

    def call(self, target: Any, *args: Any, name: str | None = None, kind: Any = None, **kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta[PATH] = f"model.{node.name}"
        return self.typed(node, kind)

    def program(self, *outputs: fx.Node) -> Program:
        self.graph.output(outputs)
        self.graph.output_node().meta[TYPE] = None
        store = ParamStore()
        store.add_source(MemorySource(self.tensors))
        return Program(self.graph, store)


def one(target: Any, *args: Any, **kwargs: Any) -> Program:
    """One call named `out` on inputs `x` and `y`, the parameter `p`, and constants."""
    draft = Draft(p=torch.ones(2, 4, dtype=torch.float64))
    nodes = {"x": draft.input("x"), "y": draft.input("y"), "p": draft.param("p")}
    return draft.program(
        draft.call(target, *(nodes.get(a, a) if isinstance(a, str) else a for a in args), name="out", **kwargs)
    )


def names(program: Program) -> list[str]:
    """Names of the calls, in order."""
    return [n.name for n in program.graph.nodes if n.op == "call_function"]


def run(program: Program, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the program computes."""
    result: tuple[torch.Tensor, ...] = program.module()(*inputs)
    return result
