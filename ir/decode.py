"""Coded linears as float ones: each weight decoded once, for running a graph many times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ir.errors import UnsupportedError
from ir.ops.nested import NestedCodes
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes, sparse_parts, sparse_shift_parts
from ir.overloads import bound_args
from ir.types import TYPE, TensorType

aten, nomul = torch.ops.aten, torch.ops.nomul

Codes = ShiftCodes | QuantCodes | NestedCodes | SparseCodes


def _shift_codes(v: dict[str, Any], inputs: int) -> ShiftCodes:
    stored = (v["signs"], v["scales"], v["exponents"], v["offsets"])
    return ShiftCodes(*stored, v["group"], v["terms"], inputs, v["row_group"], v["code"])


def _quant_codes(v: dict[str, Any], inputs: int) -> QuantCodes:
    return QuantCodes(v["codes"], v["scales"], v["zeros"], v["bits"], v["group"], inputs)


def _nested_codes(v: dict[str, Any], inputs: int) -> NestedCodes:
    stored = (v["signs"], tuple(v["scales"]), tuple(v["exponents"]), tuple(v["offsets"]))
    return NestedCodes(*stored, v["group"], v["terms"], inputs, v["row_group"], tuple(v["precisions"]))


def _sparse_codes(v: dict[str, Any], inputs: int) -> SparseCodes:
    stored = (v["values"], v["mask"], v["scales"])
    return sparse_parts(*stored, v["n"], v["m"], v["bits"], v["group"], inputs)


def _sparse_shift_codes(v: dict[str, Any], inputs: int) -> SparseCodes:
    stored = (v["signs"], v["scales"], v["exponents"], v["offsets"], v["mask"], v["n"], v["m"])
    return sparse_shift_parts(*stored, v["group"], v["terms"], v["row_group"], v["code"], inputs)


_CODES: dict[str, Callable[[dict[str, Any], int], Codes]] = {
    "nomul::shiftadd_linear": _shift_codes,
    "nomul::quant_linear": _quant_codes,
    "nomul::nested_linear": _nested_codes,
    "nomul::sparse_linear": _sparse_codes,
    "nomul::sparse_shiftadd_linear": _sparse_shift_codes,
}


def is_coded(node: fx.Node) -> bool:
    """Return whether a node is a linear whose weight is stored as codes."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name in _CODES


def has_scales(node: fx.Node) -> bool:
    """Return whether the codes of a coded linear have scales; kept weights of a sparse one may be floats."""
    return is_coded(node) and arguments(node).get("bits") != 0


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator call by schema name, defaults filled in."""
    target: Any = node.target
    values = bound_args(target, node.args, node.kwargs)
    assert values is not None
    return {a.name: v for a, v in zip(target._schema.arguments, values, strict=True)}


def code_nodes(node: fx.Node) -> dict[str, list[fx.Node]]:
    """Return the parameter nodes that hold the codes of a coded linear, its bias excluded, by argument."""
    found: dict[str, list[fx.Node]] = {}
    for name, value in arguments(node).items():
        values = value if isinstance(value, (list, tuple)) else (value,)
        nodes = [v for v in values if isinstance(v, fx.Node) and v.op == "get_attr"]
        if nodes and name not in ("x", "bias"):
            found[name] = nodes
    return found


def codes_of(node: fx.Node, load: Callable[[str], Tensor]) -> Codes:
    """Return the codes of a coded linear.

    load: parameter name -> tensor. Raises UnsupportedError where codes are computed in the graph.
    """
    values, nodes = arguments(node), code_nodes(node)
    for name, held in nodes.items():
        tensors = [load(str(n.target)) for n in held]
        values[name] = tensors if isinstance(values[name], (list, tuple)) else tensors[0]
    if any(isinstance(v, fx.Node) for k, v in values.items() if k not in ("x", "bias")):
        raise UnsupportedError("codes that the program computes cannot be decoded", where=node.name)
    target: Any = node.target
    return _CODES[target._schema.name](values, int(_input_type(node).dims[-1]))


def _input_type(node: fx.Node) -> TensorType:
    kind: TensorType = arguments(node)["x"].meta[TYPE]
    return kind


def decoded_weight(node: fx.Node, load: Callable[[str], Tensor]) -> Tensor:
    """Return the dense weight [rows, inputs] of a coded linear, in the dtype of its activations.

    load: parameter name -> tensor. Of nested codes it is the weight at the precision the node is set to.
    """
    codes = codes_of(node, load)
    if isinstance(codes, NestedCodes):
        codes = codes.at(arguments(node)["precision"])
    return codes.dequantize(_input_type(node).dtype)


def decoded_name(node: fx.Node) -> str:
    """Return the name that the decoded weight of a coded linear goes by."""
    return f"decoded.{node.name}"


def decode_linears(graph: fx.Graph, load: Callable[[str], Tensor], free: Iterable[str] = ()) -> dict[str, Tensor]:
    """Turn the coded linears of a graph into `aten.linear` on parameters of their own, in place; return these.

    free: names of weights that need no decoding, because the caller will give values of its own. The parameters of
    codes that nothing reads any more leave the graph.
    """
    weights: dict[str, Tensor] = {}
    for node in [n for n in graph.nodes if is_coded(n)]:
        values = arguments(node)
        name = decoded_name(node)
        if name not in free:
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
