"""Coded linears as float ones: each weight decoded once, for running a graph many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.overloads import bound_args

aten, nomul = torch.ops.aten, torch.ops.nomul


def _shift_codes(v: dict[str, Any], inputs: int) -> ShiftCodes:
    return ShiftCodes(v["signs"], v["scales"], v["exponents"], v["offsets"], v["group"], v["terms"], inputs)


def _quant_codes(v: dict[str, Any], inputs: int) -> QuantCodes:
    return QuantCodes(v["codes"], v["scales"], v["zeros"], v["bits"], v["group"], inputs)


_CODES: dict[str, Callable[[dict[str, Any], int], ShiftCodes | QuantCodes]] = {
    "nomul::shiftadd_linear": _shift_codes,
    "nomul::quant_linear": _quant_codes,
}


def is_coded(node: fx.Node) -> bool:
    """Return whether a node is a linear whose weight is stored as codes."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name in _CODES


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator call by schema name, defaults filled in."""
    target: Any = node.target
    values = bound_args(target, node.args, node.kwargs)
    assert values is not None
    return {a.name: v for a, v in zip(target._schema.arguments, values, strict=True)}


def decoded_weight(node: fx.Node, load: Callable[[str], Tensor]) -> Tensor:
    """Return the dense weight [rows, inputs] of a coded linear, in the dtype of its activations.

    load: parameter name -> tensor.
    """
    values, target = arguments(node), node.target
    kind = values["x"].meta["type"]
    tensors = {k: load(str(v.target)) for k, v in values.items() if isinstance(v, fx.Node) and v.op == "get_attr"}
    codes = _CODES[target._schema.name]({**values, **tensors}, int(kind.dims[-1]))  # type: ignore[union-attr]
    return codes.dequantize(kind.dtype)


def decode_linears(graph: fx.Graph, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Turn the coded linears of a graph into `aten.linear` on parameters of their own, in place; return these.

    The parameters of codes that nothing reads any more leave the graph.
    """
    weights: dict[str, Tensor] = {}
    for node in [n for n in graph.nodes if is_coded(n)]:
        values = arguments(node)
        name = f"decoded.{node.name}"
        weights[name] = decoded_weight(node, load)
        with graph.inserting_before(node):
            weight = graph.create_node("get_attr", name)
            new = graph.create_node("call_function", aten.linear.default, (values["x"], weight, values["bias"]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    return weights
