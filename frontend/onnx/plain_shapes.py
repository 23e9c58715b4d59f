"""Changes of shape in the forms that programs traced from torch models have, which fusions look for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.edit import Editor
from ir.program import Program, is_call, tensor_type_of
from ir.types import ScalarType

aten = torch.ops.aten


def plain_shapes(program: Program) -> None:
    """Write dims taken apart or merged as reshapes, and two dims exchanged as a transposition, in place."""
    editor = Editor(program, "onnx")
    for node in list(program.graph.nodes):
        made = None
        if is_call(node, aten.unflatten, aten.flatten):
            made = _reshaped(editor, node)
        elif is_call(node, aten.permute):
            made = _exchanged(editor, node)
        if made is not None:
            editor.replace(node, made, keep_name=True)
            editor.erase(node)


def _reshaped(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Return a reshape to the dims of a call's result, None where one of them is no dim of its input."""
    source: Any = node.args[0]
    have, sizes = tensor_type_of(source).dims, list[Any]()
    editor.before(node)
    for dim in tensor_type_of(node).dims:
        if isinstance(dim, int):
            sizes.append(dim)
        elif dim in have:
            sizes.append(
                _size(editor, dim)
                or editor.call(aten.sym_size.int, source, have.index(dim), type=ScalarType("int", dim))
            )
        else:
            return None
    return editor.call(aten.reshape, source, sizes, like=node)


def _size(editor: Editor, dim: str) -> fx.Node | None:
    """Return the size of a dim as read from the first input that has it, None where none has.

    Sizes are read in one place, the first, which must not lie in what some other value depends on.
    """
    for node in editor.program.inputs:
        dims = tensor_type_of(node).dims
        if dim in dims:
            return editor.call(aten.sym_size.int, node, dims.index(dim), type=ScalarType("int", dim))
    return None


def _exchanged(editor: Editor, node: fx.Node) -> fx.Node | None:
    """Return a transposition that is the same as a permutation, None where more than two dims move."""
    args: Any = node.args
    rank = len(args[1])
    moved = [i for i, axis in enumerate(args[1]) if axis % rank != i]
    return editor.before(node).call(aten.transpose, args[0], *moved, like=node) if len(moved) == 2 else None
