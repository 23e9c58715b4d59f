"""Attention and rotary embedding, written out in standard operators; `fusion.py` has the fused forms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from backends.onnxruntime.elementwise import dtype_of, operand
from backends.onnxruntime.emitter import Emitter, Entry, Refused, Result
from backends.onnxruntime.shapes import rank_of
from ir.program import tensor_type_of

aten, nomul = torch.ops.aten, torch.ops.nomul
_END = 2**63 - 1


def _rope(e: Emitter, node: fx.Node) -> Result:
    x, cos, sin, interleaved = e.args(node)
    width, dims = tensor_type_of(cos).dims[-1], tensor_type_of(x).dims
    if not isinstance(width, int) or not isinstance(dims[-1], int):
        raise Refused("the number of channels is dynamic")
    value, axis = e.value(x), len(dims) - 1
    turned = value if width == dims[-1] else e.add("Slice", value, [0], [width], [axis])
    other = _neighbours(e, turned, dims, width) if interleaved else _halves(e, turned, axis, width)
    found = e.add("Add", e.add("Mul", turned, e.value(cos)), e.add("Mul", other, e.value(sin)))
    if width == dims[-1]:
        return found
    return e.add("Concat", found, e.add("Slice", value, [width], [_END], [axis]), axis=axis)


def _halves(e: Emitter, x: Any, axis: int, width: int) -> Any:
    a, b = e.add("Split", x, [width // 2, width // 2], axis=axis, outputs=2)
    return e.add("Concat", e.add("Neg", b), a, axis=axis)


def _neighbours(e: Emitter, x: Any, dims: tuple[Any, ...], width: int) -> Any:
    axis = len(dims) - 1
    even = e.add("Slice", x, [0], [_END], [axis], [2])
    odd = e.add("Slice", x, [1], [_END], [axis], [2])
    pairs = e.add("Concat", *[e.add("Unsqueeze", p, [axis + 1]) for p in (e.add("Neg", odd), even)], axis=axis + 1)
    return e.add("Reshape", pairs, [*[0] * axis, width])


def scale_of(q: fx.Node, scale: float | None) -> float:
    """Return the factor of the scores; raises Refused when the width of a head is dynamic."""
    if scale is not None:
        return float(scale)
    width = tensor_type_of(q).dims[-1]
    if not isinstance(width, int):
        raise Refused("the width of a head is dynamic")
    return 1 / math.sqrt(width)


def _sdpa(e: Emitter, node: fx.Node) -> Result:
    q, k, v, mask, dropout, causal, scale, _ = e.args(node)
    if dropout or rank_of(q) != 4:
        raise Refused("attention must be without dropout, on [batch, heads, seq, width]")
    dtype = tensor_type_of(node).dtype
    keys, values = (_repeated(e, x, q) for x in (k, v))
    # Each side gets the root, as torch does it, so that half precision does not overflow.
    root = e.scalar(math.sqrt(scale_of(q, scale)), dtype)
    turned = e.add("Mul", e.add("Transpose", keys, perm=[0, 1, 3, 2]), root)
    scores = e.add("MatMul", e.add("Mul", e.value(q), root), turned)
    if causal:
        mask_value = _causal(e, q, k)
        found = _masked(e, scores, mask_value, dtype)
    elif mask is not None and dtype_of(mask) == torch.bool:
        found = _masked(e, scores, e.value(mask), dtype)
    else:
        shifted = scores if mask is None else e.add("Add", scores, operand(e, mask, dtype))
        found = e.add("Softmax", shifted, axis=-1)
    return e.add("MatMul", found, values)


def _masked(e: Emitter, scores: Any, mask: Any, dtype: torch.dtype) -> Any:
    """Return softmax over what a bool mask allows, and 0 for a row that it allows nothing, as torch has it."""
    lowest = e.scalar(torch.finfo(dtype).min, dtype)
    shares = e.add("Softmax", e.add("Where", mask, scores, lowest), axis=-1)
    return e.add("Where", mask, shares, e.scalar(0, dtype))


def _causal(e: Emitter, q: fx.Node, k: fx.Node) -> Any:
    """Return the bool mask [seq, keys] of torch's `is_causal`: query i sees keys 0 to i."""
    rows = e.add("Shape", e.value(q), start=2, end=3)
    columns = e.add("Shape", e.value(k), start=2, end=3)
    ones = e.add("Expand", e.scalar(1, torch.long), e.shape([rows, columns]))
    return e.cast(e.add("Trilu", ones, e.scalar(0, torch.long), upper=0), torch.bool)


def _repeated(e: Emitter, x: fx.Node, q: fx.Node) -> Any:
    """Return keys or values with each head repeated for the query heads that share it."""
    shared, heads, width = tensor_type_of(x).dims[1], tensor_type_of(q).dims[1], tensor_type_of(x).dims[3]
    if not all(isinstance(d, int) for d in (shared, heads, width)):
        raise Refused("the number or width of heads is dynamic")
    if shared == heads:
        return e.value(x)
    wide = e.add("Expand", e.add("Unsqueeze", e.value(x), [2]), [1, 1, heads // shared, 1, 1])  # type: ignore[operator]
    return e.add("Reshape", wide, [0, heads, -1, width])


TABLE: dict[Any, Entry] = {
    nomul.rope.default: _rope,
    aten.scaled_dot_product_attention.default: _sdpa,
}
