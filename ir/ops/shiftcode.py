"""The stored form of a shift-add weight: sign planes and scales that are sums of powers of two, all as integer codes.

W[n,k] = z[n,g] + sum_i alpha[n,g,i] * B_i[n,k], B in {-1,+1}, g = k // group (row groups along the inputs).
A value is s * (2^e0 +- 2^e1 +- 2^e2) with e0 > e1 > e2 and steps of at most 7 octaves: one nibble a term.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.packing import pack_bits, unpack_bits

SCALE_OCTAVES = 15
OFFSET_OCTAVES = 7
_MAX_DELTA = 7
_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True)
class ShiftCodes:
    """A shift-add weight [N, in_features] in stored form.

    signs: uint8 [planes, N, ceil(K/8)], bit t of byte b = input 8*b+t, 1 is +1, pad bits 0.
    scales: uint8 nibbles [N, ceil(G*planes*terms/2)] in the order (g, plane, term). First nibble: octaves below the
    row exponent, 15 = the scale is zero. Further nibbles: bits 0..2 octaves below the previous term (0 = this and all
    later terms absent), bit 3 = this term is subtracted. The first term is positive: planes absorb the sign.
    exponents: int8 [N, 2], the largest leading exponent of a row's scales and of its offsets (0 when there is none).
    offsets: uint8 nibbles [N, ceil(G*terms/2)] or None. First nibble: bits 0..2 octaves below the row exponent, 7 = the
    offset is zero, bit 3 = the offset is negative; further nibbles as for scales, their sign bits relative to the
    offset's own sign.
    """

    signs: Tensor
    scales: Tensor
    exponents: Tensor
    offsets: Tensor | None
    group: int
    terms: int
    in_features: int

    @property
    def planes(self) -> int:
        """Number of sign planes."""
        return self.signs.shape[0]

    @property
    def rows(self) -> int:
        """Number of output features."""
        return self.signs.shape[1]

    @property
    def groups(self) -> int:
        """Number of groups along a row, the ragged last one included."""
        return group_count(self.in_features, self.group)

    @property
    def stored_bits(self) -> int:
        """Bits of all stored tensors, padding included."""
        tensors = [self.signs, self.scales, self.exponents]
        tensors += [] if self.offsets is None else [self.offsets]
        return sum(8 * t.numel() * t.element_size() for t in tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K], summed exactly in float64 and rounded once to `dtype`."""
        return dequantize(self, dtype)


def take_rows(codes: ShiftCodes, start: int, stop: int) -> ShiftCodes:
    """Return the codes of a range of rows; rows are packed apart, so this cuts no byte."""
    return replace(
        codes,
        signs=codes.signs[:, start:stop].contiguous(),
        scales=codes.scales[start:stop].contiguous(),
        exponents=codes.exponents[start:stop].contiguous(),
        offsets=None if codes.offsets is None else codes.offsets[start:stop].contiguous(),
    )


def group_count(in_features: int, group: int) -> int:
    """Return the number of groups of `group` inputs, a ragged last one included."""
    return -(-in_features // group)


@dataclass(frozen=True)
class _Table:
    """All representable mantissas in [1, 2], ascending: value, lead above the value's own exponent, later nibbles."""

    values: Tensor
    middles: Tensor
    lead: Tensor
    nibbles: Tensor


@lru_cache(maxsize=8)
def _table(terms: int, device: str) -> _Table:
    """Enumerate 1 +- 2^-d1 +- 2^-(d1+d2), each brought into [1, 2); equal values keep the fewest terms, lowest lead."""
    if terms not in (1, 2, 3):
        raise UsageError("a scale has 1, 2 or 3 power-of-two terms", why=f"{terms} were asked for")
    found: dict[float, tuple[int, int, tuple[int, ...]]] = {}
    for count in range(terms):
        for steps in product(range(1, _MAX_DELTA + 1), repeat=count):
            for signs in product((0, 1), repeat=count):
                value, exponent = 1.0, 0
                for step, sign in zip(steps, signs, strict=True):
                    exponent -= step
                    value += (-1.0 if sign else 1.0) * 2.0**exponent
                lead = 0
                while value < 1.0:
                    value, lead = value * 2.0, lead + 1
                later = tuple(d | s << 3 for d, s in zip(steps, signs, strict=True))
                code = (count, lead, later + (0,) * (terms - 1 - count))
                found[value] = min(found.get(value, code), code)
    values = sorted(found)
    grid = torch.tensor([*values, 2.0], dtype=torch.float64, device=device)
    lead_list = [found[v][1] for v in values] + [1]
    nibbles = [found[v][2] for v in values] + [found[1.0][2]]
    return _Table(
        grid,
        (grid[1:] + grid[:-1]) / 2,
        torch.tensor(lead_list, dtype=torch.int32, device=device),
        torch.tensor(nibbles, dtype=torch.uint8, device=device).reshape(len(lead_list), terms - 1),
    )


def _lookup(x: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return |x| rounded to the nearest representable value, its leading exponent (int32) and its table index."""
    table = _table(terms, str(x.device))
    mantissa, exponent = torch.frexp(x.abs())
    index = torch.searchsorted(table.middles, mantissa * 2.0)
    exponent = exponent - 1
    value = table.values[index] * power_of_two(exponent)
    return torch.where(x == 0, 0.0, value), exponent + table.lead[index], index


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent exactly as float64, for int exponents in -1022..1023 (clamped), from the bit pattern."""
    return (exponent.long().clamp(-1022, 1023) + 1023 << 52).view(torch.float64)


def leading_exponent(x: Tensor, terms: int) -> Tensor:
    """Return the exponent of the first term of x's code, int32; meaningless where x is 0."""
    return _lookup(x.double(), terms)[1]


def round_power_terms(x: Tensor, terms: int, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Round to the nearest signed sum of `terms` powers of two that a code can hold (ShiftAddLLM's APoT scales).

    x: float [...]; low, high: int tensors that broadcast to x, the least and greatest leading exponent allowed (a
    row's window): what leads below `low` becomes zero, what leads above `high` the greatest value that leads there.
    Returns float64 [...], sign symmetric and equivariant under powers of two. The rounding is to the nearest value of
    the enumerated code book, not the greedy sqrt(2) switch of the release: its worst error is 33.3, 9.1
    and 2.3 percent for 1, 2, 3 terms against 41.4, 10.8 and 2.7, its mean over log-uniform scales 17.3, 2.90 and 0.49
    against 17.9, 2.98 and 0.50.
    """
    x = x.double()
    value, lead, _ = _lookup(x, terms)
    if high is not None:
        table = _table(terms, str(x.device))
        top = table.values[table.lead == 0].max()
        value = torch.where((lead > high) & (x != 0), top * power_of_two(high.expand_as(lead)), value)
    if low is not None:
        value = torch.where(lead < low, 0.0, value)
    return torch.copysign(value, x)


def _encode_values(x: Tensor, terms: int, octaves: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return octaves below the row exponent ([N, M], `octaves` = zero), later nibbles [N, M, terms-1], exponent [N]."""
    if not torch.isfinite(x).all():
        raise UsageError("scales must be finite to be encoded", fix="check the weights for NaN and infinity")
    value, lead, index = _lookup(x, terms)
    alive = (value != 0) & (lead >= _LOWEST)
    row = torch.where(alive, lead, _LOWEST - 1).amax(1)
    if int(row.max()) > _HIGHEST:
        raise UsageError("a scale is too large to be encoded", why=f"it exceeds 2**{_HIGHEST}")
    below = row[:, None] - lead
    alive &= below < octaves
    later = torch.where(alive[..., None], _table(terms, str(x.device)).nibbles[index], 0)
    return torch.where(alive, below, octaves).to(torch.uint8), later, torch.where(row < _LOWEST, 0, row)


def _decode_values(first: Tensor, later: Tensor, row: Tensor, octaves: int) -> Tensor:
    """Return the float64 magnitudes [N, M] of codes (first [N, M], later [N, M, terms-1], row exponent int [N])."""
    exponent = row.long()[:, None] - first.long()
    present = first < octaves
    value = torch.where(present, power_of_two(exponent), 0.0)
    for nibble in later.unbind(-1):
        delta = (nibble & 7).long()
        present = present & (delta > 0)
        exponent = exponent - delta
        term = torch.where((nibble >> 3).bool(), -1.0, 1.0) * power_of_two(exponent)
        value = value + torch.where(present, term, 0.0)
    return value


def encode(signs: Tensor, alpha: Tensor, offset: Tensor | None, group: int, terms: int) -> ShiftCodes:
    """Encode planes, scales and offsets; what is not representable is rounded by `round_power_terms` first.

    signs: [planes, N, K], bool or positive for +1; alpha: float [N, G, planes], a negative scale flips its plane;
    offset: float [N, G] or None. Values more than 14 octaves (offsets: 6) below their row's largest become zero.
    Raises UsageError for shapes that disagree or values that are not finite.
    """
    planes, rows, inputs = signs.shape
    groups = group_count(inputs, group)
    if alpha.shape != (rows, groups, planes) or (offset is not None and offset.shape != (rows, groups)):
        raise UsageError(
            f"scales must be [{rows}, {groups}, {planes}] and offsets [{rows}, {groups}]",
            why=f"they are {list(alpha.shape)} and {None if offset is None else list(offset.shape)}",
        )
    alpha = alpha.double()
    flip = expand_groups((alpha < 0).permute(2, 0, 1), group, inputs)
    first, later, row = _encode_values(alpha.reshape(rows, -1), terms, SCALE_OCTAVES)
    exponents = torch.zeros(rows, 2, dtype=torch.int8, device=signs.device)
    exponents[:, 0] = row.to(torch.int8)
    offsets = None
    if offset is not None:
        z_first, z_later, z_row = _encode_values(offset.double(), terms, OFFSET_OCTAVES)
        negative = (offset < 0) & (z_first < OFFSET_OCTAVES)
        exponents[:, 1] = z_row.to(torch.int8)
        offsets = _pack_nibbles(z_first | negative.to(torch.uint8) << 3, z_later)
    packed = pack_bits(((signs > 0) ^ flip).to(torch.uint8), 1)
    return ShiftCodes(packed, _pack_nibbles(first, later), exponents, offsets, group, terms, inputs)


def expand_groups(values: Tensor, group: int, in_features: int) -> Tensor:
    """Repeat each entry of the last dim (groups) over its inputs: [..., G] -> [..., in_features]."""
    return (
        values.repeat_interleave(group, -1)[..., :in_features]
        if group < in_features
        else values.expand(*values.shape[:-1], in_features)
    )


def decode_scales(codes: ShiftCodes, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the scales alpha >= 0, [N, G, planes], exact in float64 and float32."""
    shape = (codes.rows, codes.groups * codes.planes, codes.terms)
    nibbles = unpack_bits(codes.scales, 4, shape[1] * shape[2]).reshape(shape)
    value = _decode_values(nibbles[..., 0], nibbles[..., 1:], codes.exponents[:, 0], SCALE_OCTAVES)
    return value.reshape(codes.rows, codes.groups, codes.planes).to(dtype)


def decode_offsets(codes: ShiftCodes, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """Return the offsets z, [N, G], exact in float64 and float32, or None when there are none."""
    if codes.offsets is None:
        return None
    shape = (codes.rows, codes.groups, codes.terms)
    nibbles = unpack_bits(codes.offsets, 4, shape[1] * shape[2]).reshape(shape)
    first = nibbles[..., 0]
    value = _decode_values(first & 7, nibbles[..., 1:], codes.exponents[:, 1], OFFSET_OCTAVES)
    return torch.where((first >> 3).bool(), -value, value).to(dtype)


def decode_planes(codes: ShiftCodes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the planes B, [planes, N, K], values -1 and +1."""
    return unpack_bits(codes.signs, 1, codes.in_features).to(dtype) * 2 - 1


def dequantize(codes: ShiftCodes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [N, K] = z + sum_i alpha_i B_i, summed in float64 and rounded once to `dtype`.

    A group has only 2**planes different values, so these are computed and every weight looks its own up.
    """
    alpha, z = decode_scales(codes), decode_offsets(codes)
    levels = torch.zeros_like(alpha[..., :1]) if z is None else z[..., None]
    index = torch.zeros(codes.rows, codes.in_features, dtype=torch.uint8, device=codes.signs.device)
    for i in range(codes.planes):
        step = alpha[..., i : i + 1]
        levels = torch.cat([levels - step, levels + step], -1)
        index |= unpack_bits(codes.signs[i], 1, codes.in_features) << i
    width = min(codes.group, codes.in_features)
    padded = torch.nn.functional.pad(index, (0, codes.groups * width - codes.in_features))
    looked_up = levels.to(dtype).gather(2, padded.unflatten(1, (codes.groups, width)).long())
    return looked_up.flatten(1)[:, : codes.in_features].contiguous()


def _pack_nibbles(first: Tensor, later: Tensor) -> Tensor:
    """Pack the nibbles of each value side by side: first [N, M], later [N, M, terms-1] -> uint8 [N, bytes]."""
    return pack_bits(torch.cat([first[..., None], later], -1).flatten(1), 4)
