"""Which inputs of a program are numbers of rows of a table, such as token ids, and how many rows there are."""

from __future__ import annotations

import torch
from torch import fx

from ir.program import Program, is_call, tensor_type_of

aten = torch.ops.aten


def looked_up(program: Program) -> dict[str, int]:
    """Return input name -> rows of the smallest table that is read by its numbers."""
    found: dict[str, int] = {}
    for node in program.calls(aten.embedding):
        table, index = node.args[:2]
        source = _source(index)
        if source is not None and isinstance(table, fx.Node):
            rows = tensor_type_of(table).dims[0]
            if isinstance(rows, int):
                found[source.name] = min(rows, found.get(source.name, rows))
    return found


def _source(index: object) -> fx.Node | None:
    """Return the input whose numbers an index is, counted from the end where they are negative or not."""
    while isinstance(index, fx.Node) and index.op == "call_function":
        if is_call(index, aten.where):
            index = index.args[2]
        elif is_call(index, aten.to, aten._to_copy, aten.clone, aten.contiguous):
            index = index.args[0]
        else:
            return None
    return index if isinstance(index, fx.Node) and index.op == "placeholder" else None
