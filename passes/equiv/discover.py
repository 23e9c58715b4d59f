"""Finding every equivalence group of a program by its dataflow, and saying of the near misses why they are none.

Source: the groups of SmoothQuant (2211.10438), AWQ (2306.00978) and OmniQuant (2308.13137), with the ties that make
them exact under rotary embedding, grouped-query attention and per-head norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from ir.program import TYPE, Program, is_call
from ir.types import TensorType
from passes.equiv.attention import FUSED, Attention, attentions, unclear
from passes.equiv.constants import is_constant
from passes.equiv.groups import Absence, Axis, Discovery, EquivGroup, Kind, Slot, TieMap
from passes.equiv.producers import Seeding, ancestry, bias_of, channels_of, gain_of, seeding
from passes.equiv.rules import ACTIVATIONS, CASTS, LINEARS, MOVES, NORMS
from passes.equiv.walk import UNSCALED, Blocked, Walk, classes

aten = torch.ops.aten


def discover(program: Program) -> Discovery:
    """Return the groups of a program in graph order, and the places that look like groups but are not exact."""
    search = _Search(program)
    for attention in attentions(program):
        search.attention(attention)
    for node, why in unclear(program):
        search.absences += [Absence("q<->k", node.name, why), Absence("v->o", node.name, why)]
    for node in program.calls(aten.mul):
        search.gated(node)
    for node in program.calls(*ACTIVATIONS):
        search.activated(node)
    for node in program.calls(*NORMS):
        search.norm(node)
    order = {n.name: i for i, n in enumerate(program.graph.nodes)}
    groups = tuple(sorted(search.groups, key=lambda g: (order[g.sources[0].node], order[g.site])))
    return Discovery(groups, tuple(sorted(search.absences, key=lambda a: (order[a.site], a.kind))))


class _Search:
    """What has been found so far; each method looks at one node that a group may be anchored at."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.groups: list[EquivGroup] = []
        self.absences: list[Absence] = []
        self.gates: set[fx.Node] = set()
        self.gains: set[fx.Node] = set()
        self.readers: dict[str, list[fx.Node]] = {}
        for node in program.param_nodes():
            self.readers.setdefault(str(node.target), []).extend(node.users)

    def attention(self, found: Attention) -> None:
        """Scales between values and what reads the attention, and between queries and keys."""
        starts = [(found.query, -1), (found.key, 1)]
        producers = self._try("q<->k", found.node, lambda: seeding(self.program, starts))
        self.gains |= {n for n in producers or () if is_call(n, *NORMS)}
        self._try("v->o", found.node, lambda: seeding(self.program, [(found.value, -1)]))

    def gated(self, node: fx.Node) -> None:
        """Scales on the linear factor of a gated product (GLU, 2002.05202): the other factor is an activation."""
        a, b = node.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or _width(a) != _width(b):
            return
        for gate, up in ((a, b), (b, a)):
            activation = _activation_behind(gate)
            if activation is not None and _origins(up) and not _is_part_of(up, activation):
                self.gates.add(activation)
                self._try("up->down", node, lambda up=up: seeding(self.program, [(up, -1)]))  # type: ignore[misc]
                return

    def activated(self, node: fx.Node) -> None:
        """Scales through an activation between two linears, exact for rectifiers only."""
        source = node.args[0]
        if node in self.gates or not isinstance(source, fx.Node) or not _feeds_linear(node) or not _origins(source):
            return
        self._try("fc1->fc2", node, lambda: seeding(self.program, [(source, -1)]))

    def norm(self, node: fx.Node) -> None:
        """Scales between a norm's gain and all linears that read it; gains that carry a q<->k scale are spoken for."""
        if node in self.gains:
            return
        shape = channels_of(node)
        labels = torch.arange(torch.Size(shape).numel()).view(shape)
        powers = torch.full((labels.numel(),), -1)
        kind: Kind = "norm->head" if self._ends(node) else "norm->linears"
        self._try(kind, node, lambda: Seeding({node: labels}, powers))

    def _ends(self, norm: fx.Node) -> bool:
        """Return whether nothing after the linears that read a norm carries weights: they are the model's head."""
        seen: set[fx.Node] = set()
        stack, depth = list(norm.users), 0
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            depth += is_call(node, *LINEARS)
            if is_call(node, *FUSED, *NORMS) or depth > 1:
                return False
            stack.extend(node.users)
        return True

    def _try(self, kind: Kind, anchor: fx.Node, seeds: Callable[[], Seeding]) -> list[fx.Node] | None:
        """Enter the group that seeds lead to, or its absence; return its producers."""
        try:
            seeded = seeds()
            group = self._group(kind, anchor, seeded, seeded.walk(self.program))
        except Blocked as reason:
            self.absences.append(Absence(kind, anchor.name, str(reason)))
            return None
        self.groups.append(group)
        return list(seeded.labels)

    def _group(self, kind: Kind, anchor: fx.Node, seeded: Seeding, walk: Walk) -> EquivGroup:
        if kind != "q<->k" and not walk.sinks:
            raise Blocked("no linear reads the scaled value")
        free = classes(walk.ties, len(seeded.powers))
        slots = [s for node, labels in seeded.labels.items() for s in self._producer(node, labels, seeded.powers, free)]
        slots += [s for node, labels in walk.sinks.items() for s in self._sink(node, labels, seeded.powers, free)]
        supports = {"scale"} if "positive" in walk.marks else {"scale", "sign"}
        if kind != "q<->k" and not walk.marks and all(is_call(n, aten.linear) for n in walk.sinks):
            supports.add("shift")
        site = anchor if kind in ("q<->k", "norm->linears", "norm->head") else next(iter(walk.sinks))
        sources, sinks = ([s for s in slots if s.power == power] for power in (-1, 1))
        return EquivGroup(kind, site.name, tuple(sources), tuple(sinks), int(free.max()) + 1, frozenset(supports))

    def _producer(self, node: fx.Node, labels: Tensor, powers: Tensor, free: Tensor) -> list[Slot]:
        labels = labels.flatten()
        if is_call(node, *NORMS):
            gain = gain_of(node)
            if gain is not None and not is_constant(gain):
                raise Blocked(f"the gain of {node.name} depends on the input")
            return self._slots(node, "gain", _name(gain), _name(bias_of(node)), labels, powers, free)
        weight, bias = node.args[1], bias_of(node)
        if bias is not None and bias.op != "get_attr":
            raise Blocked(f"the bias of {node.name} is computed")
        self._check_own(node, weight)
        return self._slots(node, "rows", _name(weight), _name(bias), labels, powers, free)

    def _sink(self, node: fx.Node, labels: Tensor, powers: Tensor, free: Tensor) -> list[Slot]:
        self._check_own(node, node.args[1])
        # A value carries s to some power; the columns that read it take the opposite one.
        return self._slots(node, "cols", _name(node.args[1]), "", labels, -powers, free)

    def _slots(
        self, node: fx.Node, axis: Axis, weight: str, bias: str, labels: Tensor, powers: Tensor, free: Tensor
    ) -> list[Slot]:
        slots = []
        for power in (-1, 1):
            mine = (labels != UNSCALED) & (powers[labels] == power)
            if bool(mine.any()):
                tie = TieMap(torch.where(mine, free[labels], torch.full_like(labels, UNSCALED)))
                slots.append(Slot(node.name, weight, bias, axis, power, tie))
        return slots

    def _check_own(self, node: fx.Node, weight: object) -> None:
        """Raise Blocked when a linear's weight is computed or something else reads it too (tied head, shared layer)."""
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise Blocked(f"the weight of {node.name} is computed")
        others = [reader.name for reader in self.readers[str(weight.target)] if reader is not node]
        if others:
            raise Blocked(f"the weight @{weight.target} of {node.name} is tied: {', '.join(others)} reads it too")


def _name(node: object) -> str:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def _width(node: fx.Node) -> object:
    kind = node.meta.get(TYPE)
    return kind.dims[-1] if isinstance(kind, TensorType) and kind.dims else None


def _origins(value: fx.Node) -> Sequence[fx.Node]:
    try:
        return [n for n in ancestry(value)[0] if is_call(n, *LINEARS)]
    except Blocked:
        return []


def _activation_behind(value: fx.Node) -> fx.Node | None:
    """Return the activation a value is, apart from moves and casts."""
    node = value
    while is_call(node, *MOVES, *CASTS) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if is_call(node, *ACTIVATIONS) else None


def _is_part_of(up: fx.Node, activation: fx.Node) -> bool:
    """Return whether a product is an activation's own formula, as in x sigmoid(x)."""
    return up is activation.args[0]


def _feeds_linear(node: fx.Node) -> bool:
    stack, seen = list(node.users), set[fx.Node]()
    while stack:
        user = stack.pop()
        if is_call(user, *LINEARS):
            return True
        if user not in seen and is_call(user, *MOVES, *CASTS):
            seen.add(user)
            stack.extend(user.users)
    return False
