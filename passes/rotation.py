"""Rotating what linears read (and give): weights in a random basis, and the operators that turn activations into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, fx

from ir.analysis import LinearSite, sibling_sites, site_name
from ir.edit import Editor
from ir.ops.hadamard import block_order, hadamard_cost
from ir.ops.packing import pack_bits
from ir.program import Program, tensor_type_of
from passes.equiv.heads import ValueHeads, value_heads
from passes.equiv.operands import write_operand
from passes.equiv.turns import Mix, Turn, peak, random_signs, turned_bias, turned_weight
from passes.equiv.walk import Blocked
from passes.sites import weights_of
from passes.stream_rotation import StreamTurn, stream_turn, write_ends

nomul = torch.ops.nomul
Side = Literal["inputs", "both"]

# Key of `Program.attributes`: names of linears whose inputs are in a random basis already.
ROTATED = "rotated"
# What a plan calls the residual stream.
STREAM = "residual stream"


@dataclass(frozen=True, eq=False)
class OnlineTurn:
    """An operator to be put into the program: before sites that read one value, or after one site (transposed)."""

    sites: tuple[LinearSite, ...]
    width: int
    order: int
    signs: Tensor
    transposed: bool

    @property
    def adds(self) -> int:
        """Additions it takes a token."""
        return hadamard_cost(self.width, self.order, tokens=1).adds


@dataclass(frozen=True, eq=False)
class RotationPlan:
    """What is to be turned: each linear's weight, by which operators at run time, and (site, reason) of what is not.

    parts: the same turns by what turns together, under the names of `plan_rotation`.
    """

    turns: dict[LinearSite, list[Turn | Mix]] = field(default_factory=dict)
    streams: list[StreamTurn] = field(default_factory=list)
    values: list[ValueHeads] = field(default_factory=list)
    online: list[OnlineTurn] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    parts: dict[str, list[tuple[LinearSite, Turn | Mix]]] = field(default_factory=dict)

    def add(self, part: str, site: LinearSite, *turns: Turn | Mix) -> None:
        """Turn a site, as one of those that turn together."""
        self.turns.setdefault(site, []).extend(turns)
        self.parts.setdefault(part, []).extend((site, turn) for turn in turns)

    def order(self, site: LinearSite) -> int:
        """Return the order of the rotation of a site's inputs, 1 where only its outputs turn."""
        return max((t.order for t in self.turns[site] if isinstance(t, Turn) and t.axis == "cols"), default=1)


@dataclass(frozen=True)
class Rotated:
    """A linear in a new basis: the order of its inputs' rotation, and max |w| / rms(w) before and after."""

    site: str
    order: int
    before: float
    after: float


@dataclass(frozen=True)
class Rotation:
    """What was done: linears, (operator's node, additions a token) at run time, and (site, reason) left alone."""

    sites: tuple[Rotated, ...]
    online: tuple[tuple[str, int], ...]
    left: tuple[tuple[str, str], ...]


def rotate_sites(
    program: Program,
    sites: Sequence[LinearSite],
    seed: int,
    by: str,
    online: bool = True,
    side: Side = "inputs",
    residual: bool = False,
) -> Rotation:
    """Put the weights of sites into random bases, exactly: W x = (W D H^T / n) (H D x); return what was done.

    The rotation H D of order n is `nomul::hadamard` on the input of all sites that read it together, or, for the values
    of attention heads, part of the weights that make them, so that nothing is left at run time. Computed in float64,
    rounded once to the weights' dtype. online: whether operators may be inserted; side: `both` turns outputs as well
    and turns them back by an operator; residual: turn the residual stream by the weights that write and read it, where
    they allow it. The signs D follow from the seed and the place alone, not from the other sites.
    A site that was rotated before is left. Raises UnsupportedError for a weight that is not finite.
    """
    return write_rotation(program, plan_rotation(program, sites, seed, online, side, residual), by)


def write_rotation(program: Program, plan: RotationPlan, by: str) -> Rotation:
    """Do what a plan says, in place; return what was done."""
    editor = Editor(program, by)
    turned = sorted(plan.turns, key=lambda site: site.node)
    done = tuple(_write_site(editor, site, plan.turns[site], plan.order(site)) for site in turned)
    inserted = [(_insert(editor, turn).name, turn.adds) for turn in plan.online]
    for found in plan.streams:
        inserted += [(node.name, found.adds) for node in write_ends(editor, found)]
    if turned:
        names = {site.node.name for site in turned if any(turn.axis == "cols" for turn in plan.turns[site])}
        program.attributes[ROTATED] = sorted({*program.attributes.get(ROTATED, []), *names})
        program.version += 1
    return Rotation(done, tuple(inserted), tuple(plan.left))


def plan_rotation(
    program: Program,
    sites: Sequence[LinearSite],
    seed: int,
    online: bool = True,
    side: Side = "inputs",
    residual: bool = False,
    without: Mapping[str, str] = MappingProxyType({}),
) -> RotationPlan:
    """Return what `rotate_sites` would do, changing nothing.

    without: what is not to be turned, with the reason: `residual stream`, `<site>/values` for the values that an
    attention's output reads, `<value>/inputs` for the linears that read one value, and `<site>/outputs`.
    """
    plan = RotationPlan()
    plan.left.extend(without.items())
    before = set(program.attributes.get(ROTATED, []))
    plan.left.extend((s.name, "its inputs are rotated already") for s in sites if s.node.name in before)
    own = {s.node: s for s in sites if s.node.name not in before}
    heads, blocked = value_heads(program, own)
    for found in heads:
        _turn_values(plan, found, own, seed, without)
    if residual and STREAM not in without:
        _turn_stream(plan, program, own, seed, online)
    read = [s for s in own.values() if not _covered(plan, s, "cols", s.inputs)]
    if not online:
        plan.left.extend(blocked)
        plan.left.extend((s.name, "only an operator at run time could turn its inputs") for s in read)
        return plan
    for group in sibling_sites(read):
        _turn_inputs(plan, group, seed, without)
    if side == "both":
        for site in own.values():
            _turn_outputs(plan, site, seed, without)
    return plan


def _turn_values(
    plan: RotationPlan, found: ValueHeads, own: dict[fx.Node, LinearSite], seed: int, without: Mapping[str, str]
) -> None:
    """Turn the values of each head where they are made and back where they are read, orthonormal on both sides."""
    order, place = block_order(found.width), f"{site_name(found.sinks[0].node)}/values"
    if order == 1 or place in without:
        return
    signs = random_signs(seed, place, found.count * found.width).view(found.count, found.width)
    plan.values.append(found)
    for axis, slots in (("rows", found.sources), ("cols", found.sinks)):
        for slot in slots:
            turn = Turn(axis, slot.channels.flatten(), signs[slot.heads].flatten(), order, order**-0.5)  # type: ignore[arg-type]
            plan.add(place, own[slot.node], turn)


def _turn_stream(
    plan: RotationPlan, program: Program, own: Mapping[fx.Node, LinearSite], seed: int, online: bool
) -> None:
    """Turn the residual stream, or leave it where that is not exact."""
    try:
        found = stream_turn(program, own, seed, online)
    except Blocked as reason:
        plan.left.append((STREAM, str(reason)))
        return
    plan.streams.append(found)
    for site, axis in found.sides():
        plan.add(STREAM, site, *found.chain(axis))


def _turn_inputs(plan: RotationPlan, group: Sequence[LinearSite], seed: int, without: Mapping[str, str]) -> None:
    """Turn what sites read, all channels together, or leave them where no order fits."""
    width, order = group[0].inputs, block_order(group[0].inputs)
    if order == 1:
        plan.left.extend((s.name, f"{width} channels have no Hadamard matrix, not even of blocks") for s in group)
        return
    source = group[0].node.args[0]
    assert isinstance(source, fx.Node)
    place = f"{source.name}/inputs"
    if place in without:
        return
    signs = random_signs(seed, place, width)
    plan.online.append(OnlineTurn(tuple(group), width, order, signs, transposed=False))
    for site in group:
        plan.add(place, site, Turn("cols", torch.arange(width), signs, order, 1 / order))


def _turn_outputs(plan: RotationPlan, site: LinearSite, seed: int, without: Mapping[str, str]) -> None:
    """Turn what a site gives, unless its rows make values that are turned anyway."""
    order, place = block_order(site.rows), f"{site.node.name}/outputs"
    if place in without:
        return
    if _covered(plan, site, "rows", site.rows):
        return
    if order == 1:
        plan.left.append((site.name, f"{site.rows} outputs have no Hadamard matrix, not even of blocks"))
        return
    if site.bias is not None and site.bias.op != "get_attr":
        plan.left.append((site.name, "its bias is computed, so its outputs are not turned"))
        return
    signs = random_signs(seed, place, site.rows)
    plan.online.append(OnlineTurn((site,), site.rows, order, signs, transposed=True))
    plan.add(place, site, Turn("rows", torch.arange(site.rows), signs, order, 1 / order))


def _covered(plan: RotationPlan, site: LinearSite, axis: str, count: int) -> bool:
    """Return whether turns planned so far take in all rows or columns of a site."""
    mine = [t.channels for t in plan.turns.get(site, []) if t.axis == axis]
    return bool(mine) and torch.cat(mine).unique().numel() == count


def _write_site(editor: Editor, site: LinearSite, turns: Sequence[Turn | Mix], order: int) -> Rotated:
    """Write weight and bias of a site in their new bases, each rounded once."""
    program = editor.program
    wide = weights_of(program, [site], editor.by)
    turned = turned_weight(wide, turns)
    editor.param(site.weight, turned.to(program.params.type_of(site.weight).dtype))
    if site.bias is not None and any(t.axis == "rows" for t in turns):
        bias = program.value(site.bias)
        write_operand(editor, site.node, site.bias, turned_bias(bias.double(), turns).to(bias.dtype))
    return Rotated(site.name, order, peak(wide), peak(turned))


def _insert(editor: Editor, turn: OnlineTurn) -> fx.Node:
    """Put one operator into the program, and have what it serves read it; return its node."""
    first = min(site.node for site in turn.sites)
    stem = turn.sites[0].weight.rpartition(".")[0] or turn.sites[0].weight.replace(".", "_")
    signs = editor.param(
        editor.fresh(f"{stem}.{'output' if turn.transposed else 'input'}_signs"), pack_bits(turn.signs, 1)
    )
    if turn.transposed:
        return _turn_back(editor, first, signs, turn.order)
    source = first.args[0]
    assert isinstance(source, fx.Node)
    kind = tensor_type_of(source)
    new = editor.before(first).call(
        nomul.hadamard, source, signs, turn.order, type=kind, name=f"{source.name}_hadamard"
    )
    for site in turn.sites:
        editor.set_args(site.node, (new, *site.node.args[1:]))
    return new


def _turn_back(editor: Editor, node: fx.Node, signs: fx.Node, order: int) -> fx.Node:
    """Insert the inverse of a linear's turned outputs behind it."""
    new = editor.before(node.next).call(
        nomul.hadamard, node, signs, order, True, like=node, name=f"{node.name}_hadamard"
    )
    editor.replace(node, new)
    editor.set_args(new, (node, *new.args[1:]))
    return new
