"""Weights in the kernels' tile order: packed from stored codes, and unpacked again. The order is in `src/layout.h`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ir.errors import UnsupportedError
from ir.ops.codes import expand_rows, group_count
from ir.ops.packing import pack_bits, unpack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import (
    ShiftCodes,
    decode_offsets,
    decode_plane,
    decode_scales,
    decode_zeros,
    encode,
    plane_scales,
)
from ir.rewrite import No

VERSION = 1
NO_OFFSET, OFFSET, ZERO_POINT = 0, 1, 2
_LANES, _HALVES, _CHUNK, _PLANES = 16, 2, 32, 8
_ROWS = _LANES * _HALVES


@dataclass(frozen=True)
class Layout:
    """What the kernels must know of a weight [rows, inputs], see `src/nomul.h`; the fields are those of its struct."""

    planes: int
    group: int
    terms: int
    tied: int
    offset: int
    rows: int
    inputs: int
    version: int = VERSION

    @property
    def groups(self) -> int:
        """Groups of a row, the ragged last one included."""
        return group_count(self.inputs, self.width)

    @property
    def width(self) -> int:
        """Inputs of a whole group."""
        return min(self.group, self.inputs)

    @property
    def sets(self) -> int:
        """Scales stored a group."""
        return 1 if self.tied else self.planes

    @property
    def tiles(self) -> int:
        """Tiles of 32 rows."""
        return group_count(self.rows, _ROWS)

    @property
    def chunks(self) -> tuple[int, int]:
        """Chunks of 32 inputs of a whole group and of the last one."""
        last = self.inputs - (self.groups - 1) * self.width
        return group_count(self.width, _CHUNK), group_count(last, _CHUNK)

    @property
    def record_bytes(self) -> int:
        """Bytes of the scales, the offset and the zero points of 16 rows of one group."""
        values = self.sets + (self.offset == OFFSET)
        coded = group_count(values * self.terms, 2) * _LANES if self.terms else values * 2 * _LANES
        return coded + (self.offset == ZERO_POINT) * _LANES

    @property
    def head_bytes(self) -> int:
        """Bytes of a tile before its signs."""
        return group_count(_HALVES * (2 * _LANES * bool(self.terms) + self.groups * self.record_bytes), 64) * 64

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        whole, last = self.chunks
        return self.head_bytes + ((self.groups - 1) * whole + last) * self.planes * _HALVES * 64

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight."""
        return self.tiles * self.tile_bytes

    def attributes(self) -> dict[str, int]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in tile order: data uint8 [bytes]."""

    data: Tensor
    layout: Layout


def refuses(codes: ShiftCodes | QuantCodes) -> No | None:
    """Return why there is no tile order for these codes, or None when there is."""
    if isinstance(codes, QuantCodes):
        return None
    planes = codes.planes * (2 if codes.meaning.trits else 1)
    if codes.code == "trits31":
        return No("trits that share one scale have no tile order")
    if planes > _PLANES:
        return No(f"there are kernels for at most {_PLANES} sign planes, and {planes} are stored")
    if codes.group < min(_CHUNK, codes.in_features):
        return No(f"groups of {codes.group} inputs are smaller than the {_CHUNK} that a kernel takes at once")
    return None


def layout_of(codes: ShiftCodes | QuantCodes) -> Layout:
    """Return the layout that `pack` gives codes; raises UnsupportedError where `refuses` gives a reason."""
    if (no := refuses(codes)) is not None:
        raise UnsupportedError("the weight cannot be put in tile order", why=no.reason, fix="run it by reference")
    if isinstance(codes, QuantCodes):
        offset = NO_OFFSET if codes.zeros is None else ZERO_POINT
        return Layout(codes.bits, codes.group, 0, 1, offset, codes.codes.shape[0], codes.in_features)
    uniform, twice = codes.code == "uniform", 2 if codes.meaning.trits else 1
    offset = NO_OFFSET if codes.offsets is None else ZERO_POINT if uniform else OFFSET
    planes = codes.planes * twice
    return Layout(planes, codes.group, codes.terms, int(uniform), offset, codes.rows, codes.in_features)


def pack(codes: ShiftCodes | QuantCodes) -> Packed:
    """Return codes in tile order; scales that tiles of rows share are repeated for each row.

    Trits become two sign planes each. Raises UnsupportedError where `refuses` gives a reason.
    """
    layout = layout_of(codes)
    if isinstance(codes, QuantCodes):
        signs, records, exponents = _of_quant(codes, layout)
    else:
        signs, records, exponents = _of_shift(_as_signs(codes), layout)
    head = torch.zeros(layout.tiles, layout.head_bytes, dtype=torch.uint8)
    parts = [records.flatten(1)]
    if exponents is not None:
        parts.insert(0, _by_half(exponents).transpose(2, 3).flatten(1).contiguous().view(torch.uint8))
    start = 0
    for part in parts:
        head[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    body = _sign_words(signs, layout).view(torch.uint8)
    data = torch.cat([head, body.reshape(layout.tiles, -1)], 1).flatten()
    assert data.numel() == layout.weight_bytes
    return Packed(data, layout)


def _as_signs(codes: ShiftCodes) -> ShiftCodes:
    """Return codes with a scale for each plane of signs; a trit is half the sum of its two signs."""
    if codes.code in ("planes", "uniform"):
        return codes
    scales = plane_scales(codes)
    planes = [decode_plane(codes, plane) for plane in range(codes.planes)]
    signs = [plane > 0 for plane in planes]
    if codes.meaning.trits:
        signs, scales = [plane >= least for plane in planes for least in (0, 1)], scales.repeat_interleave(2, 2) / 2
    found = encode(torch.stack(signs), scales, decode_offsets(codes), codes.group, codes.terms, codes.row_group)
    if not torch.equal(decode_scales(found), scales):
        raise UnsupportedError(f"a scale of {codes.code} cannot be halved", why="it is too small for its code")
    return found


def _of_shift(codes: ShiftCodes, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return sign planes [P, N, bytes], records and exponents [N, 2] of shift-add codes."""
    groups, sets, terms = layout.groups, layout.sets, layout.terms
    rows = codes.row_group, codes.rows
    zeros = expand_rows(decode_zeros(codes), *rows) if layout.offset == ZERO_POINT else None
    if terms == 0:
        values = codes.scales.reshape(-1, groups, sets)
        if layout.offset == OFFSET and codes.offsets is not None:
            values = torch.cat([values, codes.offsets.reshape(-1, groups, 1)], -1)
        return codes.signs, _half_records(expand_rows(values, *rows), zeros), None
    assert codes.exponents is not None
    nibbles = unpack_bits(codes.scales, 4, groups * sets * terms).reshape(-1, groups, sets * terms)
    if layout.offset == OFFSET and codes.offsets is not None:
        later = unpack_bits(codes.offsets, 4, groups * terms).reshape(-1, groups, terms)
        nibbles = torch.cat([nibbles, later], -1)
    return codes.signs, _nibble_records(expand_rows(nibbles, *rows), zeros), expand_rows(codes.exponents, *rows)


def _of_quant(codes: QuantCodes, layout: Layout) -> tuple[Tensor, Tensor, None]:
    values = unpack_bits(codes.codes, codes.bits, codes.in_features)
    signs = torch.stack([pack_bits(values >> i & 1, 1) for i in range(codes.bits)])
    zeros = None if codes.zeros is None else unpack_bits(codes.zeros, codes.bits, layout.groups)
    return signs, _half_records(codes.scales.reshape(layout.rows, layout.groups, 1), zeros), None


def _by_half(values: Tensor) -> Tensor:
    """Return values of rows [N, ...] by half tile, [tiles, 2, 16, ...], filled up with zeros."""
    missing = -values.shape[0] % _ROWS
    filled = torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values
    halves: Tensor = filled.unflatten(0, (-1, _HALVES, _LANES))
    return halves


def _nibble_records(nibbles: Tensor, zeros: Tensor | None) -> Tensor:
    """Return the records of nibbles [N, G, V] and zero points [N, G]: uint8 [tiles, G, 2, bytes]."""
    vectors = _by_half(pad(nibbles, (0, nibbles.shape[-1] % 2))).permute(0, 3, 1, 4, 2)
    pairs = vectors.unflatten(3, (-1, 2))
    return _with_zeros((pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(3), zeros)


def _half_records(values: Tensor, zeros: Tensor | None) -> Tensor:
    """Return the records of float16 values [N, G, V] and zero points [N, G]: uint8 [tiles, G, 2, bytes]."""
    vectors = _by_half(values).permute(0, 3, 1, 4, 2).contiguous()
    return _with_zeros(vectors.view(torch.uint8).flatten(3), zeros)


def _with_zeros(records: Tensor, zeros: Tensor | None) -> Tensor:
    return records if zeros is None else torch.cat([records, _by_half(zeros).permute(0, 3, 1, 2)], -1)


def _sign_words(signs: Tensor, layout: Layout) -> Tensor:
    """Return sign planes uint8 [P, N, ceil(K/8)] as bytes in tile order, [tiles, chunks, P, 2, 16, 4]."""
    if layout.width % _CHUNK and layout.groups > 1:
        signs = _filled_groups(signs, layout)
    words = pad(signs, (0, -signs.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return _by_half(words.transpose(0, 1)).permute(0, 4, 3, 1, 2, 5).contiguous()


def _filled_groups(signs: Tensor, layout: Layout) -> Tensor:
    """Return sign planes with every group but the last filled up to whole chunks."""
    bits = torch.stack([unpack_bits(plane, 1, layout.inputs) for plane in signs])
    groups = pad(bits, (0, layout.groups * layout.width - layout.inputs)).unflatten(-1, (layout.groups, -1))
    whole, last = layout.chunks
    filled = pad(groups, (0, whole * _CHUNK - layout.width)).flatten(-2)
    return pack_bits(filled[..., : ((layout.groups - 1) * whole + last) * _CHUNK].contiguous(), 1)
