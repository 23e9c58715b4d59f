"""Which rows of which weights make up a value: back through operators that keep channels apart, then forward."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ir.overloads import packet_of
from ir.program import Program, is_call, tensor_type_of
from passes.equiv.rules import CASTS, LINEARS, MOVES, NORMS, RULES, offset_after
from passes.equiv.walk import UNSCALED, Blocked, Walk

aten, nomul = torch.ops.aten, torch.ops.nomul

_MERGES = (aten.cat, aten.mul, aten.div, aten.neg, aten.add, aten.sub, aten.index, nomul.rope, operator.getitem)
_PASSED = frozenset([*MOVES, *CASTS, *_MERGES])


@dataclass(frozen=True)
class Seeding:
    """Labels for the rows that make up the values a group starts from, and the power each label's value carries."""

    labels: dict[fx.Node, Tensor]
    powers: Tensor

    def walk(self, program: Program) -> Walk:
        """Follow the labels to all their readers; raises Blocked."""
        return Walk(program, self.labels, self.powers, RULES).run()


def seeding(program: Program, starts: Sequence[tuple[fx.Node, int]]) -> Seeding:
    """Return labels for all rows that reach the values given, each with the power its value is to carry.

    Raises Blocked where no weight's rows can carry the scale, or the same rows reach values of different powers.
    """
    labels: dict[fx.Node, Tensor] = {}
    powers: list[int] = []
    for value, power in starts:
        for node, reached in _rows_of(program, value).items():
            mine = labels.setdefault(node, torch.full(reached.shape, UNSCALED))
            if bool((reached & (mine != UNSCALED)).any()):
                raise Blocked(f"the same rows of {node.name} make up both sides")
            count = int(reached.sum())
            mine[reached] = torch.arange(len(powers), len(powers) + count)
            powers += [power] * count
    return Seeding(labels, torch.tensor(powers))


def channels_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape over which a linear's output rows or a norm's gains extend."""
    if is_call(node, *NORMS):
        return tuple(int(d) for d in node.args[1])  # type: ignore[union-attr, arg-type]
    return (int(tensor_type_of(node).dims[-1]),)


def ancestry(value: fx.Node) -> tuple[list[fx.Node], frozenset[fx.Node]]:
    """Return the linears and norms a value comes from through operators that keep channels apart, and those operators.

    Raises Blocked when a norm on the way has no gain that could carry a scale.
    """
    found: dict[fx.Node, None] = {}
    path: set[fx.Node] = set()
    stack: list[fx.Node] = [value]
    while stack:
        node = stack.pop()
        if node in path or node in found or node.op != "call_function":
            continue
        if is_call(node, *LINEARS):
            found[node] = None
        elif is_call(node, *NORMS):
            if gain_of(node) is None:
                raise Blocked(f"{node.name} has no gain that could carry the scale")
            found[node] = None
        elif packet_of(node.target) in _PASSED:
            path.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(found), frozenset(path)


def gain_of(norm: fx.Node) -> fx.Node | None:
    """Return the gain operand of a norm call."""
    return _operand(norm, 2, "weight")


def bias_of(node: fx.Node) -> fx.Node | None:
    """Return the bias of a linear or the offset of a norm, added behind it for an RMS norm; others have none."""
    if is_call(node, aten.linear):
        return _operand(node, 2, "bias")
    if is_call(node, aten.rms_norm):
        added = offset_after(node)
        return None if added is None else _operand(added, 1, "other")
    return _operand(node, 3, "bias") if is_call(node, aten.layer_norm) else None


def _operand(node: fx.Node, place: int, name: str) -> fx.Node | None:
    value: Any = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    return value if isinstance(value, fx.Node) else None


def _rows_of(program: Program, value: fx.Node) -> dict[fx.Node, Tensor]:
    """Return which rows of each producer appear in a value."""
    origins, path = ancestry(value)
    if not origins:
        raise Blocked(f"{value.name} does not come from a linear through operators that keep channels apart")
    labels: dict[fx.Node, Tensor] = {}
    count = 0
    for node in origins:
        shape = channels_of(node)
        total = int(torch.Size(shape).numel())
        labels[node] = torch.arange(count, count + total).view(shape)
        count += total
    seen = Walk(program, labels, torch.ones(count, dtype=torch.int64), RULES, path).run().labels(value)
    present = torch.zeros(count + 1, dtype=torch.bool)
    if seen is not None:
        present[seen.flatten()] = True  # UNSCALED marks the extra last place
    return {node: mine for node, its in labels.items() if bool((mine := present[its]).any())}
