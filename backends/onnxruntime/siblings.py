"""Linears that read the same value as one operator: its tables are made once, and threads start once.

Tiles of rows stand by themselves, so that the weights of several linears in tile order, one after another, are that of
one linear with several results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from backends.native.layout import Layout, layout_of, refuses
from backends.onnxruntime.emitter import Emitter
from backends.onnxruntime.groups import Fused
from backends.onnxruntime.tiled import CODED_CALLS, Part, add_tiled, bias_of, codes_of, constant_of
from ir.ops.quant import QuantCodes
from ir.overloads import bound_args
from ir.program import Program, is_call, tensor_type_of

_ROWS = 32


def siblings(program: Program, uniform: str) -> Iterator[Fused]:
    """Find compressed linears of the same input and layout; uniform codes only where nomul's kernels run them."""
    found: dict[Any, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if is_call(node, *CODED_CALLS) and (layout := _layout(node, uniform)) is not None and layout.rows % _ROWS == 0:
            args = _args(node)
            alike = args[0], replace(layout, rows=0), bias_of(node.target, args) is not None
            found.setdefault(alike, []).append(node)
    for group in found.values():
        if len(group) > 1:
            reads = dict.fromkeys(n for node in group for n in node.all_input_nodes)
            yield Fused(group[0], tuple(group), tuple(reads), partial(_emit, nodes=tuple(group)))


def _layout(node: fx.Node, uniform: str) -> Layout | None:
    """Return the layout of a linear's weight, or None where something else than a kernel of nomul runs it."""
    args = _args(node)
    stored = [tensor_type_of(arg).dims for arg in node.all_input_nodes if arg is not args[0]]
    if tensor_type_of(args[0]).dtype != torch.float32 or not all(isinstance(d, int) for dims in stored for d in dims):
        return None
    codes = codes_of(node.target, args, _like)
    if refuses(codes) is not None or (uniform == "contrib" and isinstance(codes, QuantCodes)):
        return None
    return layout_of(codes)


def _args(node: fx.Node) -> tuple[Any, ...]:
    args = bound_args(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    assert args is not None
    return tuple(args)


def _like(arg: fx.Node | None) -> Tensor | None:
    """Return a tensor of an argument's type without data."""
    if arg is None:
        return None
    kind = tensor_type_of(arg)
    return torch.empty([int(d) for d in kind.dims], dtype=kind.dtype, device="meta")


def _emit(e: Emitter, nodes: tuple[fx.Node, ...]) -> None:
    """Add one operator for all, and bind to each its part of the results."""
    calls = [e.args(node) for node in nodes]
    parts = [
        Part(codes_of(n.target, args, partial(constant_of, e)), args[1], bias_of(n.target, args))
        for n, args in zip(nodes, calls, strict=True)
    ]
    results = add_tiled(e, calls[0][0], parts)
    e.computes(results[0], nodes)
    for node, result in zip(nodes, results, strict=True):
        e.bind(node, result)
