"""The order in which a column loop takes a weight's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LAZY_COLUMNS = 128


@dataclass(frozen=True)
class Span:
    """One group in processing order: its index in storage and its columns [start, end)."""

    group: int
    start: int
    end: int


def group_order(diagonal: Tensor, group: int, ordered: bool, unit: int = 1) -> tuple[Tensor, tuple[Span, ...]]:
    """Return the processing order of the columns, int64 [K], and the groups as spans of it.

    diagonal: of the Hessian, [K]; ordered: groups by the falling mean of it, and the columns of a group by falling
    entries; otherwise as stored. Groups stay whole, so the order costs nothing in storage. unit: so many columns that
    follow each other stay together and go by their mean.
    """
    inputs = diagonal.shape[0]
    pieces = [torch.arange(s, min(s + group, inputs)) for s in range(0, inputs, group)]
    order = list(range(len(pieces)))
    diagonal = diagonal.cpu()
    if ordered:
        means = torch.stack([diagonal[p].mean() for p in pieces])
        order = torch.argsort(means, descending=True, stable=True).tolist()
        pieces = [_by_units(p, diagonal[p], unit) for p in pieces]
    spans, start = [], 0
    for g in order:
        spans.append(Span(g, start, start + len(pieces[g])))
        start += len(pieces[g])
    return torch.cat([pieces[g] for g in order]), tuple(spans)


def _by_units(columns: Tensor, diagonal: Tensor, unit: int) -> Tensor:
    units = columns.unflatten(0, (-1, unit))
    order = torch.argsort(diagonal.unflatten(0, (-1, unit)).mean(1), descending=True, stable=True)
    ordered: Tensor = units[order].flatten()
    return ordered


def lazy_blocks(spans: tuple[Span, ...]) -> list[list[Span]]:
    """Return the spans in blocks of some columns, between which errors are pushed in one product."""
    blocks: list[list[Span]] = [[]]
    for span in spans:
        if blocks[-1] and blocks[-1][-1].end - blocks[-1][0].start >= _LAZY_COLUMNS:
            blocks.append([])
        blocks[-1].append(span)
    return blocks
