"""Products per expert over rows that are sorted by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from backends.onnxruntime.emitter import Emitter, Entry, Refused, Result
from ir.program import tensor_type_of

nomul = torch.ops.nomul


def _grouped_linear(e: Emitter, node: fx.Node) -> Result:
    """Emit one product per expert on its span of rows; a span may be empty."""
    x, weight, ends = e.args(node)
    experts, rows, _ = tensor_type_of(weight).dims
    if not isinstance(experts, int) or not isinstance(rows, int):
        raise Refused("the number of experts is dynamic")
    stops = e.cast(e.value(ends), torch.long, tensor_type_of(ends).dtype)
    pieces = e.add("Split", stops, [1] * experts, axis=0, outputs=experts) if experts > 1 else (stops,)
    parts, start = [], e.vector([0])
    for expert, stop in enumerate(pieces):
        span = e.add("Slice", e.value(x), start, stop, [0])
        parts.append(e.add("MatMul", span, _expert(e, weight, expert)))
        start = stop
    # Rows behind the last span are zero.
    rest = e.add("Slice", e.value(x), start, [2**63 - 1], [0])
    tail = e.shape([e.add("Shape", rest, start=0, end=1), rows])
    parts.append(e.add("Expand", e.scalar(0, tensor_type_of(node).dtype), tail))
    return e.add("Concat", *parts, axis=0)


def _expert(e: Emitter, weight: fx.Node, expert: int) -> Any:
    """Return one expert's weight inputs-first: of a parameter it is cut and turned when the file is written."""
    if weight.op != "get_attr":
        one = e.add("Gather", e.value(weight), e.scalar(expert, torch.long), axis=0)
        return e.add("Transpose", one, perm=[1, 0])
    name = e.program.params.resolve(str(weight.target))
    kind = e.program.params.type_of(name)
    _, rows, inputs = (int(d) for d in kind.dims)
    return e.initializer(f"{name}.{expert}.T", (inputs, rows), kind.dtype, lambda: e.program.params.get(name)[expert].T)


TABLE: dict[Any, Entry] = {nomul.grouped_linear.default: _grouped_linear}
