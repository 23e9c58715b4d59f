"""Operands that parameters alone determine, such as the gain 1 + w."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ir.program import Program
from ir.simplify import pure


def is_constant(node: fx.Node) -> bool:
    """Return whether a value is a parameter or computed from parameters alone."""
    if node.op == "get_attr":
        return True
    sources = node.all_input_nodes
    return node.op == "call_function" and bool(sources) and pure(node) and all(map(is_constant, sources))


def constant_value(program: Program, node: fx.Node) -> Tensor:
    """Return such a value, floating point in float64."""

    def value(source: fx.Node) -> Any:
        if source.op == "get_attr":
            tensor = program.value(source)
            return tensor.double() if tensor.is_floating_point() else tensor
        args, kwargs = fx.map_arg((source.args, dict(source.kwargs)), value)
        return source.target(*args, **kwargs)  # type: ignore[operator]

    result = value(node)
    return result if isinstance(result, torch.Tensor) else torch.as_tensor(result)
