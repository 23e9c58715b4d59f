"""Rotary embedding as the standard `RotaryEmbedding` (opset 23), where angles are shown to come in equal pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from backends.onnxruntime.emitter import Emitter
from ir.program import is_call, tensor_type_of

aten = torch.ops.aten
_ELEMENTWISE = (aten.cos, aten.sin, aten.to, aten.neg)


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine [batch or 1, 1, seq, r], both entries of each pair equal; pairs as for `nomul::rope`.

    channels: r; of: the channels of a head; batch: the batch dim of what is rotated.
    """

    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    channels: int
    of: int
    batch: int | str

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes that emission needs the values of."""
        return self.cos, self.sin


def rotation(node: fx.Node) -> Rotation | None:
    """Return the angles of a rope call on [batch, heads, seq, d], or None where they are not shown to be a rotation."""
    given: Any = node.args
    x, cos, sin, interleaved = given
    dims, width = tensor_type_of(cos).dims, tensor_type_of(x).dims[-1]
    if len(dims) != 4 or dims[1] != 1 or not isinstance(dims[3], int) or not isinstance(width, int):
        return None
    if tensor_type_of(sin).dims != dims or tensor_type_of(x).dtype != torch.float32:
        return None
    if not all(_paired(angle, bool(interleaved)) for angle in (cos, sin)):
        return None
    return Rotation(cos, sin, bool(interleaved), dims[3], width, tensor_type_of(x).dims[0])


def _paired(node: fx.Node, interleaved: bool) -> bool:
    """Return whether entries i and i + r/2 (2i and 2i + 1 when interleaved) are equal because of how they are made."""
    source: Any = node
    while source.op == "call_function":
        last = len(tensor_type_of(source).dims) - 1
        if is_call(source, aten.cat) and not interleaved:
            parts, dim = (*source.args, 0)[:2]
            return len(parts) == 2 and parts[0] is parts[1] and dim in (-1, last)
        if is_call(source, aten.repeat_interleave.self_int) and interleaved:
            return source.args[1] == 2 and source.args[2] in (-1, last)
        scaled = is_call(source, aten.mul.Tensor) and isinstance(source.args[1], (int, float))
        inner = is_call(source, aten.unsqueeze) and source.args[1] not in (-1, last)
        if not (scaled or inner or is_call(source, *_ELEMENTWISE)):
            return False
        source = source.args[0]
    return False


def rotated(e: Emitter, x: Any, angles: Rotation, heads: int) -> Any:
    """Return x [batch, seq, heads * d] rotated; cosine and sine are cut to one entry a pair, once for all layers."""
    batch = e.dim(angles.batch) if isinstance(angles.batch, str) else angles.batch
    batch = e.add("Shape", x, start=0, end=1) if batch is None else batch
    cos, sin = (_half(e, angle, angles, batch) for angle in (angles.cos, angles.sin))
    part = None if angles.channels == angles.of else angles.channels
    return e.add(
        "RotaryEmbedding", x, cos, sin,
        num_heads=heads, interleaved=int(angles.interleaved), rotary_embedding_dim=part,
    )  # fmt: skip


def _half(e: Emitter, angle: fx.Node, angles: Rotation, batch: Any) -> Any:
    value, half = e.value(angle), angles.channels // 2
    cut = e.add("Slice", value, [0], [angles.channels if angles.interleaved else half], [3],
                [2] if angles.interleaved else None)  # fmt: skip
    rows = e.add("Squeeze", cut, [1])
    if tensor_type_of(angle).dims[0] != 1:
        return rows
    return e.add("Expand", rows, e.shape([batch, 1, 1]))
