"""Fitting one column group: all its tiles at once, matrix products in torch, what goes column by column compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from passes.shiftcode import kernels
from passes.shiftcode.threads import side_by_side
from passes.shiftcode.tiles import Tiles, code_levels, levels_of

# Columns that compiled loops take at once; what they mean for those of later chunks is one product.
_CHUNK = 128
# What one core works on at once, at least: enough that calls and taking turns between cores do not count.
_WEIGHTS, _ROWS = 1 << 17, 128


@dataclass(frozen=True, eq=False)
class Fit:
    """What was found for one group: unknowns float64 [T, S+1], offset first; codes u8 [N, n]; error float64 [N, n].

    error: (targets - levels) @ factor, whose squares sum to the loss and which later columns compensate.
    """

    unknowns: Tensor
    codes: Tensor
    error: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """The targets w float64 [N, n] of some tiles under metric = factor @ factor.T, upper = factor^-1; prefix u8 [N, n].

    prefix: the low bits of the codes, which stay where planes are frozen.
    """

    w: Tensor
    upper: Tensor
    factor: Tensor
    metric: Tensor
    prefix: Tensor
    tiles: Tiles

    @cached_property
    def through(self) -> Tensor:
        """The targets through the factor, [N, n]: their squares sum to the loss of weights of zero."""
        return self.w @ self.factor


def fit_tiles(
    w: Tensor, upper: Tensor, factor: Tensor, tiles: Tiles, given: tuple[Tensor, Tensor] | None = None
) -> Fit:
    """Fit targets w [N, n] under the metric factor @ factor.T with upper = factor^-1, both upper triangular.

    given: unknowns and codes to improve instead of fitting anew; with frozen planes the codes' low bits stay. After the
    first fit, `iterations` of scale solve and walk alternate (BPDQ, 2602.04163), then `polish` rounds of scale solve
    and coordinate descent on the codes. Each tile keeps its best state throughout.
    """
    metric, step = factor @ factor.T, tiles.spec.row_group
    size = max(1, max(_ROWS, _WEIGHTS // w.shape[1]) // step)

    def fit(piece: int) -> Fit:
        first, last = piece * size, (piece + 1) * size
        part = slice(first * step, last * step)
        codes = torch.zeros(w[part].shape, dtype=torch.uint8) if given is None else given[1][part].contiguous()
        prefix = codes & ((1 << tiles.frozen) - 1)
        group = Group(w[part].contiguous(), upper, factor, metric, prefix, tiles.some(first, last))
        best = _first(group) if given is None else _state(group, given[0][first:last].contiguous(), codes)
        return _polished(group, _iterated(group, best))

    found = side_by_side(-(-tiles.count // size), fit)
    return Fit(*(torch.cat(parts) for parts in zip(*((f.unknowns, f.codes, f.error) for f in found), strict=True)))


def _first(group: Group) -> Fit:
    """Fit scales to the targets alone, each column with its importance, and walk."""
    diagonal, spec = group.upper.diagonal(), group.tiles.spec
    importance = 1.0 / diagonal.square() if spec.weighted else torch.ones_like(diagonal)
    unknowns = group.w.new_zeros(group.tiles.count, group.tiles.scales + 1)
    task = (group.w, spec.row_group, importance, group.tiles.limits, group.tiles.how(), unknowns)
    _run(kernels.fit_scales, group.tiles.count, *task)
    return _walked(group, unknowns)


def _iterated(group: Group, best: Fit) -> Fit:
    """Alternate scale solve and walk; the walk goes on from solved scales whether or not they were better."""
    now = best
    for _ in range(group.tiles.spec.iterations):
        now = solved_scales(group, now.codes)
        best = _better(group, best, now)
        last, now = now, _walked(group, now.unknowns)
        best = _better(group, best, now)
        if torch.equal(last.codes, now.codes):
            break
    return best


def _polished(group: Group, best: Fit) -> Fit:
    """Alternate scale solve and coordinate descent, each from the best so far."""
    for _ in range(group.tiles.spec.polish):
        start = _better(group, best, solved_scales(group, best.codes))
        now = _better(group, start, _descended(group, start))
        if now is best:
            break
        best = now
    return best


def _walked(group: Group, unknowns: Tensor) -> Fit:
    """Code the columns in turn with given scales, each error pushed into the later ones."""
    rest, book = group.w.T.contiguous(), _book(group, unknowns)
    codes, error = torch.empty(rest.shape, dtype=torch.uint8), torch.empty_like(rest)
    for c in _chunks(len(rest)):
        upper = group.upper[c, c].contiguous()
        _run(kernels.walk, rest.shape[1], rest[c], upper, _of_columns(book, c), codes[c], error[c])
        rest[c.stop :] -= group.upper[c, c.stop :].T @ error[c]
    return Fit(unknowns, codes.T.contiguous(), error.T.contiguous())


def _descended(group: Group, fit: Fit) -> Fit:
    """Improve the codes of a fit one by one, its scales as they are."""
    slope, codes, book = -(group.factor @ fit.error.T), fit.codes.T.contiguous(), _book(group, fit.unknowns)
    change = levels_of(fit.unknowns, fit.codes, group.tiles).T.contiguous()
    for c in _chunks(len(slope)):
        metric = group.metric[c, c].contiguous()
        _run(kernels.descend, slope.shape[1], slope[c], metric, _of_columns(book, c), codes[c], change[c])
        slope[c.stop :] += group.metric[c, c.stop :].T @ change[c]
    return _state(group, fit.unknowns, codes.T.contiguous())


def _book(group: Group, unknowns: Tensor) -> kernels.Book:
    """Return the values of all codes, for each row."""
    plain = group.tiles.rows(code_levels(unknowns, group.tiles), len(group.w))
    levels, order = torch.sort(plain, dim=1, stable=True)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    parts = [part.T.contiguous().numpy() for part in (levels, order.to(torch.uint8), middles, plain, group.prefix)]
    return kernels.Book(parts[0], parts[1], parts[2], parts[3], parts[4], group.tiles.frozen)


def _of_columns(book: kernels.Book, columns: slice) -> kernels.Book:
    return book._replace(prefix=book.prefix[columns])


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def solved_scales(group: Group, codes: Tensor) -> Fit:
    """Solve scales and offsets of tiles for fixed codes in their group's metric.

    With E = (W - Q) factor the loss is the sum of E**2, what the errors cost once all later columns have compensated
    them (BPDQ, 2602.04163: scale solve and delta correction).
    """
    tiles, (rows, n) = group.tiles, codes.shape
    design = torch.from_numpy(tiles.design.matrix).T
    known = tiles.scales + 1
    # The ones and the design columns through the factor, and the targets last.
    columns = group.w.new_zeros(known + 1, tiles.count * tiles.spec.row_group, n)
    columns[0, :rows] = group.factor.sum(0) if tiles.spec.offset else 0.0
    columns[1:known, :rows] = design[:, codes.long()] @ group.factor
    columns[known, :rows] = group.through
    by_tile = columns.view(known + 1, tiles.count, -1).transpose(0, 1)
    products = by_tile @ by_tile.transpose(1, 2)
    normal, right = products[:, :known, :known].contiguous(), products[:, :known, known].contiguous()
    unknowns = torch.zeros_like(right)
    _run(kernels.solve_scales, tiles.count, normal, right, tiles.limits, tiles.how(), unknowns)
    taken = columns[known, :rows] - torch.einsum("snk,ns->nk", columns[:known, :rows], tiles.rows(unknowns, rows))
    return Fit(unknowns, codes, taken)


def _state(group: Group, unknowns: Tensor, codes: Tensor) -> Fit:
    return Fit(unknowns, codes, (group.w - levels_of(unknowns, codes, group.tiles)) @ group.factor)


def _better(group: Group, best: Fit, now: Fit) -> Fit:
    """Return each tile from the fit with the lower loss; `best` itself where none is better by more than rounding."""
    losses = [group.tiles.sums(fit.error.square().sum(1)) for fit in (best, now)]
    better = losses[1] < losses[0] * (1 - 1e-12)
    if not bool(better.any()):
        return best
    rows = group.tiles.rows(better[:, None], best.codes.shape[0])
    return Fit(
        torch.where(better[:, None], now.unknowns, best.unknowns),
        torch.where(rows, now.codes, best.codes),
        torch.where(rows, now.error, best.error),
    )


def _run(loop: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run a compiled loop over `count` tiles or rows; tensors are handed over without a copy."""
    loop(0, count, *[a.numpy() if isinstance(a, Tensor) else a for a in arguments])
