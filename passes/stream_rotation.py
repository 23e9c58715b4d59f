"""Rotating the residual stream: by the weights that write and read it, and by operators where it begins and ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ir.analysis import LinearSite, layout, linear_sites
from ir.edit import Editor
from ir.ops.hadamard import block_order, hadamard_cost
from ir.ops.packing import pack_bits
from ir.program import Program
from passes.equiv.residual import ResidualStream, residual_stream
from passes.equiv.turns import Turn, random_signs, turned_weight
from passes.equiv.walk import Blocked

aten, nomul = torch.ops.aten, torch.ops.nomul
Axis = Literal["rows", "cols"]


@dataclass(frozen=True, eq=False)
class StreamTurn:
    """An orthonormal rotation H D / sqrt(order) of the residual stream; signs: u8[width], 1 is +1, the diagonal D."""

    stream: ResidualStream
    signs: torch.Tensor
    order: int

    @property
    def adds(self) -> int:
        """Additions that an operator which turns the stream takes a token."""
        return hadamard_cost(self.stream.width, self.order, tokens=1).adds

    @property
    def ends(self) -> list[tuple[fx.Node, bool]]:
        """The values that operators must turn, and whether back, since no weight before or behind them can."""
        found = [] if self.stream.before is not None else [(self.stream.entry, False)]
        return found if self.stream.after else [*found, (self.stream.exit, True)]

    def turns(self) -> Iterator[tuple[LinearSite, Turn]]:
        """Yield each linear that writes or reads the stream, with the turn of its rows or columns."""
        for site in self.stream.writers:
            yield site, self.turn("rows")
        for site in (*self.stream.readers, *self.stream.after):
            yield site, self.turn("cols")

    def turn(self, axis: Axis) -> Turn:
        """Return the rotation as a turn of the rows or columns of a weight."""
        channels = torch.arange(self.stream.width)
        return Turn(axis, channels, self.signs, self.order, self.order**-0.5)


def stream_turn(program: Program, own: Mapping[fx.Node, LinearSite], seed: int, online: bool) -> StreamTurn:
    """Return the rotation of a program's residual stream; own: linears of the blocks whose weights may be written.

    online: whether operators may be inserted. Raises Blocked, with the reason, where the stream cannot be turned.
    """
    behind = linear_sites(program, layout(program).epilogue)[0]
    stream = residual_stream(program, {**own, **{site.node: site for site in behind}})
    order = block_order(stream.width)
    if order == 1:
        raise Blocked(f"{stream.width} channels have no Hadamard matrix, not even of blocks")
    found = StreamTurn(stream, random_signs(seed, "residual", stream.width), order)
    if found.ends and not online:
        raise Blocked("only an operator at run time could turn it before or behind the blocks")
    return found


def write_ends(editor: Editor, found: StreamTurn) -> list[fx.Node]:
    """Turn the stream where it begins, in a table or by an operator, and back where it ends; return the operators."""
    program, table = editor.program, found.stream.before
    if table is not None:
        value = program.value(table)
        editor.param(str(table.target), turned_weight(value.double(), [found.turn("cols")]).to(value.dtype))
    if not found.ends:
        return []
    signs = editor.param(editor.fresh("residual.signs"), pack_bits(found.signs, 1))
    behind = {*layout(program).epilogue, *program.graph.find_nodes(op="output")}
    return [_insert(editor, found, value, back, signs, behind) for value, back in found.ends]


def _insert(
    editor: Editor, found: StreamTurn, value: fx.Node, back: bool, signs: fx.Node, behind: set[fx.Node]
) -> fx.Node:
    """Turn one end of the stream; behind: what comes after the blocks, which alone reads what is turned back."""
    readers = {user for user in value.users if not back or user in behind}
    place = editor.before(value.next)
    new = place.call(nomul.hadamard, value, signs, found.order, back, like=value, name=f"{value.name}_hadamard")
    scaled = place.call(aten.mul, new, found.order**-0.5, like=value, name=f"{value.name}_turned")
    value.replace_all_uses_with(scaled, delete_user_cb=readers.__contains__, propagate_meta=False)
    return new
