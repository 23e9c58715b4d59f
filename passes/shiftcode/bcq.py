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


def nearest_place(middles: Tensor, w: Tensor, out: Tensor) -> None:
    """Write the place of the nearest sorted level, int64 [R], for a weight a row [R]; middles: [levels-1, R]."""
    if middles.shape[0] > _COUNTED_MIDDLES:
        out.copy_(torch.searchsorted(middles.T.contiguous(), w[:, None])[:, 0])
    else:
        out.copy_((w > middles).view(torch.uint8).sum(0, dtype=torch.uint8))


def solve_rounded(normal: Tensor, right: Tensor, rounding: Rounding | None, offset: bool) -> tuple[Tensor, Tensor]:
    """Solve normal @ (z, alpha) = right for every row, rounding each unknown before the ones after it are solved.

    normal: [R, q+1, q+1] symmetric, right: [R, q+1]; returns z [R] and alpha [R, q] (any sign). Elimination runs from
    the last unknown up, so each unknown is the optimum given those already rounded and free later ones: GPTQ's error
    feedback (Frantar et al. 2023) on the scale vector. Without rounding it is the exact solution.
    """
    skip = 0 if offset else 1
    # Unknowns first, so that every step runs over contiguous rows.
    m = normal[:, skip:, skip:].permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    b = right[:, skip:].T.clone(memory_format=torch.contiguous_format)
    size = m.shape[0]
    m.diagonal().add_((_RIDGE * m.diagonal().amax(1) + 1e-300)[:, None])
    for p in range(size - 1, 0, -1):
        factor = m[:p, p] / m[p, p]
        b[:p] -= factor * b[p]
        m[:p, :p] -= factor[:, None] * m[p, None, :p]
    solved: list[Tensor] = []
    for t in range(size):
        x = b[t]
        for s, done in enumerate(solved):
            x = x - m[t, s] * done[:, 0]
        x = (x / m[t, t])[:, None]
        if rounding is not None:
            x = rounding.offset(x) if t == 0 and offset else rounding.scale(x)
        solved.append(x)
    z = solved[0][:, 0] if offset else torch.zeros_like(b[0])
    return z, torch.cat(solved[1 - skip :], 1)


@dataclass(frozen=True)
class SortedRows:
    """Rows of a group in ascending order with running sums, so that what falls into a cell is a difference of two.

    values: [R, n] ascending; mass, moment: [R, n+1], sums of weight and of weight * value before each place; square:
    [R], the sum of weight * value**2.
    """

    values: Tensor
    mass: Tensor
    moment: Tensor
    square: Tensor

    def take(self, rows: Tensor) -> SortedRows:
        """Return the selected rows."""
        return SortedRows(self.values[rows], self.mass[rows], self.moment[rows], self.square[rows])


def sorted_rows(w: Tensor, weight: Tensor) -> SortedRows:
    """Sort rows w [R, n] with their weights [R, n]."""
    values, order = w.sort(dim=1)
    weight = weight.gather(1, order)
    moment = weight * values
    before = [torch.nn.functional.pad(x.cumsum(1), (1, 0)) for x in (weight, moment)]
    return SortedRows(values, before[0], before[1], (moment * values).sum(1))


@dataclass(frozen=True)
class Cells:
    """What falls nearest to each code: sums of weight and of weight * value, float64 [R, 2**planes] each."""

    mass: Tensor
    moment: Tensor

    def take(self, rows: Tensor) -> Cells:
        """Return the cells of the selected rows."""
        return Cells(self.mass[rows], self.moment[rows])


def nearest_cells(rows: SortedRows, book: Codebook) -> Cells:
    """Return the cells of the nearest levels, as `nearest_codes` would assign them, without visiting every weight."""
    cuts = torch.searchsorted(rows.values, book.middles, right=True)
    cuts = torch.nn.functional.pad(cuts, (1, 0))
    last = torch.full_like(cuts[:, :1], rows.values.shape[1])
    cuts = torch.cat([cuts, last], 1)
    return Cells(
        *(
            torch.empty_like(book.levels).scatter_(1, book.order, x.gather(1, cuts).diff(dim=1))
            for x in (rows.mass, rows.moment)
        )
    )


def code_cells(codes: Tensor, w: Tensor, weight: Tensor, planes: int) -> Cells:
    """Return the cells of given codes [R, n]."""
    empty = w.new_zeros(w.shape[0], 2**planes)
    return Cells(empty.scatter_add(1, codes, weight), empty.scatter_add(1, codes, weight * w))


def cell_normal(cells: Cells) -> tuple[Tensor, Tensor]:
    """Return the weighted normal equations [R, q+1, q+1], [R, q+1] of fixed codes."""
    planes = cells.mass.shape[1].bit_length() - 1
    design = pattern(planes, str(cells.mass.device))
    outer = (design[:, :, None] * design[:, None, :]).flatten(1)
    return (cells.mass @ outer).unflatten(1, (planes + 1, planes + 1)), cells.moment @ design


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
    many = torch.arange(w.shape[0], device=w.device).repeat(copies)
    each = None if rounding is None else rounding.take(many)
    if each is not None:
        alpha, z = each.scale(alpha), each.offset(z[:, None])[:, 0]
    alpha, z, loss = _alternate(sorted_rows(w, weight).take(many), alpha, z, each, offset, rounds)
    pick = loss.unflatten(0, (copies, -1)).argmin(0) * w.shape[0] + many[: w.shape[0]]
    alpha, z = alpha[pick], z[pick]
    codes = nearest_codes(codebook(alpha, z), w)
    return BcqFit(alpha, codes, z, weighted_loss(w, weight, alpha, z, codes))


def weighted_loss(w: Tensor, weight: Tensor, alpha: Tensor, z: Tensor, codes: Tensor) -> Tensor:
    """Return sum_k weight_k (w_k - level(code_k))**2 for each row, [R]."""
    return (weight * (w - code_levels(alpha, z).gather(1, codes)) ** 2).sum(1)


def _alternate(
    rows: SortedRows, alpha: Tensor, z: Tensor, rounding: Rounding | None, offset: bool, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Alternate scales and codes from a start; return each row's best alpha, z and loss.

    Rows whose cells stop changing are dropped.
    """
    cells = nearest_cells(rows, codebook(alpha, z))
    best = [alpha.clone(), z.clone(), _cell_loss(rows, cells, alpha, z)]
    index = torch.arange(alpha.shape[0], device=alpha.device)
    for _ in range(rounds):
        z, alpha = solve_rounded(*cell_normal(cells), rounding, offset)
        alpha = alpha.abs().sort(dim=1, descending=True).values
        fresh = nearest_cells(rows, codebook(alpha, z))
        loss = _cell_loss(rows, fresh, alpha, z)
        better = loss < best[2][index]
        for kept, new in zip(best, (alpha, z, loss), strict=True):
            kept[index[better]] = new[better]
        moving = (fresh.mass != cells.mass).any(1) | (fresh.moment != cells.moment).any(1)
        if not bool(moving.any()):
            break
        cells = fresh
        # Compacting costs a copy, so it waits until a quarter of the rows has settled.
        if int(moving.sum()) * 4 < 3 * moving.numel():
            index, rows, cells = index[moving], rows.take(moving), cells.take(moving)
            rounding = None if rounding is None else rounding.take(moving)
    return best[0], best[1], best[2]


def _cell_loss(rows: SortedRows, cells: Cells, alpha: Tensor, z: Tensor) -> Tensor:
    """Return the weighted loss of each row from its cells, [R]; exact up to rounding relative to the row's square."""
    levels = code_levels(alpha, z)
    return rows.square + ((cells.mass * levels - 2 * cells.moment) * levels).sum(1)


def row_window(weight: Tensor, terms: int) -> Window:
    """Return the exponent window of each row, set before solving so that every group rounds as it will be stored.

    weight: [N, K]. Scales may lead up to 4 times the row's largest weight (error compensation makes weights grow);
    offsets up to 4 times the mean |w|, because their code reaches only 6 octaves down.
    """
    w = weight.double().abs()
    peak = leading_exponent(w.amax(1, keepdim=True), 1) + 2
    return Window(peak, leading_exponent(w.mean(1, keepdim=True), 1) + 1)
