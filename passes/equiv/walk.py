"""Following scaled channels through a program: every value downstream of the seeds gets a label per element.

The labels are integer tensors of the values' own shapes at sample sizes, and ops that only move elements are run on
them, so that every layout (fused qkv, interleaved heads, slices, gathers) is read off exactly and without cases.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ir.overloads import bound_args, packet_of
from ir.program import TYPE, Program
from ir.propagate import evaluate
from ir.types import ScalarType, TensorType

UNSCALED = -1
Labels = Tensor | tuple[Tensor, ...]
Rule = Callable[["Walk", fx.Node], Labels | None]

# Several positions, so that a layout that mixes positions into channels shows; an empty past, since cached state has
# the basis of the values appended to it.
_SIZES = {"batch": 2, "seq": 3, "past": 0, "total": 3}


class Blocked(Exception):
    """The scale cannot pass; the message is the reason, ready to follow the name of a group."""


@dataclass
class Walk:
    """One walk from seeds to sinks.

    seeds: producer -> i64 labels of its trailing channels; powers: i64[labels], the power of its scale a value carries.
    within: follow only these nodes, or None for all readers; rules: op packet -> what it does to labels.
    Results: values (labels of each scaled value), ties (i64[2,n] labels that must be one parameter), sinks (linear ->
    i64[K] labels of its inputs), marks (`positive`: exact for positive scales only; `factor`: not exact for a shift).
    """

    program: Program
    seeds: Mapping[fx.Node, Tensor]
    powers: Tensor
    rules: Mapping[Any, Rule]
    within: frozenset[fx.Node] | None = None
    values: dict[fx.Node, Labels] = field(default_factory=dict)
    ties: list[Tensor] = field(default_factory=list)
    sinks: dict[fx.Node, Tensor] = field(default_factory=dict)
    marks: set[str] = field(default_factory=set)
    states: set[fx.Node] = field(default_factory=set)

    def run(self) -> Walk:
        """Follow all readers in graph order; raises Blocked with the reason where a scale cannot pass."""
        heap: list[fx.Node] = []
        queued: set[fx.Node] = set()

        def settle(node: fx.Node, labels: Labels) -> None:
            parts = labels if isinstance(labels, tuple) else (labels,)
            if not any(bool((p != UNSCALED).any()) for p in parts):
                return
            self.values[node] = labels
            for user in node.users:
                if user not in queued and (self.within is None or user in self.within):
                    queued.add(user)
                    heapq.heappush(heap, user)

        for node, labels in self.seeds.items():
            settle(node, labels.expand(self.shape(node)))
        while heap:
            node = heapq.heappop(heap)
            if node.op == "output":
                self._check_returned()
                continue
            result = self._apply(node)
            if result is not None and node not in self.seeds:
                settle(node, result)
        return self

    def _apply(self, node: fx.Node) -> Labels | None:
        rule = self.rules.get(packet_of(node.target))
        if rule is None:
            raise Blocked(f"{name_of(node)} ({node.name}) does not commute with a scale per channel")
        return rule(self, node)

    def _check_returned(self) -> None:
        for node in self.program.outputs:
            if node in self.values and node not in self.states:
                raise Blocked(f"the scaled value {node.name} is an output of the program")

    def labels(self, value: Any) -> Tensor | None:
        """Return the labels of a scaled tensor, None for anything else."""
        found = self.values.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, Tensor) else None

    def labels_or_unscaled(self, node: fx.Node) -> Tensor:
        """Return the labels of a tensor, UNSCALED throughout if it carries no scale."""
        found = self.labels(node)
        return torch.full(self.shape(node), UNSCALED) if found is None else found

    def args(self, node: fx.Node) -> tuple[Any, ...]:
        """Return a call's arguments in schema order, defaults filled in."""
        bound = bound_args(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        if bound is None:
            raise Blocked(f"the arguments of {node.name} do not fit its schema")
        return bound

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return a tensor's shape at the sample sizes."""
        kind = node.meta.get(TYPE)
        if not isinstance(kind, TensorType):
            raise Blocked(f"{node.name} is no tensor")
        sizes = dict.fromkeys(self.program.symbols, 2) | _SIZES
        dims = [evaluate(d, sizes) for d in kind.dims]
        known = tuple(d for d in dims if d is not None)
        if len(known) != len(dims):
            raise Blocked(f"the shape {kind} of {node.name} depends on data")
        return known

    def moved(self, node: fx.Node) -> Labels:
        """Return the labels after a call that only moves elements, by running it on them."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._concrete)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(result) if isinstance(result, (tuple, list)) else result

    def _concrete(self, node: fx.Node) -> Any:
        kind = node.meta.get(TYPE)
        if node in self.values:
            labels = self.values[node]
            return labels.contiguous() if isinstance(labels, Tensor) else labels
        if isinstance(kind, ScalarType):
            return evaluate(kind.expr, dict.fromkeys(self.program.symbols, 2) | _SIZES)
        if node.op == "get_attr" and not self.program.params.type_of(str(node.target)).dtype.is_floating_point:
            return self.program.value(node)
        return torch.full(self.shape(node), UNSCALED)

    def tie(self, a: Tensor, b: Tensor, opposite: bool, what: str) -> None:
        """Demand that elements of two label tensors share a parameter, with opposite or equal powers.

        Raises Blocked, saying `what`, where only one of the two is scaled or the powers do not fit.
        """
        a, b = torch.broadcast_tensors(a, b)
        scaled = a != UNSCALED
        if bool((scaled != (b != UNSCALED)).any()):
            raise Blocked(f"{what} a value that does not carry the scale")
        pairs = torch.unique(torch.stack([a[scaled], b[scaled]]), dim=1)
        left, right = self.powers[pairs[0]], self.powers[pairs[1]]
        if bool((left != (-right if opposite else right)).any()):
            raise Blocked(f"{what} a value that carries the scale to another power")
        self.ties.append(pairs)


def name_of(node: fx.Node) -> str:
    """Return the bare operator name of a call, or what kind of node it is."""
    packet = packet_of(node.target)
    return str(getattr(packet, "__name__", node.op))


def constant_over(labels: Tensor, dim: int, what: str) -> Tensor:
    """Return labels with `dim` dropped, along which they must not differ; raises Blocked, saying `what`, if they do."""
    first = labels.select(dim, 0) if labels.shape[dim] else None
    if first is None or bool((labels != first.unsqueeze(dim)).any()):
        raise Blocked(what)
    return first


def per_channel(labels: Tensor, node: fx.Node) -> Tensor:
    """Return the labels along the last dim, which must be the same at every position; raises Blocked otherwise."""
    flat = labels.reshape(-1, labels.shape[-1])
    return constant_over(flat, 0, f"the scale of a channel differs between positions at {node.name}")


def classes(ties: list[Tensor], count: int) -> Tensor:
    """Return label -> free parameter, numbered in order of their first label."""
    parent = list(range(count))

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for pairs in ties:
        for a, b in pairs.T.tolist():
            low, high = sorted((root(a), root(b)))
            parent[high] = low
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(root(label), len(numbers)) for label in range(count)], dtype=torch.int64)
