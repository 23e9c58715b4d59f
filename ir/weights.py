"""Linears whose weight is an object that knows how to multiply: what training puts in a weight's place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional

from ir.program import is_call


class LinearWeight(Protocol):
    """A weight that is never held as a whole between steps."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias for x [..., K]."""


def linear_by(x: Tensor, weight: Tensor | LinearWeight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias, W a tensor or an object."""
    return functional.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.linear(x, bias)


def multiply_by(graph: fx.Graph, weights: Collection[fx.Node]) -> None:
    """Let linears of a graph call `linear_by` where their weight is one of these nodes, in place."""
    for node in graph.nodes:
        if is_call(node, torch.ops.aten.linear) and node.args[1] in weights:
            node.target = linear_by
