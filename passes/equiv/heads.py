"""Which rows make up each head's values and which columns read it: where a rotation passes through attention.

Attention averages values over positions and mixes no channels, so a rotation of a head's values can be undone in the
weight that reads them (QuaRot, 2404.00456, section 4). Unlike a scale, it needs all channels of a head side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ir.analysis import between
from ir.program import Program, is_call
from passes.equiv.attention import FUSED, Attention, attentions
from passes.equiv.producers import ancestry, bias_of, channels_of, seeding
from passes.equiv.rules import RULES
from passes.equiv.walk import UNSCALED, Blocked, Walk

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class HeadChannels:
    """Channels of one linear, head by head.

    channels: i64[n, d], rows or columns of the linear, a line for each time a head occurs, in the head's own order;
    heads: i64[n], which of the attention's value heads each line is.
    """

    node: fx.Node
    channels: Tensor
    heads: Tensor


@dataclass(frozen=True, eq=False)
class ValueHeads:
    """The `count` heads of `width` values of one attention: the linears that make them and those that read them.

    Each head occurs once among the sources; among the sinks as often as queries share it.
    """

    count: int
    width: int
    sources: tuple[HeadChannels, ...]
    sinks: tuple[HeadChannels, ...]


def value_heads(program: Program, own: Collection[fx.Node]) -> tuple[list[ValueHeads], list[tuple[str, str]]]:
    """Return the heads whose values can be rotated exactly, and (attention, reason) for the attentions without.

    own: the linears whose weights may be written, each read by itself alone.
    """
    found, left = [], []
    for attention in attentions(program):
        try:
            found.append(_heads(program, attention, own))
        except Blocked as reason:
            left.append((attention.node.name, str(reason)))
    return found, left


def _heads(program: Program, attention: Attention, own: Collection[fx.Node]) -> ValueHeads:
    walk = seeding(program, [(attention.value, -1)]).walk(program)
    _demand(not walk.marks, "channels are multiplied or added to on the way, which a rotation does not pass")
    _demand(bool(walk.sinks), "no linear reads the values")
    for node in (*walk.seeds, *walk.sinks):
        _demand(node in own and is_call(node, aten.linear), f"the weight of {node.name} is not to be rotated")
        bias = bias_of(node)
        _demand(bias is None or bias.op == "get_attr", f"the bias of {node.name} is computed")
    sources, head_at = _sources(program, attention)
    sinks = _sinks(program, attention, list(walk.sinks), head_at)
    count, width = sum(len(s.heads) for s in sources), sources[0].channels.shape[1]
    return ValueHeads(count, width, tuple(sources), tuple(sinks))


def _sources(program: Program, attention: Attention) -> tuple[list[HeadChannels], Tensor]:
    """Return the rows that make each head, and i64[...], the head at each leading index of the attention's values."""
    origins, path = ancestry(attention.value)
    numbers = _numbered(program, origins, attention.value, path)
    _demand(not bool((numbers == UNSCALED).any()), "some channels of a head are made by no linear")
    sizes = [channels_of(node)[0] for node in origins]
    tokens, rows = _split(numbers, sizes, [_elements(program, n) for n in origins])
    _demand(_same(tokens, -1), "the channels of a head come from different positions")
    _demand(_same(rows, -2), "the channels of a head differ between positions")
    lines = rows.select(-2, 0).flatten(0, -2)  # [leading indices, d], rows counted through all origins
    distinct, head_at = torch.unique(lines, dim=0, return_inverse=True)
    _demand(distinct.unique().numel() == distinct.numel(), "two heads share rows")
    found, first = [], 0
    for node, size in zip(origins, sizes, strict=True):
        mine = (distinct >= first) & (distinct < first + size)
        _demand(_same(mine, -1), "the channels of a head are made by different linears")
        if bool(mine.any()):
            heads = mine[:, 0].nonzero().flatten()
            found.append(HeadChannels(node, distinct[heads] - first, heads))
        first += size
    return found, head_at.view(rows.shape[:-2])


def _sinks(program: Program, attention: Attention, readers: Sequence[fx.Node], head_at: Tensor) -> list[HeadChannels]:
    """Return the columns that read each head; head_at: the head at each leading index of the attention's values."""
    mixed = attention.mixed
    *lead, positions, width = Walk(program, {}, torch.ones(0), RULES).shape(mixed)
    if is_call(mixed, *FUSED):
        head_at = head_at.repeat_interleave(lead[-1] // head_at.shape[-1], -1)
    head_at = head_at.expand(lead).flatten()
    found = []
    for node in readers:
        value = node.args[0]
        assert isinstance(value, fx.Node)
        numbers = _numbered(program, [mixed], value, between(program, mixed, value, set()))
        numbers = numbers.flatten(0, -2)  # [tokens, K]
        places, channels = numbers // width, numbers % width  # which head of which token, and which channel of it
        heads = torch.where(numbers == UNSCALED, UNSCALED, head_at[places // positions])
        steady = _same(heads, 0) and _same(torch.where(numbers == UNSCALED, UNSCALED, channels), 0)
        _demand(steady, f"the channels that {node.name} reads differ between positions")
        found.append(_lines(node, places, channels[0], heads[0], width))
    return found


def _lines(node: fx.Node, places: Tensor, channels: Tensor, heads: Tensor, width: int) -> HeadChannels:
    """Return the columns of a reader, head by head; places: i64[tokens, K], channels, heads: i64[K]."""
    lines, numbers = [], []
    touched = (heads != UNSCALED).nonzero().flatten()
    for place in places[0, touched].unique():
        columns = touched[places[0, touched] == place]
        columns = columns[channels[columns].argsort()]
        whole = torch.equal(channels[columns], torch.arange(width))
        _demand(whole and _same(places[:, columns], -1), f"{node.name} does not read whole heads")
        lines.append(columns)
        numbers.append(heads[columns[0]])
    return HeadChannels(node, torch.stack(lines), torch.stack(numbers))


def _numbered(program: Program, starts: Sequence[fx.Node], value: fx.Node, within: Iterable[fx.Node]) -> Tensor:
    """Return which element of `starts`, counted through all of them at sample sizes, each element of a value is.

    Raises Blocked where what lies between does more than move elements.
    """
    seeds: dict[fx.Node, Tensor] = {}
    first = 0
    walk = Walk(program, seeds, torch.empty(0), RULES, frozenset(within))
    for node in starts:
        shape = walk.shape(node)
        seeds[node] = torch.arange(first, first := first + torch.Size(shape).numel()).view(shape)
    walk.powers = torch.ones(first, dtype=torch.int64)
    found = walk.run().labels(value) if value not in seeds else seeds[value]
    if found is None or walk.marks:
        raise Blocked(f"{value.name} is not made of whole heads")
    return found


def _elements(program: Program, node: fx.Node) -> int:
    return torch.Size(Walk(program, {}, torch.empty(0), RULES).shape(node)).numel()


def _split(numbers: Tensor, sizes: Sequence[int], elements: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return token and row of numbered elements of several linears, rows counted through all of them.

    sizes: rows of each linear; elements: of each linear's result.
    """
    tokens, rows = torch.empty_like(numbers), torch.empty_like(numbers)
    first = row = 0
    for size, count in zip(sizes, elements, strict=True):
        mine = (numbers >= first) & (numbers < first + count)
        tokens[mine], rows[mine] = (numbers[mine] - first) // size, (numbers[mine] - first) % size + row
        first, row = first + count, row + size
    return tokens, rows


def _same(values: Tensor, dim: int) -> bool:
    return bool((values == values.narrow(dim, 0, 1)).all())


def _demand(holds: bool, reason: str) -> None:
    if not holds:
        raise Blocked(reason)
