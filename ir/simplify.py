"""Simplifications that hold at every level: duplicates merged, constants folded."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.edit import Editor
from ir.program import TYPE, Program
from ir.types import TensorType, tensor_type

# A constant is folded only when its result is small: folding must never make the stored program larger than it was.
FOLD_ELEMENTS = 1 << 16


def _key(value: Any) -> Any:
    """Return a hashable stand-in for a node argument."""
    if isinstance(value, (list, tuple, fx.immutable_collections.immutable_list)):
        return (type(value).__name__, *(_key(v) for v in value))
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    # 1, 1.0 and True are equal to Python but not to an operator, and so are 0.0 and -0.0, which their texts tell apart.
    return (type(value).__name__, str(value) if isinstance(value, float) else value)


def pure(node: fx.Node) -> bool:
    """Return whether a call neither mutates its inputs nor draws random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def merge_duplicates(program: Program, by: str) -> int:
    """Make equal pure calls one call; return how many were merged."""
    editor, merged = Editor(program, by), 0
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not pure(node):
            continue
        key = (str(node.target), _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            editor.replace(node, first)
            editor.erase(node)
            merged += 1
    return merged


def fold_constants(program: Program, by: str) -> int:
    """Evaluate calls whose tensor inputs are all parameters, when the result is small; return how many were folded.

    Parameters of two or more dims are weights and stay symbolic: only vectors and scalars are folded.
    """
    editor, folded = Editor(program, by), 0
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not pure(node) or not _constant(node):
            continue
        kind = node.meta[TYPE]
        if not isinstance(kind, TensorType) or not kind.static or kind.nbytes > FOLD_ELEMENTS * kind.dtype.itemsize:
            continue
        args = fx.map_arg(node.args, program.value)
        kwargs = fx.map_arg(node.kwargs, program.value)
        value = node.target(*args, **kwargs)
        if not isinstance(value, torch.Tensor) or tensor_type(value) != kind:
            continue
        name = editor.fresh(f"constants.{node.name}")
        editor.replace(node, editor.param(name, value))
        folded += 1
    editor.sweep()
    return folded


def _constant(node: fx.Node) -> bool:
    sources = node.all_input_nodes
    return bool(sources) and all(s.op == "get_attr" and len(s.meta[TYPE].dims) <= 1 for s in sources)
