"""The weight of a coded linear as a differentiable function of its scales and offsets, its codes as they are.

The scales of a state are factors of those stored, kept as logarithms, so that none turns negative and one learning rate
suits all; offsets move by multiples of their group's largest scale. What a state gives is what would be stored:
rounding to float16 or to sums of powers of two is part of it, and passes gradients on as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ir.ops.codes import expand_rows
from ir.ops.nm import scatter_kept, unpack_mask
from ir.ops.packing import unpack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import (
    ShiftCodes,
    decode_offsets,
    decode_plane,
    decode_scales,
    decode_zeros,
    group_count,
    rescaled,
)
from ir.ops.sparse import SparseCodes

# Scales are known by these parts of a state, after the site's prefix.
_SCALES, _OFFSETS = "scales", "offsets"


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight sum_i worth_i * scale_(i) * D_i + offset in float32, D the digits of its codes.

    digits: int8 or int16 [P, N, G, group], padded with zeros; worth: [P], what a digit of each plane counts; scales:
    [tiles, G, S]; offsets: [tiles, G] or None. mask: bool [N, inputs] where codes are those of kept weights only.
    """

    codes: QuantCodes | ShiftCodes
    digits: Tensor
    worth: Tensor
    scales: Tensor
    offsets: Tensor | None
    mask: Tensor | None = None

    def start(self) -> dict[str, Tensor]:
        """Return the state under which the weight is the one stored."""
        found = {_SCALES: torch.zeros_like(self.scales)}
        return found if self.offsets is None else found | {_OFFSETS: torch.zeros_like(self.offsets)}

    def weight(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [N, K] under a state, float32."""
        scales, offsets = self._rounded(*self._values(state))
        rows, tile = self.digits.shape[1], self._row_group
        worth = expand_rows(scales, tile, rows)[..., None, :]
        total = 0.0 if offsets is None else expand_rows(offsets, tile, rows)[..., None]
        for i in range(self.digits.shape[0]):
            total = total + self.digits[i] * (worth[..., i % worth.shape[-1]] * self.worth[i])
        assert isinstance(total, Tensor)
        whole = total.flatten(1)[:, : self.codes.in_features]
        return whole if self.mask is None else scatter_kept(whole, self.mask)

    def coded(self, state: Mapping[str, Tensor]) -> QuantCodes | ShiftCodes:
        """Return the codes under a state."""
        with torch.no_grad():
            return self._stored(*self._values(state))

    @property
    def _row_group(self) -> int:
        return self.codes.row_group if isinstance(self.codes, ShiftCodes) else 1

    def _values(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        scales = self.scales * state[_SCALES].exp()
        if self.offsets is None:
            return scales, None
        return scales, self.offsets + state[_OFFSETS] * self.scales.amax(-1)

    def _stored(self, scales: Tensor, offsets: Tensor | None) -> QuantCodes | ShiftCodes:
        if isinstance(self.codes, QuantCodes):
            return replace(self.codes, scales=scales[..., 0].half())
        return rescaled(self.codes, scales, None if offsets is None else offsets.double())

    def _rounded(self, scales: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return scales and offsets as they are stored, with the gradients of what they were."""
        with torch.no_grad():
            codes = self._stored(scales, offsets)
            kept, moved = _scales_of(codes), _offsets_of(codes)
        rounded = scales + (kept - scales).detach()
        if offsets is None or moved is None:
            return rounded, None
        return rounded, offsets + (moved - offsets).detach()


def coded_weight(codes: QuantCodes | ShiftCodes | SparseCodes) -> CodedWeight:
    """Return a stored weight by its digits, scales and offsets; of a sparse one, those of the weights it keeps."""
    if isinstance(codes, SparseCodes):
        assert not isinstance(codes.kept, Tensor)
        return replace(coded_weight(codes.kept), mask=unpack_mask(codes.mask, codes.in_features))
    if isinstance(codes, QuantCodes):
        whole = unpack_bits(codes.codes, codes.bits, codes.in_features).float()
        zeros = torch.full_like(codes.scales, 2.0 ** (codes.bits - 1), dtype=torch.float32)
        if codes.zeros is not None:
            zeros = unpack_bits(codes.zeros, codes.bits, codes.scales.shape[1]).float()
        return _whole(codes, whole, zeros, codes.group)
    if codes.code == "uniform":
        whole = sum(unpack_bits(codes.signs[i], 1, codes.in_features).float() * 2**i for i in range(codes.planes))
        assert isinstance(whole, Tensor)
        return _whole(codes, whole, expand_rows(decode_zeros(codes).float(), codes.row_group, codes.rows), codes.group)
    digits = torch.stack([_grouped(decode_plane(codes, i).float(), codes.group) for i in range(codes.planes)])
    worth = torch.tensor([sum(2.0**e for e in codes.meaning.digit_powers(i)) for i in range(codes.planes)])
    return CodedWeight(codes, _narrow(digits), worth, _scales_of(codes), _offsets_of(codes))


def _whole(codes: QuantCodes | ShiftCodes, whole: Tensor, zeros: Tensor, group: int) -> CodedWeight:
    """Return a weight (whole - zero) * scale."""
    parts = _grouped(whole, group)
    live = _grouped(torch.ones_like(whole), group)
    digits = _narrow(((parts - zeros[..., None]) * live)[None])
    return CodedWeight(codes, digits, torch.ones(1), _scales_of(codes), None)


def _narrow(digits: Tensor) -> Tensor:
    return digits.to(torch.int8 if int(digits.abs().max()) < 128 else torch.int16)


def _grouped(values: Tensor, group: int) -> Tensor:
    """Return [N, K] as [N, G, group], padded with zeros."""
    size = min(group, values.shape[1])
    padded = functional.pad(values, (0, group_count(values.shape[1], size) * size - values.shape[1]))
    parts: Tensor = padded.unflatten(1, (-1, size))
    return parts


def _scales_of(codes: QuantCodes | ShiftCodes) -> Tensor:
    return codes.scales.float()[..., None] if isinstance(codes, QuantCodes) else decode_scales(codes, torch.float32)


def _offsets_of(codes: QuantCodes | ShiftCodes) -> Tensor | None:
    if isinstance(codes, QuantCodes) or codes.code == "uniform":
        return None
    return decode_offsets(codes, torch.float32)
