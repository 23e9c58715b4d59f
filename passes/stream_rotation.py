"""Rotating the residual stream: by the weights that write and read it, and by operators where it begins and ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from ir.analysis import LinearSite, layout, linear_sites
from ir.edit import Editor
from ir.ops.hadamard import block_order, hadamard_cost
from ir.ops.packing import pack_bits
from ir.program import Program, tensor_type_of
from passes.equiv.residual import ResidualStream, residual_stream
from passes.equiv.turns import Mix, Turn, random_signs, turned_weight
from passes.equiv.walk import Blocked

aten, nomul = torch.ops.aten, torch.ops.nomul
Axis = Literal["rows", "cols"]


@dataclass(frozen=True, eq=False)
class StreamTurn:
    """An orthonormal rotation M H D / sqrt(order) of the residual stream.

    signs: u8[width], 1 is +1, the diagonal D; mix: f64[width, width], the orthogonal M, or None for the identity.
    """

    stream: ResidualStream
    signs: Tensor
    order: int
    mix: Tensor | None = None

    @property
    def adds(self) -> int:
        """Additions that an operator which turns the stream takes a token, a matrix product for a mix apart."""
        return hadamard_cost(self.stream.width, self.order, tokens=1).adds

    @property
    def ends(self) -> list[tuple[fx.Node, bool]]:
        """The values that operators must turn, and whether back, since no weight before or behind them can."""
        found = [] if self.stream.before is not None else [(self.stream.entry, False)]
        return found if self.stream.after else [*found, (self.stream.exit, True)]

    def sides(self) -> Iterator[tuple[LinearSite, Axis]]:
        """Yield each linear that writes the stream by its rows, or reads it by its columns."""
        yield from ((site, "rows") for site in self.stream.writers)
        yield from ((site, "cols") for site in (*self.stream.readers, *self.stream.after))

    def chain(self, axis: Axis) -> list[Turn | Mix]:
        """Return the rotation as turns of the rows or columns of a weight."""
        channels = torch.arange(self.stream.width)
        first = Turn(axis, channels, self.signs, self.order, self.order**-0.5)
        return [first] if self.mix is None else [first, Mix(axis, channels, self.mix[None])]


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
        old = program.value(table)
        editor.param(str(table.target), turned_weight(old.double(), found.chain("cols")).to(old.dtype))
    signs = None
    if found.ends and found.mix is None:
        signs = editor.param(editor.fresh("residual.signs"), pack_bits(found.signs, 1))
    behind = {*layout(program).epilogue, *program.graph.find_nodes(op="output")}
    made = []
    for value, back in found.ends:
        readers = {user for user in value.users if not back or user in behind}
        new, last = _product(editor, found, value, back) if signs is None else _sums(editor, found, value, back, signs)
        value.replace_all_uses_with(last, delete_user_cb=readers.__contains__, propagate_meta=False)
        made.append(new)
    return made


def _sums(editor: Editor, found: StreamTurn, value: fx.Node, back: bool, signs: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Insert the rotation of a value by additions; return the operator, and the value that it comes to."""
    place = editor.before(value.next)
    new = place.call(nomul.hadamard, value, signs, found.order, back, like=value, name=f"{value.name}_hadamard")
    return new, place.call(aten.mul, new, found.order**-0.5, like=value, name=f"{value.name}_turned")


def _product(editor: Editor, found: StreamTurn, value: fx.Node, back: bool) -> tuple[fx.Node, fx.Node]:
    """Insert the rotation of a value by a matrix."""
    matrix = turned_weight(torch.eye(found.stream.width, dtype=torch.float64), found.chain("rows"))
    held = (matrix.T if back else matrix).contiguous().to(tensor_type_of(value).dtype)
    weight = editor.param(editor.fresh("residual.matrix"), held)
    new = editor.before(value.next).call(aten.linear, value, weight, like=value, name=f"{value.name}_turned")
    return new, new
