"""The stored form of a shift-add weight: planes of signs or trits, and scales that are sums of powers of two.

W[n,k] = z[r,g] + sum_i alpha[r,g,i] * D_i[n,k], D in {-1,+1} or {-1,0,+1}, g = k // group, r = n // row_group: a tile
of `row_group` rows and `group` columns shares one set of scales. `CODES` says which alpha_i and z are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.codes import CODES, Code, expand_groups, expand_rows, group_count, meaning, row_tiles
from ir.ops.packing import pack_bits, unpack_bits
from ir.ops.powerterms import (
    MAX_TERMS,
    OFFSET_OCTAVES,
    SCALE_OCTAVES,
    decode_values,
    encode_values,
    leading_exponent,
    pack_nibbles,
    power_of_two,
    round_power_terms,
)
from ir.ops.trits import pack_trits, unpack_trits

__all__ = [
    "CODES",
    "OFFSET_OCTAVES",
    "SCALE_OCTAVES",
    "ShiftCodes",
    "decode_offsets",
    "decode_plane",
    "decode_planes",
    "decode_scales",
    "decode_zeros",
    "dequantize",
    "encode",
    "encode_uniform",
    "expand_groups",
    "group_count",
    "leading_exponent",
    "plane_scales",
    "power_of_two",
    "rescaled",
    "round_power_terms",
    "take_rows",
]

# A group of so many different weights or more is summed weight by weight.
_MOST_LEVELS = 256


@dataclass(frozen=True)
class ShiftCodes:
    """A shift-add weight [N, in_features] in stored form; rows of scales belong to tiles of `row_group` weight rows.

    signs: uint8 [planes, N, ceil(K/8)], bit t of byte b = input 8*b+t, 1 is +1, pad bits 0; of the codes with trits
    [planes, N, ceil(K/5)], five to a byte as `ir.ops.trits` packs them.
    scales: uint8 nibbles [tiles, ceil(G*S*terms/2)] in the order (g, set, term), S = planes or 1 (`CODES`). First
    nibble: octaves below the tile's exponent, 15 = the scale is zero. Further nibbles: bits 0..2 octaves below the
    previous term (0 = this and all later terms absent), bit 3 = this term is subtracted. The first term is positive:
    planes absorb the sign. With terms = 0, float16 [tiles, G*S].
    exponents: int8 [tiles, 2], the largest leading exponent of a tile's scales and of its offsets (0 when there is
    none); None with terms = 0.
    offsets: uint8 nibbles [tiles, ceil(G*terms/2)] or None. First nibble: bits 0..2 octaves below the tile's exponent,
    7 = the offset is zero, bit 3 = the offset is negative; further nibbles as for scales, their sign bits relative to
    the offset's own sign. With terms = 0, float16 [tiles, G]. Of `uniform` codes the zero points, uint8 bit stream
    [tiles, ceil(G*planes/8)], None = 2**(planes-1): w = scale * (code - zero).
    terms: powers of two a scale, 1 to 4; 0 for scales that are no short sums of them, which cost multiplies.
    """

    signs: Tensor
    scales: Tensor
    exponents: Tensor | None
    offsets: Tensor | None
    group: int
    terms: int
    in_features: int
    row_group: int = 1
    code: str = "planes"

    @property
    def planes(self) -> int:
        """Number of planes."""
        return self.signs.shape[0]

    @property
    def rows(self) -> int:
        """Number of output features."""
        return self.signs.shape[1]

    @property
    def tiles(self) -> int:
        """Number of row tiles, the ragged last one included."""
        return group_count(self.rows, self.row_group)

    @property
    def groups(self) -> int:
        """Number of groups along a row, the ragged last one included."""
        return group_count(self.in_features, self.group)

    @property
    def meaning(self) -> Code:
        """The row of `CODES`; raises UsageError for a code that is not there."""
        return meaning(self.code, self.planes)

    @property
    def sets(self) -> int:
        """Scales stored a group."""
        return self.meaning.sets(self.planes)

    @property
    def stored_bits(self) -> int:
        """Bits of all stored tensors, padding included."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by field name, absent ones left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)[:4]}
        return {name: value for name, value in values.items() if value is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K], summed exactly in float64 and rounded once to `dtype`."""
        return dequantize(self, dtype)


def take_rows(codes: ShiftCodes, start: int, stop: int) -> ShiftCodes:
    """Return the codes of a range of rows; rows are packed apart, so this cuts no byte.

    Raises UsageError when a cut goes through a tile of rows that share their scales.
    """
    tiles = row_tiles(start, stop, codes.rows, codes.row_group)
    return replace(
        codes,
        signs=codes.signs[:, start:stop].contiguous(),
        scales=codes.scales[tiles].contiguous(),
        exponents=None if codes.exponents is None else codes.exponents[tiles].contiguous(),
        offsets=None if codes.offsets is None else codes.offsets[tiles].contiguous(),
    )


def encode(
    signs: Tensor,
    alpha: Tensor,
    offset: Tensor | None,
    group: int,
    terms: int,
    row_group: int = 1,
    code: str = "planes",
) -> ShiftCodes:
    """Encode planes, scales and offsets; what is not representable is rounded, by `round_power_terms` or to float16.

    signs: [planes, N, K], bool or positive for +1, or the digits -1, 0, 1 of trits; alpha: float [tiles, G, S], a
    negative scale flips its planes; offset: float [tiles, G] or None. Nibbles hold no value more than 14 octaves
    (offsets: 6) below its tile row's largest: those become zero. Raises UsageError for shapes that disagree, values
    that are not finite, and uniform codes (`encode_uniform`).
    """
    planes, rows, inputs = signs.shape
    kind, groups, tiles = meaning(code, planes), group_count(inputs, group), group_count(rows, row_group)
    if code == "uniform":
        raise UsageError("uniform codes are not encoded from planes", fix="give the integers to encode_uniform")
    sets = kind.sets(planes)
    if alpha.shape != (tiles, groups, sets) or (offset is not None and offset.shape != (tiles, groups)):
        raise UsageError(
            f"scales must be [{tiles}, {groups}, {sets}] and offsets [{tiles}, {groups}]",
            why=f"they are {list(alpha.shape)} and {None if offset is None else list(offset.shape)}",
        )
    alpha = alpha.double()
    flip = expand_rows(alpha < 0, row_group, rows).permute(2, 0, 1).expand(planes, -1, -1)
    # Plane by plane: packing takes several times the memory of what it packs.
    turned = (expand_groups(one, group, inputs) for one in flip)
    packed = torch.stack([_packed(p, t, kind.trits) for p, t in zip(signs, turned, strict=True)])
    scales, offsets, exponents = _encode_scales(alpha.flatten(1).abs(), offset, terms)
    return ShiftCodes(packed, scales, exponents, offsets, group, terms, inputs, row_group, code)


def _packed(plane: Tensor, flip: Tensor, trits: bool) -> Tensor:
    """Return one plane [N, K], turned around where flip [N, K] is set, as bits or trits."""
    if trits:
        return pack_trits(torch.where(flip, -plane, plane))
    return pack_bits(((plane > 0) ^ flip).to(torch.uint8), 1)


def encode_uniform(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    terms: int,
    row_group: int = 1,
) -> ShiftCodes:
    """Encode a uniformly quantised weight w = scale * (code - zero) as planes, one for each bit of its codes.

    codes: uint8 [N, K] below 2**bits; scales: float [tiles, G], rounded where not representable; zeros: uint8
    [tiles, G] or None for 2**(bits-1). terms = 0 keeps float16 scales, signs included, in as many bits as the uniform
    form has; nibbles hold magnitudes, so there a negative scale turns its codes and zero points around. Raises
    UsageError for shapes that disagree, codes that do not fit and values that are not finite.
    """
    rows, inputs = codes.shape
    groups, tiles = group_count(inputs, group), group_count(rows, row_group)
    if scales.shape != (tiles, groups) or (zeros is not None and zeros.shape != (tiles, groups)):
        raise UsageError(
            f"scales and zero points must be [{tiles}, {groups}]",
            why=f"they are {list(scales.shape)} and {None if zeros is None else list(zeros.shape)}",
        )
    meaning("uniform", bits)
    scales, top = scales.double(), 2**bits - 1
    if codes.numel() and int(codes.max()) > top:
        raise UsageError(f"a code does not fit {bits} bits", why=f"the largest is {int(codes.max())}")
    flip = scales < 0
    if terms and bool(flip.any()):
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8) if zeros is None else zeros
        zeros = torch.where(flip, top - zeros, zeros)
        turned = expand_groups(expand_rows(flip, row_group, rows), group, inputs)
        codes = torch.where(turned, top - codes, codes)
    planes = torch.stack([pack_bits((codes >> i) & 1, 1) for i in range(bits)])
    packed, _, exponents = _encode_scales(scales.abs() if terms else scales, None, terms)
    points = None if zeros is None else pack_bits(zeros, bits)
    return ShiftCodes(planes, packed, exponents, points, group, terms, inputs, row_group, "uniform")


def rescaled(codes: ShiftCodes, alpha: Tensor, offset: Tensor | None) -> ShiftCodes:
    """Return codes with other scales [tiles, G, S], none negative, and offsets [tiles, G], rounded as `encode` does.

    Of uniform codes the zero points stay and `offset` is None.
    """
    if codes.code == "uniform":
        packed, _, exponents = _encode_scales(alpha.double().flatten(1), None, codes.terms)
        return replace(codes, scales=packed, exponents=exponents)
    packed, offsets, exponents = _encode_scales(alpha.double().flatten(1), offset, codes.terms)
    return replace(codes, scales=packed, exponents=exponents, offsets=offsets)


def _encode_scales(scales: Tensor, offset: Tensor | None, terms: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the stored scales, offsets and exponents of scales [tiles, M] and offsets [tiles, G], both float."""
    if not 0 <= terms <= MAX_TERMS:
        raise UsageError(f"a scale has 0 to {MAX_TERMS} power-of-two terms", why=f"{terms} were asked for")
    if terms == 0:
        return _half(scales), None if offset is None else _half(offset), None
    first, later, row = encode_values(scales, terms, SCALE_OCTAVES)
    exponents = torch.zeros(scales.shape[0], 2, dtype=torch.int8, device=scales.device)
    exponents[:, 0] = row.to(torch.int8)
    if offset is None:
        return pack_nibbles(first, later), None, exponents
    z_first, z_later, z_row = encode_values(offset.double(), terms, OFFSET_OCTAVES)
    negative = (offset < 0) & (z_first < OFFSET_OCTAVES)
    exponents[:, 1] = z_row.to(torch.int8)
    return pack_nibbles(first, later), pack_nibbles(z_first | negative.to(torch.uint8) << 3, z_later), exponents


def _half(values: Tensor) -> Tensor:
    rounded = values.half()
    if not torch.isfinite(rounded).all():
        raise UsageError("scales must be finite in float16", fix="check the weights for NaN, infinity and above 65504")
    return rounded


def decode_scales(codes: ShiftCodes, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the stored scales, [tiles, G, S], exact in float64 and float32.

    They are never negative, but for uniform codes with terms = 0.
    """
    shape = (codes.tiles, codes.groups, codes.sets)
    if codes.terms == 0:
        return codes.scales.to(dtype).reshape(shape)
    assert codes.exponents is not None
    count = codes.groups * codes.sets
    nibbles = unpack_bits(codes.scales, 4, count * codes.terms).reshape(codes.tiles, count, codes.terms)
    value = decode_values(nibbles[..., 0], nibbles[..., 1:], codes.exponents[:, 0], SCALE_OCTAVES)
    return value.reshape(shape).to(dtype)


def plane_scales(codes: ShiftCodes) -> Tensor:
    """Return what the digits of each plane are worth, alpha [tiles, G, planes], exact in float64."""
    scales, kind = decode_scales(codes), codes.meaning
    worth = [sum(2.0**e for e in kind.digit_powers(i)) for i in range(codes.planes)]
    return scales * torch.tensor(worth, dtype=torch.float64, device=scales.device)


def decode_zeros(codes: ShiftCodes) -> Tensor:
    """Return the zero points of uniform codes, uint8 [tiles, G]."""
    if codes.offsets is None:
        size = (codes.tiles, codes.groups)
        return torch.full(size, 2 ** (codes.planes - 1), dtype=torch.uint8, device=codes.signs.device)
    return unpack_bits(codes.offsets, codes.planes, codes.groups)


def decode_offsets(codes: ShiftCodes, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """Return the offsets z, [tiles, G], exact in float64 and float32, or None when there are none.

    Uniform codes always have them: scale * ((2**planes - 1) / 2 - zero).
    """
    if codes.code == "uniform":
        middle = (2**codes.planes - 1) / 2
        z: Tensor = decode_scales(codes)[..., 0] * (middle - decode_zeros(codes).double())
        return z.to(dtype)
    if codes.offsets is None:
        return None
    if codes.terms == 0:
        return codes.offsets.to(dtype)
    assert codes.exponents is not None
    shape = (codes.tiles, codes.groups, codes.terms)
    nibbles = unpack_bits(codes.offsets, 4, shape[1] * shape[2]).reshape(shape)
    first = nibbles[..., 0]
    value = decode_values(first & 7, nibbles[..., 1:], codes.exponents[:, 1], OFFSET_OCTAVES)
    return torch.where((first >> 3).bool(), -value, value).to(dtype)


def decode_planes(codes: ShiftCodes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the digits D, [planes, N, K], values -1 and +1, of trits -1, 0 and +1."""
    return torch.stack([decode_plane(codes, i) for i in range(codes.planes)]).to(dtype)


def decode_plane(codes: ShiftCodes, plane: int) -> Tensor:
    """Return the digits of one plane, int8 [N, K]."""
    if codes.meaning.trits:
        return unpack_trits(codes.signs[plane], codes.in_features)
    return unpack_bits(codes.signs[plane], 1, codes.in_features).to(torch.int8) * 2 - 1


def dequantize(codes: ShiftCodes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [N, K] = z + sum_i alpha_i D_i, summed in float64 and rounded once to `dtype`."""
    if codes.code == "uniform":
        return _uniform(codes).to(dtype)
    base = 3 if codes.meaning.trits else 2
    few = base**codes.planes * codes.groups <= codes.in_features and base**codes.planes <= _MOST_LEVELS
    return _by_levels(codes, dtype) if few else _by_sums(codes).to(dtype)


def _uniform(codes: ShiftCodes) -> Tensor:
    """Return scale * (code - zero) in float64, as `ir.ops.quant.QuantCodes` does."""
    value = torch.zeros(codes.rows, codes.in_features, dtype=torch.uint8, device=codes.signs.device)
    for i in range(codes.planes):
        value |= unpack_bits(codes.signs[i], 1, codes.in_features) << i
    zeros = _over_weights(codes, decode_zeros(codes).double())
    return (value.double() - zeros) * _over_weights(codes, decode_scales(codes)[..., 0])


def _by_levels(codes: ShiftCodes, dtype: torch.dtype) -> Tensor:
    """Compute the few different values a group has, and let every weight look its own up."""
    alpha, z, trits = plane_scales(codes), decode_offsets(codes), codes.meaning.trits
    levels = torch.zeros_like(alpha[..., :1]) if z is None else z[..., None]
    index = torch.zeros(codes.rows, codes.in_features, dtype=torch.uint8, device=codes.signs.device)
    for i in range(codes.planes):
        step, digits = alpha[..., i : i + 1], decode_plane(codes, i)
        index += ((digits + 1) * 3**i if trits else (digits > 0) * 2**i).to(torch.uint8)
        levels = torch.cat([levels - step, levels, levels + step] if trits else [levels - step, levels + step], -1)
    width = min(codes.group, codes.in_features)
    padded = torch.nn.functional.pad(index, (0, codes.groups * width - codes.in_features))
    spread = expand_rows(levels.to(dtype), codes.row_group, codes.rows)
    looked_up = spread.gather(2, padded.unflatten(1, (codes.groups, width)).long())
    return looked_up.flatten(1)[:, : codes.in_features].contiguous()


def _by_sums(codes: ShiftCodes) -> Tensor:
    """Return z + sum_i alpha_i D_i, weight by weight in float64, in the order in which `_by_levels` adds."""
    alpha, z = plane_scales(codes), decode_offsets(codes)
    total = torch.zeros(codes.rows, codes.in_features, dtype=torch.float64, device=codes.signs.device)
    if z is not None:
        total = total + _over_weights(codes, z)
    for i in range(codes.planes):
        total += _over_weights(codes, alpha[..., i]) * decode_plane(codes, i)
    return total


def _over_weights(codes: ShiftCodes, values: Tensor) -> Tensor:
    """Repeat values of tiles and groups [tiles, G] over their weights: [N, K]."""
    return expand_groups(expand_rows(values, codes.row_group, codes.rows), codes.group, codes.in_features)
