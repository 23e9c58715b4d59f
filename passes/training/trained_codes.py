"""A weight trained together with the scales that it is rounded by, as what an optimiser moves and what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from ir.ops.codes import part_types
from ir.ops.nm import pack_mask
from ir.ops.packing import pack_bits, unpack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes, decode_offsets, decode_scales, encode, encode_uniform, rescaled
from ir.ops.sparse import SparseCodes
from passes.quantize.uniform import packed_bytes
from passes.sparsify.masks import Mask
from passes.training.rounded import Domain, Merged, RoundedLinear, levels

Offset = Literal["none", "zero", "float"]
Place = Literal["weight", "code", "group"]
Stored = QuantCodes | ShiftCodes | SparseCodes
# Parts of a weight's state.
SCALES, OFFSETS, DOWN, UP, BASE = "scales", "offsets", "down", "up", "base"
# Of scales that float16 holds.
_TINY, _MOST = 2.0**-24, 65504.0


@dataclass(frozen=True)
class Grid:
    """The levels of a group, scale * (code - center) + offset.

    offset: `none` has levels from -2**(bits-1) to 2**(bits-1) - 1 scales; `zero` a whole zero point in place of
    2**(bits-1), stored in `bits` bits; `float` any offset, stored as float16, the codes around it. terms: powers of two
    that stored scales, and float offsets, are sums of; 0 stores them as float16.
    """

    bits: int
    group: int
    offset: Offset
    terms: int = 0

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def center(self) -> float:
        """The code that stands for the offset, where no zero point says another."""
        return self.top / 2 if self.offset == "float" else 2.0 ** (self.bits - 1)

    @property
    def wide(self) -> bool:
        """Whether a scale times a code may take more bits than float32 has."""
        return self.terms > 1

    def stored_bytes(self, rows: int, inputs: int) -> int:
        """Return the bytes of a weight's codes, scales and offsets."""
        if self.offset != "float" and not self.terms:
            return packed_bytes(rows, inputs, self.bits, self.group, self.offset == "none")
        code = "steps" if self.offset == "float" else "uniform"
        types = part_types(
            self.bits, rows, inputs, self.group, self.terms, code=code, offset=self.offset != "none"
        ).values()
        return sum(dtype.itemsize * prod(dims) for dtype, dims in types)


@dataclass
class _Kept:
    """Codes, and the tensors and their versions that they were found for."""

    found_for: tuple[tuple[Tensor, int], ...] = ()
    codes: Tensor | None = None
    times: int = 0


@dataclass(frozen=True, eq=False)
class TrainedCodes:
    """A weight [N, K] that is rounded to a grid in every step, whole or with a low-rank addition.

    base: float32 [N, K], as places among the levels at the start unless the domain is `weight`; scales: [N, G] at the
    start, positive; offsets: likewise, zero points or floats, None for a grid without; rank, factor: of the addition
    factor * up @ down, rank 0 for none; domain: what it is added to, weights, their places (LR-QAT, 2406.06385), or the
    float offsets of groups [N, G] under codes that stay (QA-LoRA, 2309.14717, section 3.3); whole: the base itself is
    trained; relative: scales move by factors of their start, otherwise by differences; seed: of the addition's start;
    mask: the inputs that each row keeps, whose groups the grid then speaks of, around zero; the others are zero. keep:
    hold the codes until a tensor of the state changes, for a byte a weight, instead of finding them for every product
    and again on its way back.
    """

    base: Tensor
    grid: Grid
    scales: Tensor
    offsets: Tensor | None
    rank: int = 0
    factor: float = 1.0
    domain: Place = "weight"
    whole: bool = False
    relative: bool = True
    seed: int = 0
    mask: Mask | None = None
    keep: bool = False
    _kept: _Kept = field(default_factory=_Kept)

    @property
    def rounded(self) -> int:
        """How often the whole weight was rounded."""
        return self._kept.times

    def start(self) -> dict[str, Tensor]:
        """Return the state under which the weight is the base, rounded; `down` is drawn as LoRA draws it."""
        found = {SCALES: torch.zeros_like(self.scales)}
        if self.offsets is not None:
            found[OFFSETS] = torch.zeros_like(self.offsets)
        if self.rank:
            rows, inputs = self.scales.shape if self.domain == "group" else self.base.shape
            found |= first_addition(rows, inputs, self.rank, self.seed, self.base.dtype)
        return found | ({BASE: self.base} if self.whole else {})

    def bound(self, state: Mapping[str, Tensor]) -> Bound:
        """Return the weight under a state, to multiply by."""
        return Bound(self, state, *self._levels(state))

    def stored(self, state: Mapping[str, Tensor]) -> Stored:
        """Return the weight under a state as it is stored: the codes that `Bound.linear` multiplies by."""
        found = self._coded(state)
        if self.mask is None:
            return found
        n, m = self.mask.pattern.n, self.mask.pattern.m
        return SparseCodes(found, pack_mask(self.mask.kept, n, m), n, m, self.base.shape[1])

    def _coded(self, state: Mapping[str, Tensor]) -> QuantCodes | ShiftCodes:
        """Return the codes of all weights, or of those that the mask keeps."""
        with torch.no_grad():
            grid = self.grid
            scales, centers, offsets = self._levels(state)
            codes = self.codes(state, scales, centers, offsets).flatten(1)
            zeros = centers.to(torch.uint8) if grid.offset == "zero" else None
            if grid.offset == "float":
                signs = torch.stack([(codes >> i & 1).bool() for i in range(grid.bits)])
                return encode(signs, scales[..., None], offsets, grid.group, grid.terms, code="steps")
            if grid.terms:
                return encode_uniform(codes, scales, zeros, grid.bits, grid.group, grid.terms)
            packed = None if zeros is None else pack_bits(zeros, grid.bits)
            return QuantCodes(pack_bits(codes, grid.bits), scales.half(), packed, grid.bits, grid.group, codes.shape[1])

    def settled(self, state: Mapping[str, Tensor], **how: Any) -> TrainedCodes:
        """Return the weight under a state, not rounded, and its levels as the start of other training.

        how: as `trained_codes` takes it.
        """
        with torch.no_grad():
            scales, centers, offsets = self._levels(state)
            base, down, up = self._parts(state)
            whole = base if down is None or up is None else torch.addmm(base, up, down, alpha=self.factor)
            at = {"none": None, "zero": centers, "float": offsets}[self.grid.offset]
        assert self.domain == "weight"
        return trained_codes(whole, self.grid, scales, at, mask=self.mask, **how)

    def codes(self, state: Mapping[str, Tensor], scales: Tensor, centers: Tensor, offsets: Tensor) -> Tensor:
        """Return the codes [N, G, group] under a state; kept ones are found once until one of its tensors changes."""
        read = {"weight": (SCALES, OFFSETS, DOWN, UP, BASE), "code": (DOWN, UP, BASE), "group": (BASE,)}[self.domain]
        key = tuple((state[name], state[name]._version) for name in read if name in state)
        kept = self._kept
        same = len(key) == len(kept.found_for) and all(
            a is b and at == since for (a, at), (b, since) in zip(key, kept.found_for, strict=True)
        )
        if kept.codes is not None and same:
            return kept.codes
        with torch.no_grad():
            found = self.merged.codes(self.merged.places(*self._parts(state), scales, centers, offsets))
        kept.times += 1
        if self.keep:
            kept.codes, kept.found_for = found, key
        return found

    @property
    def merged(self) -> Merged:
        """How base and addition are put together and rounded."""
        kept = None if self.mask is None else self.mask.kept
        domain: Domain = "weight" if self.domain == "weight" else "code"
        return Merged(self.grid.group, self.grid.top, self.factor, domain, kept)

    def _parts(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        base = state.get(BASE, self.base)
        return (base, None, None) if self.domain == "group" else (base, state.get(DOWN), state.get(UP))

    def _levels(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return scales, centers and offsets [N, G] as they are stored, with the gradients of what they were."""
        moved = state.get(SCALES, torch.zeros_like(self.scales))
        scales = self.scales * moved.exp() if self.relative else (self.scales + moved).clamp(min=_TINY)
        centers, offsets = torch.full_like(self.scales, self.grid.center), torch.zeros_like(self.scales)
        if self.offsets is not None and self.grid.offset == "zero":
            points = self.offsets + state.get(OFFSETS, 0.0)
            centers = straight(points, points.detach().clamp(0, self.grid.top).round())
        elif self.offsets is not None:
            offsets = self.offsets + state.get(OFFSETS, 0.0) * self.scales
        if self.domain == "group" and UP in state:
            offsets = offsets + self.factor * state[UP] @ state[DOWN]
        with torch.no_grad():
            stored, at = self._representable(scales, offsets)
        return straight(scales, stored), centers, straight(offsets, at)

    def _representable(self, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest scales and offsets that can be stored."""
        grid, dtype = self.grid, scales.dtype
        if grid.terms == 0:
            return scales.clamp(_TINY, _MOST).half().to(dtype), offsets.clamp(-_MOST, _MOST).half().to(dtype)
        rows, inputs = self.base.shape[0], scales.shape[1] * grid.group
        signs = torch.empty(grid.bits, rows, 0, dtype=torch.uint8)
        shell = ShiftCodes(signs, signs, None, None, grid.group, grid.terms, inputs, code="steps")
        found = rescaled(shell, scales[..., None], offsets if grid.offset == "float" else None)
        at = decode_offsets(found, dtype)
        return decode_scales(found, dtype)[..., 0], torch.zeros_like(offsets) if at is None else at


@dataclass(frozen=True, eq=False)
class Bound:
    """A weight under a state, with its scales, centers and offsets [N, G]."""

    weight: TrainedCodes
    state: Mapping[str, Tensor]
    scales: Tensor
    centers: Tensor
    offsets: Tensor

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias, W the weight that would be stored."""
        own = self.weight
        parts = own._parts(self.state)
        at = (self.scales, self.centers, self.offsets)
        kept = self._codes if own.keep else _nothing
        y: Tensor = RoundedLinear.apply(x, *parts, *at, bias, own.merged, kept, own.grid.wide)
        return y

    def dense(self) -> Tensor:
        """Return the weight [N, K]."""
        parts = levels(self._codes(), self.scales, self.centers, self.offsets, self.weight.grid.wide)
        return self.weight.merged.spread(parts)

    def _codes(self) -> Tensor:
        return self.weight.codes(self.state, self.scales, self.centers, self.offsets)


def _nothing() -> None:
    return None


def trained_codes(
    weight: Tensor, grid: Grid, scales: Tensor, offsets: Tensor | None, domain: Place = "weight", **how: Any
) -> TrainedCodes:
    """Return a weight [N, K] with its levels at the start, as it is trained in a domain.

    how: the other fields of `TrainedCodes`.
    """
    found = TrainedCodes(weight, grid, scales, offsets, **how)
    if domain == "weight":
        return found
    places = found.merged.spread(found.merged.places(weight, None, None, *found._levels({})))
    return replace(found, base=places, domain=domain)


def first_addition(rows: int, inputs: int, rank: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return an addition of nothing, as LoRA draws it: `down` [rank, inputs] at random, `up` [rows, rank] of zeros."""
    drawn = torch.rand(rank, inputs, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return {DOWN: (2 * drawn - 1) / inputs**0.5, UP: torch.zeros(rows, rank, dtype=dtype)}


def straight(value: Tensor, stored: Tensor) -> Tensor:
    """Return `stored`, with the gradient of what it was."""
    return value + (stored - value).detach()


def flipped(before: Stored, after: Stored) -> float:
    """Return the share of a weight's codes that differ."""
    a, b = (_integers(codes) for codes in (before, after))
    return float((a != b).float().mean())


def _integers(codes: Stored | Tensor) -> Tensor:
    if isinstance(codes, SparseCodes):
        return _integers(codes.kept)
    if isinstance(codes, QuantCodes):
        return unpack_bits(codes.codes, codes.bits, codes.in_features)
    assert isinstance(codes, ShiftCodes)
    planes = [unpack_bits(plane, 1, codes.in_features) for plane in codes.signs]
    return torch.stack([plane << i for i, plane in enumerate(planes)]).sum(0)
