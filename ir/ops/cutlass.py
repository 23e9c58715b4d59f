"""2:4 weights as CUTLASS stores them: kept values, and four bits a group in the order its sparse kernels read them.

The layout is that of CUTLASS's `reorder_meta` and `ColumnMajorInterleaved<2>`, which PyTorch's semi-structured tensors
share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.nm import kept_index, pack_mask, unpack_mask
from ir.ops.packing import pack_bits, unpack_bits
from ir.ops.quant import QuantCodes
from ir.ops.sparse import SparseCodes

# Four bits a group of 4 inputs: two places of two bits.
_GROUP, _BITS = 4, 4


@dataclass(frozen=True)
class CutlassWeight:
    """A 2:4 weight [N, K]: values float16, bfloat16 or int8 [N, K/2]; meta int16 [N, K/16], of int8 int32 [N, K/32].

    scales: of int8 values, as `ir.ops.quant.QuantCodes` has them, with `group`; None of floats.
    """

    values: Tensor
    meta: Tensor
    scales: Tensor | None = None
    group: int = 0


def to_cutlass(codes: SparseCodes) -> CutlassWeight:
    """Return a stored 2:4 weight in CUTLASS's layout.

    Raises UsageError for another pattern, values that are neither 16-bit floats nor 8-bit codes, and shapes that do not
    fill the layout's tiles.
    """
    if (codes.n, codes.m) != (2, 4):
        raise UsageError("CUTLASS stores 2:4 weights only", why=f"the pattern is {codes.n}:{codes.m}")
    values, scales, group = _values(codes)
    rows, inputs = values.shape[0], codes.in_features
    wide = values.dtype == torch.int8
    tile, width = (16, 64) if wide else (32, 32)
    if rows % tile or inputs % width:
        raise UsageError(
            f"CUTLASS stores {values.dtype} in tiles of {tile} rows and {width} inputs",
            why=f"the weight is {[rows, inputs]}",
            fix="pad it with whole rows and groups of zeros",
        )
    places = (kept_index(unpack_mask(codes.mask, inputs)) % _GROUP).view(rows, -1, 2)
    nibbles = places[..., 0] | places[..., 1] << 2
    parts = nibbles.unflatten(1, (-1, 8 if wide else 4))
    joined = (parts << torch.arange(parts.shape[-1]) * _BITS).sum(-1)
    meta = joined.to(torch.int32) if wide else joined.to(torch.int16)
    stored = torch.empty_like(meta.view(-1))
    stored[_order(rows, meta.shape[1], wide)] = meta.view(-1)
    return CutlassWeight(values, stored.view(rows, -1), scales, group)


def from_cutlass(weight: CutlassWeight) -> SparseCodes:
    """Return a weight in CUTLASS's layout in our stored form; what it keeps is kept, zeros included.

    Raises UsageError for metadata that keep one input of a group twice.
    """
    values, wide = weight.values, weight.values.dtype == torch.int8
    rows, inputs = values.shape[0], 2 * values.shape[1]
    joined = weight.meta.reshape(-1)[_order(rows, weight.meta.shape[1], wide)].long()
    nibbles = (joined[:, None] >> torch.arange(8 if wide else 4) * _BITS & 15).view(rows, -1)
    places = torch.stack([nibbles & 3, nibbles >> 2], -1)
    if bool((places[..., 0] >= places[..., 1]).any()):
        raise UsageError("the metadata are not those of CUTLASS", why="the two inputs of a group must ascend")
    mask = torch.zeros(rows, inputs // _GROUP, _GROUP, dtype=torch.bool)
    mask.scatter_(2, places, True)
    packed = pack_mask(mask.flatten(1), 2, _GROUP)
    if not wide:
        return SparseCodes(values, packed, 2, _GROUP, inputs)
    if weight.scales is None:
        raise UsageError("int8 values need scales")
    codes = pack_bits((values.to(torch.int16) + 128).to(torch.uint8), 8)
    return SparseCodes(QuantCodes(codes, weight.scales, None, 8, weight.group, inputs // 2), packed, 2, _GROUP, inputs)


def _values(codes: SparseCodes) -> tuple[Tensor, Tensor | None, int]:
    kept = codes.kept
    if isinstance(kept, Tensor) and kept.dtype in (torch.float16, torch.bfloat16):
        return kept, None, 0
    if isinstance(kept, QuantCodes) and kept.bits == 8:
        whole = unpack_bits(kept.codes, 8, kept.in_features).to(torch.int16) - 128
        return whole.to(torch.int8), kept.scales, kept.group
    kind = str(kept.dtype) if isinstance(kept, Tensor) else type(kept).__name__
    raise UsageError("CUTLASS takes kept values as 16-bit floats or 8-bit codes", why=f"they are {kind}")


def _order(rows: int, columns: int, wide: bool) -> Tensor:
    """Return where the metadata of each row and column lie, i64 [rows * columns].

    Rows of a tile are dealt out by eights, two by two blocks have their mixed corners exchanged, and columns go in
    pairs.
    """
    tile, stride = (16, 2) if wide else (32, 4)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row = row // tile * tile + row % 8 * stride + row % tile // 8
    mixed = (column % 2 - row % 2).clone()
    row, column = row + mixed, column - mixed
    return (column // 2 * (2 * rows) + 2 * row + column % 2).flatten()
