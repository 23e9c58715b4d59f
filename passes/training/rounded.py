"""Linear maps by weights that are rounded in every step, with L4Q's gradients and no second weight in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from ir.ops.nm import gather_kept, scatter_kept
from ir.products import products_in

Domain = Literal["weight", "code"]


@dataclass(frozen=True)
class Merged:
    """What is rounded: base + factor * up @ down, by groups of inputs to codes 0 to `top`.

    domain: `weight` takes the sum for the weight; `code` for its place among the levels, so that codes do not depend on
    the scales (LR-QAT, 2406.06385, eq. 5). kept: bool [N, K], as many inputs in every row, where only these are rounded
    and the others are zero; groups are of kept ones then, and K below counts them where codes are meant.
    """

    group: int
    top: int
    factor: float
    domain: Domain = "weight"
    kept: Tensor | None = None

    def gathered(self, whole: Tensor) -> Tensor:
        """Return what is kept of [N, K], by groups [N, G, group]."""
        parts: Tensor = (whole if self.kept is None else gather_kept(whole, self.kept)).unflatten(1, (-1, self.group))
        return parts

    def spread(self, parts: Tensor) -> Tensor:
        """Return groups in their places, [N, K], with zeros elsewhere."""
        flat = parts.flatten(1)
        return flat if self.kept is None else scatter_kept(flat, self.kept)

    def places(
        self, base: Tensor, down: Tensor | None, up: Tensor | None, scales: Tensor, centers: Tensor, offsets: Tensor
    ) -> Tensor:
        """Return where weights lie among the levels, [N, G, group], code u being at u.

        base: [N, K]; down: [r, K] and up: [N, r], or None; scales, centers, offsets: [N, G], level u being worth scale
        * (u - center) + offset. The sum is taken in float32 or wider whatever products are taken in, since codes that
        are stored must be those that were trained.
        """
        with products_in("float32"):
            whole = base if down is None or up is None else torch.addmm(base, up, down, alpha=self.factor)
        parts = self.gathered(whole)
        if self.domain == "code":
            return parts
        # A scale that was too small to be stored has one level.
        steps = scales.where(scales > 0, torch.inf)
        return parts.sub(offsets[..., None]).div_(steps[..., None]).add_(centers[..., None])

    def codes(self, places: Tensor) -> Tensor:
        """Return the nearest codes, uint8 [N, G, group]."""
        return places.clamp(0, self.top).round_().to(torch.uint8)


def levels(codes: Tensor, scales: Tensor, centers: Tensor, offsets: Tensor, wide: bool) -> Tensor:
    """Return what codes [N, G, group] stand for, rounded once to the scales' dtype.

    wide: the product of a scale and a code is not exact there, and is taken in float64.
    """
    dtype = torch.float64 if wide else scales.dtype
    parts = codes.to(dtype).sub_(centers.to(dtype)[..., None]).mul_(scales.to(dtype)[..., None])
    return parts.add_(offsets.to(dtype)[..., None]).to(scales.dtype)


class RoundedLinear(Function):
    """x W^T + bias with W on the levels nearest to a merged weight; L4Q (2402.04902, section 3.3, appendix A).

    Of a weight's size, only what is there anyway is kept for the way back: the base. Codes are found again, from the
    places of weights among their levels that gradients need as well, unless the caller keeps them. Rounding passes
    gradients straight through, clipped weights get none; scales get `code - place` inside the range and the clipped
    level outside (LSQ, 1902.08153, eq. 3), offsets and centers what clipping lets through.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        down: Tensor | None,
        up: Tensor | None,
        scales: Tensor,
        centers: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        merged: Merged,
        kept: Callable[[], Tensor | None],
        wide: bool,
    ) -> Tensor:
        """Return the product; kept: gives the codes [N, G, group], or None where they are to be found."""
        ctx.merged, ctx.kept, ctx.wide, ctx.has_bias = merged, kept, wide, bias is not None
        ctx.save_for_backward(x, base, down, up, scales, centers, offsets)
        codes = kept()
        if codes is None:
            codes = merged.codes(merged.places(base, down, up, scales, centers, offsets))
        return functional.linear(x, merged.spread(levels(codes, scales, centers, offsets, wide)), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, base, down, up, scales, centers, offsets = ctx.saved_tensors
        merged: Merged = ctx.merged
        places = merged.places(base, down, up, scales, centers, offsets)
        known, rows = ctx.kept(), grads[0].flatten(0, -2)
        codes = merged.codes(places) if known is None else known
        weight = merged.spread(levels(codes, scales, centers, offsets, ctx.wide))
        into_x = grads[0] @ weight if ctx.needs_input_grad[0] else None
        into_bias = rows.sum(0) if ctx.has_bias else None
        slope = merged.gathered(rows.T @ x.flatten(0, -2))
        outside = (places < 0) | (places > merged.top)
        worth = codes.to(slope.dtype).sub_(centers[..., None])
        if merged.domain == "weight":
            worth -= places.sub_(centers[..., None]).masked_fill_(outside, 0.0)
        into_scales = (slope * worth).sum(-1)
        # Levels move with offsets and centers, and codes the other way where they follow.
        left = (slope * outside).sum(-1) if merged.domain == "weight" else slope.sum(-1)
        into_base = slope.masked_fill_(outside, 0.0)
        if merged.domain == "code":
            into_base *= scales[..., None]
        into_base = merged.spread(into_base)
        into_down = merged.factor * up.T @ into_base if up is not None else None
        into_up = merged.factor * into_base @ down.T if down is not None else None
        needed = into_base if ctx.needs_input_grad[1] else None
        return into_x, needed, into_down, into_up, into_scales, -scales * left, left, into_bias, None, None, None
