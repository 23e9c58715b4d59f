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
    if weight.op != "get_attr":
        raise Refused(
            "the experts' weights are computed",
        )
    name = e.program.params.resolve(str(weight.target))
    kind = e.program.params.type_of(name)
    experts, rows, inputs = (int(d) for d in kind.dims)
    stops = e.add("Split", e.cast(e.value(ends), torch.long, tensor_type_of(ends).dtype), [1] * experts,
                  axis=0, outputs=experts) if experts > 1 else (e.value(ends),)  # fmt: skip
    parts, start = [], e.vector([0])
    for expert, stop in enumerate(stops):
        turned = e.initializer(f"{name}.{expert}.T", (inputs, rows), kind.dtype, _slice_of(e, name, expert))
        parts.append(e.add("MatMul", e.add("Slice", e.value(x), start, stop, [0]), turned))
        start = stop
    # Rows behind the last span are zero.
    rest = e.add("Slice", e.value(x), start, [2**63 - 1], [0])
    tail = e.shape([e.add("Shape", rest, start=0, end=1), rows])
    parts.append(e.add("Expand", e.scalar(0, kind.dtype), tail))
    return e.add("Concat", *parts, axis=0)


def _slice_of(e: Emitter, name: str, expert: int) -> Any:
    return lambda: e.program.params.get(name)[expert].T


TABLE: dict[Any, Entry] = {nomul.grouped_linear.default: _grouped_linear}
