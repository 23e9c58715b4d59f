"""A weight trained as planes of signs, each of what the planes before it leave of one weight (RaBiT, OneBit)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from ir.ops.codes import part_types
from ir.ops.shiftcode import ShiftCodes, decode_scales, encode, rescaled
from passes.quantize.planes import residual_signs, signed
from passes.training.trained_codes import BASE, SCALES, straight

# Of scales that float16 holds.
_TINY, _MOST = 2.0**-24, 65504.0


@dataclass(frozen=True)
class Planes:
    """How many planes a weight has, how many inputs share their scales, and how these are stored.

    terms: powers of two that a stored scale is a sum of; 0 stores it as float16.
    """

    planes: int
    group: int
    terms: int = 0

    def stored_bytes(self, rows: int, inputs: int) -> int:
        """Return the bytes of a weight's signs and scales."""
        types = part_types(self.planes, rows, inputs, self.group, self.terms, offset=False).values()
        return sum(dtype.itemsize * prod(dims) for dtype, dims in types)


@dataclass(frozen=True, eq=False)
class TrainedPlanes:
    """A weight [N, K] that is sum_i scale_i * sign(what the planes before i leave of the base) in every step.

    base: float32 [N, K], trained; scales: [N, G, planes] at the start, positive, moved by factors. One weight makes
    all planes, since planes trained by themselves grow alike. Source: RaBiT (2602.05367); OneBit (2402.11295) with one.
    """

    base: Tensor
    form: Planes
    scales: Tensor

    def start(self) -> dict[str, Tensor]:
        """Return the state under which the weight is the base in planes."""
        return {SCALES: torch.zeros_like(self.scales), BASE: self.base}

    def bound(self, state: Mapping[str, Tensor]) -> BoundPlanes:
        """Return the weight under a state, to multiply by."""
        return BoundPlanes(state[BASE], self._stored_scales(state), self.form)

    def stored(self, state: Mapping[str, Tensor]) -> ShiftCodes:
        """Return the weight under a state as it is stored: the planes that `BoundPlanes.linear` multiplies by."""
        with torch.no_grad():
            bound, form = self.bound(state), self.form
            signs = torch.stack([s.flatten(1) for s in bound.signs()])
            return encode(signs, bound.scales, None, form.group, form.terms)

    def settled(self, state: Mapping[str, Tensor], **how: Any) -> TrainedPlanes:
        """Return the weight and its scales under a state as the start of other training."""
        del how
        with torch.no_grad():
            return replace(self, base=state[BASE], scales=self._stored_scales(state))

    def _stored_scales(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return scales [N, G, planes] as they are stored, with the gradients of what they were."""
        scales = self.scales * state[SCALES].exp()
        with torch.no_grad():
            if self.form.terms == 0:
                found = scales.clamp(_TINY, _MOST).half().to(scales.dtype)
            else:
                (rows, inputs), form = self.base.shape, self.form
                signs = torch.empty(form.planes, rows, 0, dtype=torch.uint8)
                shell = ShiftCodes(signs, signs, None, None, form.group, form.terms, inputs)
                found = decode_scales(rescaled(shell, scales, None), scales.dtype)
        return straight(scales, found)


@dataclass(frozen=True, eq=False)
class BoundPlanes:
    """Such a weight under a state: its base [N, K] and its scales [N, G, planes]."""

    base: Tensor
    scales: Tensor
    form: Planes

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias, W the weight that would be stored."""
        y: Tensor = PlanesLinear.apply(x, self.base, self.scales, bias, self.form.group)
        return y

    def signs(self) -> list[Tensor]:
        """Return the planes, bool [N, G, group] each."""
        return residual_signs(self.base.unflatten(1, (-1, self.form.group)), self.scales)

    def dense(self) -> Tensor:
        """Return the weight [N, K]."""
        return _dense(self.signs(), self.scales)


def _dense(signs: list[Tensor], scales: Tensor) -> Tensor:
    """Return the sum of planes [N, K], rounded once: of two float32 products the sum rounds as the exact one."""
    wide = scales.double() if len(signs) > 2 else scales
    parts = [signed(s, scale) for s, scale in zip(signs, wide.unbind(-1), strict=True)]
    return sum(parts[1:], parts[0]).to(scales.dtype).flatten(1)


class PlanesLinear(Function):
    """x W^T + bias with W the planes of a weight; of its size only that weight is kept for the way back.

    Signs pass gradients straight through to the weight they are of, and a scale gets the sum of its plane's (RaBiT,
    2602.05367).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.save_for_backward(x, base, scales)
        signs = residual_signs(base.unflatten(1, (-1, group)), scales)
        return functional.linear(x, _dense(signs, scales), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, base, scales = ctx.saved_tensors
        signs = residual_signs(base.unflatten(1, (-1, ctx.group)), scales)
        rows = grads[0].flatten(0, -2)
        into_x = grads[0] @ _dense(signs, scales) if ctx.needs_input_grad[0] else None
        slope = rows.T @ x.flatten(0, -2)
        parts = slope.unflatten(1, (-1, ctx.group))
        into_scales = torch.stack([torch.where(s, parts, -parts).sum(-1) for s in signs], -1)
        return into_x, slope, into_scales, rows.sum(0) if ctx.has_bias else None, None
