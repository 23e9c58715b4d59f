"""Linears that builders packed into one, such as queries, keys and values, taken apart again.

Passes that choose scales for each linear then choose those of the model that was packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.edit import Editor
from ir.params import Entry, Source
from ir.program import PATH, Program, is_call, tensor_type_of
from ir.types import TensorType

aten = torch.ops.aten
_BY = "onnx"
_PARTS = ("q", "k", "v")


class RowsSource:
    """Some rows of a matrix, or entries of a vector, of another source."""

    def __init__(self, source: Source, key: str, start: int, stop: int) -> None:
        self.source, self.key, self.start, self.stop = source, key, start, stop

    def names(self) -> tuple[str, ...]:
        return (self.key,)

    def type_of(self, name: str) -> TensorType:
        kind = self.source.type_of(name)
        return TensorType(kind.dtype, (self.stop - self.start, *kind.dims[1:]))

    def stored_bytes(self, name: str) -> int:
        whole = int(self.source.type_of(name).dims[0])
        return self.source.stored_bytes(name) * (self.stop - self.start) // whole

    def load(self, name: str) -> torch.Tensor:
        return self.source.load(name)[self.start : self.stop].contiguous()


def unpack(program: Program) -> None:
    """Replace each linear that is split into three along its outputs by three linears, in place."""
    editor = Editor(program, _BY)
    for node in list(program.graph.nodes):
        sizes = _sizes(node)
        if sizes is None:
            continue
        packed: fx.Node = node.args[0]
        path = str(packed.meta.get(PATH, ""))
        parts = [user for user in node.users if user.op == "call_function"]
        for part in parts:
            place = int(part.args[1])
            start = sum(sizes[:place])
            given = [packed.args[0], *(_rows(editor, a, start, start + sizes[place], place) for a in packed.args[1:])]
            made = editor.before(part).call(aten.linear.default, *given, like=part)
            made.meta[PATH] = f"{path}.{_PARTS[place]}" if path else ""
            editor.replace(part, made)
            editor.erase(part)
        editor.erase(node)
        editor.erase(packed)
    editor.sweep()


def _sizes(node: fx.Node) -> list[int] | None:
    """Return how many outputs each of three parts has into which a linear of stored weights is split."""
    args: Any = node.args
    if not is_call(node, aten.split_with_sizes) or not is_call(args[0], aten.linear) or len(args[0].users) != 1:
        return None
    sizes, stored = list(args[1]), [a for a in args[0].args[1:] if a is not None]
    last = len(tensor_type_of(args[0]).dims) - 1
    whole = all(isinstance(s, int) for s in sizes) and len(sizes) == len(_PARTS) and args[2:] in ((last,), (-1,))
    own = all(isinstance(a, fx.Node) and a.op == "get_attr" and len(a.users) == 1 for a in stored)
    return sizes if whole and own else None


def _rows(editor: Editor, weight: Any, start: int, stop: int, place: int) -> fx.Node | None:
    """Return the parameter of some rows of a stored tensor, which is entered under a name of its own."""
    if weight is None:
        return None
    params, name = editor.program.params, str(weight.target)
    entry = params.entry(name)
    owner, _, own = name.rpartition(".")
    part = f"{owner}.{_PARTS[place]}.{own}" if owner else f"{own}_{_PARTS[place]}"
    source = RowsSource(entry.source, entry.key, start, stop)
    params.enter(part, Entry(source, entry.key, source.type_of(entry.key), _BY))
    return editor.param(part)
