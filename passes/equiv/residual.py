"""The residual stream of a program's blocks: which weights write into it and which read it, all in one basis.

A norm without a gain that divides by the root mean square alone gives the same in any basis, so that the stream can be
turned by one rotation for all blocks (QuaRot, 2404.00456, section 4, stage 1a; SliceGPT, 2401.15024, theorem 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from ir.analysis import LinearSite, layout
from ir.overloads import packet_of
from ir.program import Program, is_call, tensor_type_of
from passes.equiv.operands import norm_operands
from passes.equiv.rules import CASTS, NORMS, SHAPES
from passes.equiv.walk import Blocked

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """The values between the entry of the first block and the exit of the last one.

    writers: linears whose rows make up what is added to it; readers: linears whose columns read it, behind a norm or
    not; before, after: the tables of an embedding that the entry is a row of, and the linears behind the exit, where
    these too can be written in another basis; None and empty where they cannot.
    """

    entry: fx.Node
    exit: fx.Node
    width: int
    writers: tuple[LinearSite, ...]
    readers: tuple[LinearSite, ...]
    before: fx.Node | None
    after: tuple[LinearSite, ...]


@dataclass
class _Walk:
    """What was found of the stream so far; a value is in its basis when it is in `inside`."""

    program: Program
    own: Mapping[fx.Node, LinearSite]
    inside: set[fx.Node] = field(default_factory=set)
    writers: dict[fx.Node, None] = field(default_factory=dict)
    readers: dict[fx.Node, None] = field(default_factory=dict)

    def follow(self, start: fx.Node, stop: fx.Node | None) -> None:
        """Take in all values that come from one in the stream's basis; what reads `stop` is left out."""
        stack = [start]
        while stack:
            value = stack.pop()
            if value in self.inside:
                continue
            self.inside.add(value)
            for user in value.users if value is not stop else ():
                if is_call(user, aten.linear):
                    self._demand_own(user)
                    if user.args[0] is not value:
                        raise Blocked(f"{user.name} takes the stream for its weight")
                    self.readers[user] = None
                elif self._keeps_basis(user):
                    stack.extend([user, *self._terms(user)])
                elif packet_of(user.target) not in SHAPES:
                    raise Blocked(f"{user.name} reads the stream, and {_why(user)}")

    def _terms(self, node: fx.Node) -> list[fx.Node]:
        """Return what a sum's other terms are made of, back to the linears that write them into the stream."""
        made: list[fx.Node] = []
        stack = list(node.args[:2]) if is_call(node, aten.add, aten.sub) else []
        while stack:
            term = stack.pop()
            assert isinstance(term, fx.Node)
            if term in self.inside or term in made:
                continue
            made.append(term)
            if is_call(term, aten.linear):
                self._demand_own(term)
                self.writers[term] = None
            elif self._keeps_basis(term):
                stack.extend(term.args[: 2 if is_call(term, aten.add, aten.sub) else 1])
            else:
                raise Blocked(f"{term.name} is added to the stream, and {_why(term)}")
        return made

    def _demand_own(self, node: fx.Node) -> None:
        if node not in self.own:
            raise Blocked(f"the weight of {node.name} is not to be rotated")

    def _keeps_basis(self, node: fx.Node) -> bool:
        """Return whether an operator gives the same in any basis, its operands and result being turned."""
        if is_call(node, aten.add, aten.sub):
            return all(isinstance(term, fx.Node) and term.op == "call_function" for term in node.args[:2])
        if is_call(node, *NORMS):
            return _plain_norm(self.program, node)
        if is_call(node, aten.mul, aten.div):
            return not isinstance(node.args[1], fx.Node)
        return packet_of(node.target) in CASTS


def residual_stream(program: Program, own: Mapping[fx.Node, LinearSite]) -> ResidualStream:
    """Return the residual stream; own: the linears whose weights may be written, those outside the blocks included.

    Raises Blocked, with the reason, where not all that reads and writes it can be written in another basis.
    """
    plan = layout(program)
    if not plan.blocks:
        raise Blocked("no repeated blocks were found")
    entry, last = plan.blocks[0].entry, plan.blocks[-1].exit
    walk = _Walk(program, own)
    walk.follow(entry, last)
    if last not in walk.inside:
        raise Blocked(f"{last.name} is not in the basis of {entry.name}")
    width = int(tensor_type_of(entry).dims[-1])
    writers, readers = (tuple(own[n] for n in sorted(found)) for found in (walk.writers, walk.readers))
    return ResidualStream(entry, last, width, writers, readers, _table(program, entry), _behind(program, last, own))


def _behind(program: Program, last: fx.Node, own: Mapping[fx.Node, LinearSite]) -> tuple[LinearSite, ...]:
    walk = _Walk(program, own)
    try:
        walk.follow(last, None)
    except Blocked:
        return ()
    return () if walk.writers else tuple(own[n] for n in sorted(walk.readers))


def _table(program: Program, entry: fx.Node) -> fx.Node | None:
    """Return the parameter whose rows the entry is, where nothing else reads it."""
    table = entry.args[0] if is_call(entry, aten.embedding) else None
    if not isinstance(table, fx.Node) or table.op != "get_attr" or list(table.users) != [entry]:
        return None
    return None if str(table.target) in program.params.aliases().values() else table


def _plain_norm(program: Program, node: fx.Node) -> bool:
    """Return whether a norm divides by the root mean square over all channels and does nothing else."""
    if not is_call(node, aten.rms_norm) or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return False
    gain, _ = norm_operands(program, node)
    return bool((gain == 1).all())


def _why(node: fx.Node) -> str:
    """Return why an operator does not give the same in another basis."""
    if is_call(node, aten.layer_norm):
        return "a layer norm subtracts a mean that is another one in another basis"
    if is_call(node, *NORMS):
        return "its gains are those of one basis alone"
    return "it is neither a linear nor the same in any basis"
