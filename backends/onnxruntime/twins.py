"""Twins of the kernels' operators: functions of standard operators under the same names, which the file carries.

ONNX Runtime takes a kernel of the library where one is registered, and otherwise the function of that name: a file runs
with the library by kernels, and without it by these, slowly. Each layout has a function of its own, told apart by
`overload`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from backends.native.layout import NO_OFFSET, OFFSET, ZERO_POINT, Layout
from backends.onnxruntime import coded_values as values
from backends.onnxruntime.bodies import Body, result_of, rows_of

DOMAIN, VERSION = "nomul", 1
# Operators that the library has kernels for; the domain has others that are functions only.
KERNELS = ("TiledLinear", "DenseLinear", "Hadamard")
_LANES, _HALVES, _CHUNK = 16, 2, 32
_ROWS = _LANES * _HALVES


def linear_overload(layout: Layout, bias: bool, parts: Sequence[int] = ()) -> str:
    """Return the overload of `nomul::TiledLinear` for a layout, with or without a bias; parts: rows of each output."""
    beside = {NO_OFFSET: "", OFFSET: "_offset", ZERO_POINT: "_zero"}[layout.offset]
    kind = f"{'uniform' if layout.tied else 'planes'}{layout.planes}_group{layout.group}_terms{layout.terms}{beside}"
    rows = "+".join(map(str, parts)) if len(parts) > 1 else layout.rows
    return f"{kind}_{rows}x{layout.inputs}{'_bias' if bias else ''}"


def linear_function(layout: Layout, bias: bool, opset: int, parts: Sequence[int] = ()) -> Any:
    """Return the twin of `nomul::TiledLinear` for a layout: x [..., inputs], weight uint8 [tiles, bytes], bias [rows].

    parts: the rows that each output has; by default there is one output.

    One tile of 32 rows is decoded after the other. That bounds memory, and keeps the runtime from decoding all
    weights to float when a file is opened, since what a scan reads is not constant.
    """
    b = Body(opset)
    x, weight = b.input("x"), b.input("weight")
    given = b.input("bias") if bias else None
    columns = rows_of(b, x, layout.inputs)
    inner = b.inner()
    tile = inner.input("tile", torch.uint8, [layout.tile_bytes])
    product = inner.add("MatMul", _tile_weight(inner, tile, layout), columns)
    found = inner.typed(product, torch.float32, [_ROWS, None])
    tiles = b.add("Scan", weight, num_scan_inputs=1, body=inner.graph([found], "tile"))
    flat = b.add("Reshape", tiles, b.vector([layout.tiles * _ROWS, -1]))
    y = result_of(b, b.cut(flat, 0, layout.rows, 0), x, given, layout.rows)
    if len(parts) > 1:
        y = tuple(b.add("Split", y, list(parts), axis=-1, outputs=len(parts)))
    names = ("mode", "parts", *layout.attributes())
    doc = "x W^T + bias with W in tile order, decoded by standard operators; activations stay float in every mode."
    return b.function(DOMAIN, "TiledLinear", linear_overload(layout, bias, parts), y, names, doc)


def _tile_weight(b: Body, tile: Any, layout: Layout) -> Any:
    """Return the weight of a tile uint8 [bytes] as float [32, inputs]."""
    alpha, z = _scales(b, b.cast(b.cut(tile, 0, layout.head_bytes, 0), torch.int32), layout)
    stored = b.cast(b.cut(tile, layout.head_bytes, layout.tile_bytes, 0), torch.int32)
    digits = b.add("Reshape", values.signs(b, stored), b.vector([-1, layout.planes, _HALVES, _LANES, _CHUNK]))
    total = b.add("ReduceSum", b.add("Mul", digits, _by_chunk(b, alpha, layout)), [1], keepdims=0)
    if z is not None:
        total = b.add("Add", total, _by_chunk(b, z, layout))
    rows = b.add("Reshape", b.add("Transpose", total, perm=[1, 2, 0, 3]), b.vector([_ROWS, -1]))
    return _inputs(b, rows, layout)


def _by_chunk(b: Body, of_groups: Any, layout: Layout) -> Any:
    """Return values of groups [groups, ...] for each chunk and with a dim for its inputs, [chunks, ..., 1]."""
    whole, last = layout.chunks
    if whole > 1:
        chunks = (layout.groups - 1) * whole + last
        of_groups = b.add("Gather", of_groups, b.quotients(chunks, whole), axis=0)
    return b.add("Unsqueeze", of_groups, [-1])


def _inputs(b: Body, rows: Any, layout: Layout) -> Any:
    """Return rows [32, chunks x 32] without what groups were filled up with, [32, inputs]."""
    gap = -layout.width % _CHUNK
    if layout.groups == 1 or not gap:
        return b.cut(rows, 0, layout.inputs, 1)
    group = b.quotients(layout.inputs, layout.width)
    place = b.quotients(layout.inputs, 1)
    return b.add("Gather", rows, b.add("Add", place, b.add("Mul", group, b.constant(torch.tensor(gap)))), axis=1)


def _scales(b: Body, head: Any, layout: Layout) -> tuple[Any, Any | None]:
    """Return scales [groups, planes, 2, 16] and offsets [groups, 2, 16] or None, of a head of bytes int32."""
    start = _HALVES * 2 * _LANES * bool(layout.terms)
    length = layout.groups * _HALVES * layout.record_bytes
    shape = [layout.groups, _HALVES, layout.record_bytes]
    records = b.add("Reshape", b.cut(head, start, start + length, 0), b.vector(shape))
    alpha, z = (_coded if layout.terms else _halves)(b, records, layout)
    if layout.terms:
        power = b.add("Reshape", values.powers(b, b.cut(head, 0, start, 0)), b.vector([_HALVES, 2, _LANES]))
        alpha = b.add("Mul", alpha, b.take(power, 0, 1))
        z = None if z is None else b.add("Mul", z, b.take(power, 1, 1))
    return _untied(b, records, alpha, layout) if layout.tied else (alpha, z)


def _coded(b: Body, records: Any, layout: Layout) -> tuple[Any, Any | None]:
    """Return scales [groups, sets, 2, 16] and offsets [groups, 2, 16] or None, relative to their powers of two."""
    numbers = layout.sets + (layout.offset == OFFSET)
    vectors = (numbers * layout.terms + 1) // 2
    pairs = b.cut(records, 0, vectors * _LANES, 2)
    apart = values.nibbles(b, b.add("Reshape", pairs, b.vector([0, 0, vectors, _LANES])))
    apart = b.add("Transpose", apart, perm=[0, 1, 2, 4, 3])
    flat = b.cut(b.add("Reshape", apart, b.vector([0, 0, 2 * vectors, _LANES])), 0, numbers * layout.terms, 2)
    each = b.add("Reshape", flat, b.vector([layout.groups, _HALVES, numbers, layout.terms, _LANES]))
    terms = [b.add("Transpose", b.take(each, i, 3), perm=[0, 2, 1, 3]) for i in range(layout.terms)]
    alpha = values.scale(b, [b.cut(t, 0, layout.sets, 1) for t in terms])
    return alpha, values.offset(b, [b.take(t, layout.sets, 1) for t in terms]) if layout.offset == OFFSET else None


def _halves(b: Body, records: Any, layout: Layout) -> tuple[Any, Any | None]:
    """Return scales [groups, sets, 2, 16] and offsets [groups, 2, 16] or None, stored as float16."""
    numbers = layout.sets + (layout.offset == OFFSET)
    pairs = b.cut(records, 0, numbers * 2 * _LANES, 2)
    apart = b.add("Reshape", pairs, b.vector([layout.groups, _HALVES, numbers, _LANES, 2]))
    found = values.half(b, b.take(apart, 0, 4), b.take(apart, 1, 4))
    found = b.add("Transpose", found, perm=[0, 2, 1, 3])
    alpha = b.cut(found, 0, layout.sets, 1)
    return alpha, b.take(found, layout.sets, 1) if layout.offset == OFFSET else None


def _untied(b: Body, records: Any, scale: Any, layout: Layout) -> tuple[Any, Any]:
    """Return scales of planes and offsets of uniform codes, of their one scale a group [groups, 1, 2, 16]."""
    worth = 2.0 ** (torch.arange(layout.planes) - 1)
    alpha = b.add("Mul", scale, b.constant(worth.reshape(1, -1, 1, 1)))
    middle = (2**layout.planes - 1) / 2
    if layout.offset != ZERO_POINT:
        zero = b.constant(torch.tensor(middle - 2 ** (layout.planes - 1)))
        return alpha, b.add("Mul", b.take(scale, 0, 1), zero)
    stored = b.cast(b.cut(records, layout.record_bytes - _LANES, layout.record_bytes, 2), torch.float32)
    return alpha, b.add("Mul", b.take(scale, 0, 1), b.add("Sub", b.constant(torch.tensor(middle)), stored))


def rotation_overload(width: int, sizes: tuple[int, ...], transposed: bool) -> str:
    """Return the overload of `nomul::Hadamard` for a width and factors of these sizes."""
    return f"{'x'.join(map(str, sizes))}_of_{width}{'_transposed' if transposed else ''}"


def rotation_function(width: int, sizes: tuple[int, ...], transposed: bool, opset: int) -> Any:
    """Return the twin of `nomul::Hadamard`: x [..., width], the diagonal D float [width], and factors by columns."""
    b = Body(opset)
    x, diagonal = b.input("x"), b.input("signs")
    factors = [b.input(f"factor{i}") for i in range(len(sizes))]
    turned = x if transposed else b.add("Mul", x, diagonal)
    after = 1
    for factor, size in reversed(tuple(zip(factors, sizes, strict=True))):
        blocks = b.add("Reshape", turned, b.vector([-1, size, after]))
        turned = b.add("MatMul", b.add("Transpose", factor, perm=[1, 0]), blocks)
        after *= size
    assert after == prod(sizes)
    y = b.add("Reshape", turned, b.add("Shape", x), allowzero=1)
    y = b.add("Mul", y, diagonal) if transposed else y
    name = rotation_overload(width, sizes, transposed)
    doc = "D H^T x" if transposed else "H D x"
    return b.function(DOMAIN, "Hadamard", name, y, ("transposed",), f"{doc} by blocks, by standard operators.")
