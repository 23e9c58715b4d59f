"""Rules for what exporters to ONNX take apart: products with stored weights, norms, activations and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from frontend.transposed import transposed, without_points
from ir.builder import Builder
from ir.program import is_call
from ir.rewrite import No, Rules
from ir.types import TensorType

aten = torch.ops.aten
decomposed = Rules("decomposed")

# Square roots of two and of its inverse are written with as many digits as float32 has.
_CLOSE = 1e-4
# What products of numbers that were rounded to float32 are off by.
_SINGLE = 1e-6


@decomposed(aten.matmul, params="w")
def product_with_weight(b: Builder, x: fx.Node, w: fx.Node) -> fx.Node | No:
    """x W with W stored inputs-first is a linear with the weight turned."""
    if len(b.type(w).dims) != 2 or len(b.type(x).dims) < 2:
        return No("it is no product of rows with a matrix")
    turned = transposed(b, w)
    return turned if isinstance(turned, No) else b.call(aten.linear, x, turned, like=b.root)


@decomposed(
    lambda x, w, bias: aten.linear(x, aten.t(w), bias),
    lambda x, w, bias: aten.linear(x, aten.transpose(w, 0, 1), bias),
    params="w",
)
def linear_of_turned_weight(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node | None) -> fx.Node | No:
    """A linear whose weight is stored inputs-first, and turned when it runs."""
    turned = transposed(b, w)
    return turned if isinstance(turned, No) else b.call(aten.linear, x, turned, bias, like=b.root)


@decomposed(
    lambda x, w, bias: aten.conv1d(x, w, bias),  # noqa: PLW0108 - with no other strides, padding and groups
    lambda x, w, bias: aten.conv2d(x, w, bias),  # noqa: PLW0108 - with no other strides, padding and groups
    lambda x, w, bias: aten.conv3d(x, w, bias),  # noqa: PLW0108 - with no other strides, padding and groups
    params="w",
)
def convolution_of_points(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node | None) -> fx.Node | No:
    """A convolution whose windows are single points is a linear over the channels."""
    sizes, source, result = b.type(w).dims, b.type(x).dims, b.type(b.root)
    if any(size != 1 for size in sizes[2:]):
        return No("its windows are wider than a point", w)
    if len(source) != len(sizes) or source[1] != sizes[1]:
        return No("it has no batch, or channels in groups", x)
    flat, rank = without_points(b, w), len(sizes)
    if isinstance(flat, No):
        return flat
    last, first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
    rows = b.call(aten.permute, x, last, type=TensorType(b.type(x).dtype, tuple(source[i] for i in last)))
    wide = TensorType(result.dtype, tuple(result.dims[i] for i in last))
    return b.call(aten.permute, b.call(aten.linear, rows, flat, bias, type=wide, like=b.root), first, like=b.root)


@decomposed(lambda x, dims: aten.mean(x, dims, True), consts="dims")
def mean_of_the_last_dim(b: Builder, x: fx.Node, dims: Any) -> fx.Node | No:
    """A mean over the last dim is counted from the end, as other rules look for it."""
    if list(dims) != [len(b.type(x).dims) - 1]:
        return No("it is over other dims, or counted from the end already")
    return b.call(aten.mean, x, [-1], True, like=b.root)


@decomposed(lambda x: aten.reciprocal(aten.sqrt(x)))
def inverse_root(b: Builder, x: fx.Node) -> fx.Node:
    """1 / sqrt(x) is one call."""
    return b.call(aten.rsqrt, x, like=b.root)


@decomposed(lambda x: aten.mul(x, aten.sigmoid(x)))
def sigmoid_linear_unit(b: Builder, x: fx.Node) -> fx.Node:
    """x sigmoid(x) is SiLU (1606.08415, section 2)."""
    return b.call(aten.silu, x, like=b.root)


@decomposed(
    lambda x, half, root, one: aten.mul(aten.mul(x, half), aten.add(aten.erf(aten.div(x, root)), one)),
    lambda x, half, root, one: aten.mul(aten.mul(x, aten.add(aten.erf(aten.div(x, root)), one)), half),
    lambda x, half, root, one: aten.mul(x, aten.mul(aten.add(aten.erf(aten.div(x, root)), one), half)),
    consts="half root one",
)
def error_function_gelu(b: Builder, x: fx.Node, half: float, root: float, one: float) -> fx.Node | No:
    """x (1 + erf(x / sqrt 2)) / 2 is GELU (1606.08415, eq. 1)."""
    if (half, one) != (0.5, 1.0) or not math.isclose(root, math.sqrt(2), rel_tol=_CLOSE):
        return No("the constants are not those of GELU")
    return b.call(aten.gelu, x, like=b.root)


@decomposed(
    lambda x, half, root, one: aten.mul(aten.mul(x, half), aten.add(aten.erf(aten.mul(x, root)), one)),
    lambda x, half, root, one: aten.mul(aten.mul(x, aten.add(aten.erf(aten.mul(x, root)), one)), half),
    lambda x, half, root, one: aten.mul(x, aten.mul(aten.add(aten.erf(aten.mul(x, root)), one), half)),
    consts="half root one",
)
def error_function_gelu_by_product(b: Builder, x: fx.Node, half: float, root: float, one: float) -> fx.Node | No:
    """The same with the inverse of the root."""
    if (half, one) != (0.5, 1.0) or not math.isclose(root, math.sqrt(0.5), rel_tol=_CLOSE):
        return No("the constants are not those of GELU")
    return b.call(aten.gelu, x, like=b.root)


@decomposed(
    lambda x, first, second: aten.reshape(aten.permute(aten.reshape(x, first), [0, 2, 1]), second),
    lambda x, first, second: aten.reshape(aten.transpose(aten.reshape(x, first), 1, 2), second),
)
def transposed_heads(b: Builder, x: fx.Node, first: Any, second: Any) -> fx.Node | No:
    """Heads merged with the batch, turned and taken apart again are turned where they are."""
    source, result = b.type(x).dims, b.type(b.root).dims
    if len(source) != 4 or result != (*source[:2], source[3], source[2]):
        return No("the result is not the same with its last two dims exchanged", x)
    if len(b.type(b.nodes[2]).dims) != 3 or b.type(b.nodes[2]).dims[1:] != source[2:]:
        return No("what is merged is more than the leading dims", x)
    return b.call(aten.transpose, x, -1, -2, like=b.root)


@decomposed(
    lambda p, dim: aten.where(aten.isnan(aten.softmax(p, dim)), 0.0, aten.softmax(p, dim)),
)
def guarded_softmax(b: Builder, p: fx.Node, dim: int) -> fx.Node:
    """A softmax whose rows of nothing but minus infinity are zeros is torch's own of that meaning."""
    return b.call(aten._safe_softmax, p, dim, like=b.root)


@decomposed(
    lambda q, k, v, mask, s, t, dim: aten.matmul(
        aten._safe_softmax(aten.add(aten.matmul(aten.mul(q, s), aten.mul(aten.transpose(k, -1, -2), t)), mask), dim), v
    ),
    lambda q, k, v, mask, s, t, dim: aten.matmul(
        aten.softmax(aten.add(aten.matmul(aten.mul(q, s), aten.mul(aten.transpose(k, -1, -2), t)), mask), dim), v
    ),
    consts="s t dim",
)
def attention_with_split_scale(
    b: Builder, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node, s: float, t: float, dim: int
) -> fx.Node | No:
    """softmax(s q (t k)^T + mask) v is attention with the scale s t (1706.03762, eq. 1)."""
    if dim not in (-1, len(b.type(b.root).dims) - 1):
        return No("the softmax is not over keys")
    return b.call(
        aten.scaled_dot_product_attention, q, k, v, _allowed(mask), 0.0, False, scale=_scale(b, q, s * t), like=b.root
    )


def _scale(b: Builder, q: fx.Node, given: float) -> float:
    """Return a scale, or 1/sqrt(width) where it is that up to what float32 loses of two roots of it."""
    width = b.type(q).dims[-1]
    usual = 1 / math.sqrt(width) if isinstance(width, int) else given
    return usual if math.isclose(given, usual, rel_tol=_SINGLE) else given


def _allowed(mask: fx.Node) -> fx.Node:
    """Return the truth values behind a mask of 0 and minus infinity, or the mask as it is."""
    if is_call(mask, aten.where):
        condition, kept, dropped = mask.args
        if kept == 0.0 and dropped == -math.inf and isinstance(condition, fx.Node):
            return condition
    return mask
