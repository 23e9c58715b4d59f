"""Weighted binary coding of one column group for all rows at once: w ~ z + sum_i alpha_i b_i, b in {-1,+1}.

A code is an integer whose bit i is plane i (1 = +1). Rows are independent and all arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ir.ops.shiftcode import OFFSET_OCTAVES, SCALE_OCTAVES, leading_exponent, round_power_terms

_RIDGE = 1e-10
_COUNTED_MIDDLES = 15
# Steps of a uniform start as multiples of the group's rms, around the Lloyd-Max step of a Gaussian for 1..4 bits.
_STEPS = {1: (1.6,), 2: (0.8, 1.0, 1.25), 3: (0.45, 0.6, 0.8), 4: (0.26, 0.34, 0.48)}


@dataclass(frozen=True)
class Window:
    """The leading exponents a row may store: the highest of its scales and of its offsets, int32 [R, 1] each."""

    scale_high: Tensor
    offset_high: Tensor

    def take(self, rows: Tensor) -> Window:
        """Return the window of the selected rows."""
        return Window(self.scale_high[rows], self.offset_high[rows])


@dataclass(frozen=True)
class Rounding:
    """How scales and offsets are rounded: `terms` powers of two inside each row's window; without one, unbounded."""

    terms: int
    window: Window | None = None

    def scale(self, x: Tensor) -> Tensor:
        """Round scales [R, m] to what a row can store."""
        if self.window is None:
            return round_power_terms(x, self.terms)
        high = self.window.scale_high
        return round_power_terms(x, self.terms, high - (SCALE_OCTAVES - 1), high)

    def offset(self, x: Tensor) -> Tensor:
        """Round offsets [R, m] to what a row can store."""
        if self.window is None:
            return round_power_terms(x, self.terms)
        high = self.window.offset_high
        return round_power_terms(x, self.terms, high - (OFFSET_OCTAVES - 1), high)

    def take(self, rows: Tensor) -> Rounding:
        """Return the rounding of the selected rows."""
        return Rounding(self.terms, None if self.window is None else self.window.take(rows))


@dataclass(frozen=True)
class BcqFit:
    """A fit of R rows: alpha [R, planes] >= 0, z [R] and weighted loss [R] in float64, codes int64 [R, n]."""

    alpha: Tensor
    codes: Tensor
    z: Tensor
    loss: Tensor

    @property
    def values(self) -> Tensor:
        """The coded weights, float64 [R, n]."""
        return code_levels(self.alpha, self.z).gather(1, self.codes)

    @property
    def signs(self) -> Tensor:
        """The planes, bool [planes, R, n], True for +1."""
        return code_planes(self.codes, self.alpha.shape[1])


@lru_cache(maxsize=16)
def pattern(planes: int, device: str) -> Tensor:
    """Return the design of every code, float64 [2**planes, planes+1]: a one for the offset, then the signs."""
    code = torch.arange(2**planes, device=device)[:, None]
    signs = (code >> torch.arange(planes, device=device) & 1) * 2 - 1
    return torch.cat([torch.ones_like(code), signs], 1).double()


def code_levels(alpha: Tensor, z: Tensor) -> Tensor:
    """Return the value of every code, [R, 2**planes]; exact when alpha and z are power-of-two sums."""
    levels = z[:, None]
    for i in range(alpha.shape[1]):
        step = alpha[:, i : i + 1]
        levels = torch.cat([levels - step, levels + step], 1)
    return levels


def code_planes(codes: Tensor, planes: int) -> Tensor:
    """Return the signs of integer codes [...] as bool [planes, ...], True for +1."""
    return torch.stack([(codes >> i & 1).bool() for i in range(planes)])


@dataclass(frozen=True)
class Codebook:
    """Sorted levels of R rows: levels [R, 2**planes] ascending, middles between them, the code of each sorted level."""

    levels: Tensor
    middles: Tensor
    order: Tensor


def codebook(alpha: Tensor, z: Tensor) -> Codebook:
    """Sort each row's levels so that the nearest one is found by counting middles; ties go to the lower level."""
    levels, order = code_levels(alpha, z).sort(dim=1, stable=True)
    return Codebook(levels, (levels[:, 1:] + levels[:, :-1]) / 2, order)


def nearest_codes(book: Codebook, w: Tensor) -> Tensor:
    """Return the code of the nearest level for each weight, int64 [R, n] (the B-step of alternating binary coding)."""
    if book.middles.shape[1] > _COUNTED_MIDDLES:
        return book.order.gather(1, torch.searchsorted(book.middles, w))
    # Counting the middles below each weight gives the same index as the search and is several times faster.
    below = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    for middle in book.middles.unbind(1):
        below += (w > middle[:, None]).view(torch.uint8)
    return book.order.gather(1, below.long())


def solve_rounded(normal: Tensor, right: Tensor, rounding: Rounding | None, offset: bool) -> tuple[Tensor, Tensor]:
    """Solve normal @ (z, alpha) = right for every row, rounding each unknown before the ones after it are solved.

    normal: [R, q+1, q+1] symmetric, right: [R, q+1]; returns z [R] and alpha [R, q] (any sign). Elimination runs from
    the last unknown up, so each unknown is the optimum given those already rounded and free later ones: GPTQ's error
    feedback (Frantar et al. 2023) on the scale vector. Without rounding it is the exact solution.
    """
    skip = 0 if offset else 1
    m, b = normal[:, skip:, skip:].clone(), right[:, skip:].clone()
    size = m.shape[1]
    m.diagonal(dim1=1, dim2=2).add_(_RIDGE * m.diagonal(dim1=1, dim2=2).amax(1, keepdim=True) + 1e-300)
    for p in range(size - 1, 0, -1):
        factor = m[:, :p, p] / m[:, p, p, None]
        b[:, :p] -= factor * b[:, p, None]
        m[:, :p, :p] -= factor[:, :, None] * m[:, p, None, :p]
    solved: list[Tensor] = []
    for t in range(size):
        x = b[:, t]
        for s, done in enumerate(solved):
            x = x - m[:, t, s] * done[:, 0]
        x = (x / m[:, t, t])[:, None]
        if rounding is not None:
            x = rounding.offset(x) if t == 0 and offset else rounding.scale(x)
        solved.append(x)
    z = solved[0][:, 0] if offset else torch.zeros_like(b[:, 0])
    return z, torch.cat(solved[1 - skip :], 1)


def cell_normal(codes: Tensor, w: Tensor, weight: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Return the weighted normal equations [R, q+1, q+1], [R, q+1] of fixed codes, by mass and moment per code."""
    design = pattern(planes, str(w.device))
    mass = w.new_zeros(w.shape[0], 2**planes).scatter_add_(1, codes, weight)
    moment = w.new_zeros(w.shape[0], 2**planes).scatter_add_(1, codes, weight * w)
    outer = (design[:, :, None] * design[:, None, :]).flatten(1)
    return (mass @ outer).unflatten(1, (planes + 1, planes + 1)), moment @ design


def greedy_start(w: Tensor, weight: Tensor, planes: int, offset: bool) -> tuple[Tensor, Tensor]:
    """Return alpha [R, planes], z [R] of residual greedy coding, each scale the mean |residual|."""
    total = weight.sum(1, keepdim=True) + 1e-300
    z = (weight * w).sum(1, keepdim=True) / total if offset else torch.zeros_like(total)
    residual, scales = w - z, []
    for _ in range(planes):
        step = (weight * residual.abs()).sum(1, keepdim=True) / total
        residual = residual - torch.where(residual >= 0, step, -step)
        scales.append(step)
    return torch.cat(scales, 1), z[:, 0]


def _starts(w: Tensor, weight: Tensor, planes: int, offset: bool, count: int) -> tuple[Tensor, Tensor]:
    """Return the starts stacked along the rows, [count*R, planes] and [count*R]: greedy, then uniform codebooks."""
    alpha, z = greedy_start(w, weight, planes, offset)
    spread = (weight * (w - z[:, None]) ** 2).sum(1, keepdim=True) / (weight.sum(1, keepdim=True) + 1e-300)
    ladder = 2.0 ** torch.arange(planes - 2, -2, -1, dtype=w.dtype, device=w.device)
    steps = _STEPS.get(planes, (3.0 / 2**planes, 4.0 / 2**planes, 6.0 / 2**planes))
    alphas = [alpha] + [spread.sqrt() * step * ladder for step in steps[: count - 1]]
    return torch.cat(alphas), z.repeat(len(alphas))


def fit_bcq(
    w: Tensor,
    planes: int,
    weight: Tensor | None = None,
    *,
    offset: bool = False,
    rounding: Rounding | None = None,
    rounds: int = 10,
    starts: int = 1,
) -> BcqFit:
    """Fit planes, scales and an offset to each row by alternating least squares and nearest-level coding.

    w: [R, n]; weight: [n] or [R, n] >= 0, the importance of each column, default 1; rounding: power-of-two rounding of
    the scales inside every round, None keeps real scales; rounds: alternations at most, a row stops when its codes
    repeat; starts: greedy plus uniform codebooks. The best iterate of each row over all starts is returned
    (ShiftAddLLM, arXiv 2406.05981, Alg. 1, with importance weights, exact solves and keep-best).
    """
    w = w.double().contiguous()
    weight = torch.ones_like(w) if weight is None else weight.double().expand_as(w).contiguous()
    alpha, z = _starts(w, weight, planes, offset, starts)
    copies = alpha.shape[0] // w.shape[0]
    w_all, weight_all = w.repeat(copies, 1), weight.repeat(copies, 1)
    many = None
    if rounding is not None:
        many = rounding.take(torch.arange(w.shape[0], device=w.device).repeat(copies))
        alpha, z = many.scale(alpha), many.offset(z[:, None])[:, 0]
    fit = _alternate(w_all, weight_all, alpha, z, many, offset, rounds)
    if copies == 1:
        return fit
    pick = fit.loss.unflatten(0, (copies, -1)).argmin(0) * w.shape[0] + torch.arange(w.shape[0], device=w.device)
    return BcqFit(fit.alpha[pick], fit.codes[pick], fit.z[pick], fit.loss[pick])


def weighted_loss(w: Tensor, weight: Tensor, alpha: Tensor, z: Tensor, codes: Tensor) -> Tensor:
    """Return sum_k weight_k (w_k - level(code_k))**2 for each row, [R]."""
    return (weight * (w - code_levels(alpha, z).gather(1, codes)) ** 2).sum(1)


def _alternate(
    w: Tensor, weight: Tensor, alpha: Tensor, z: Tensor, rounding: Rounding | None, offset: bool, rounds: int
) -> BcqFit:
    """Alternate scales and codes from a start, keep each row's best iterate and drop rows whose codes stop changing."""
    planes = alpha.shape[1]
    codes = nearest_codes(codebook(alpha, z), w)
    loss = weighted_loss(w, weight, alpha, z, codes)
    best = [alpha.clone(), codes.clone(), z.clone(), loss.clone()]
    rows = torch.arange(w.shape[0], device=w.device)
    for _ in range(rounds):
        z, alpha = solve_rounded(*cell_normal(codes, w, weight, planes), rounding, offset)
        alpha = alpha.abs().sort(dim=1, descending=True).values
        fresh = nearest_codes(codebook(alpha, z), w)
        loss = weighted_loss(w, weight, alpha, z, fresh)
        better = loss < best[3][rows]
        for kept, new in zip(best, (alpha, fresh, z, loss), strict=True):
            kept[rows[better]] = new[better]
        moving = (fresh != codes).any(1)
        if not bool(moving.any()):
            break
        codes = fresh
        # Compacting costs a copy, so it waits until a quarter of the rows has settled.
        if int(moving.sum()) * 4 < 3 * moving.numel():
            rows, w, weight, codes = rows[moving], w[moving], weight[moving], codes[moving]
            rounding = None if rounding is None else rounding.take(moving)
    return BcqFit(best[0], best[1], best[2], best[3])


def row_window(weight: Tensor, terms: int) -> Window:
    """Return the exponent window of each row, set before solving so that every group rounds as it will be stored.

    weight: [N, K]. Scales may lead up to 4 times the row's largest weight (error compensation makes weights grow);
    offsets up to 4 times the mean |w|, because their code reaches only 6 octaves down.
    """
    w = weight.double().abs()
    peak = leading_exponent(w.amax(1, keepdim=True), 1) + 2
    return Window(peak, leading_exponent(w.mean(1, keepdim=True), 1) + 1)
