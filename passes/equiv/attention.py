"""Where a program attends: the fused operator, or the products around a softmax when it is written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ir.overloads import packet_of
from ir.program import Program, is_call
from passes.equiv.rules import CASTS, MOVES, PRODUCTS

aten = torch.ops.aten
FUSED = (aten.scaled_dot_product_attention,)
_SOFTMAX = (aten.softmax, aten._softmax)
# What may stand between the scores and the softmax: scaling, masks, soft caps.
_POINTWISE = frozenset([aten.add, aten.mul, aten.div, aten.tanh, aten.where, aten.masked_fill, *MOVES, *CASTS])


@dataclass(frozen=True)
class Attention:
    """One attention: the node that stands for it, its three operands, and the mixed values it gives."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mixed: fx.Node


def attentions(program: Program) -> Iterator[Attention]:
    """Yield every attention in graph order, fused ones first."""
    for node in program.calls(*FUSED):
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        yield Attention(node, query, key, value, node)
    for softmax in program.calls(*_SOFTMAX):
        scores, mix = _scores_before(softmax), _mix_after(softmax)
        if scores is not None and mix is not None:
            query, key = product_operands(scores)
            yield Attention(scores, query, key, product_operands(mix)[1], mix)


def unclear(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Yield every product of a softmax with values whose scores cannot be followed back to a product, and why.

    Such are attentions whose weights do not add up to one, because the softmax sees a logit of no key (a sink).
    """
    for softmax in program.calls(*_SOFTMAX):
        mix = _mix_after(softmax)
        if mix is not None and _scores_before(softmax) is None:
            through = next(iter(_stops(softmax)), softmax)
            yield mix, f"the scores of {softmax.name} come from {through.name}, which is not a product and its masks"


def product_operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the two factors of a product of activations."""
    a, b = node.args[1:3] if is_call(node, aten.baddbmm) else node.args[:2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return a, b


def _scores_before(softmax: fx.Node) -> fx.Node | None:
    return next((node for node in _stops(softmax) if is_call(node, *PRODUCTS)), None)


def _stops(softmax: fx.Node) -> Iterator[fx.Node]:
    """Yield the calls behind a softmax's scores at which scaling, masks and soft caps end."""
    stack, seen = list(softmax.all_input_nodes), set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if packet_of(node.target) in _POINTWISE:
            stack.extend(node.all_input_nodes)
        else:
            yield node


def _mix_after(softmax: fx.Node) -> fx.Node | None:
    node = softmax
    while True:
        products = [u for u in node.users if is_call(u, *PRODUCTS) and product_operands(u)[0] is node]
        if products:
            return products[0]
        moved = [u for u in node.users if is_call(u, *MOVES, *CASTS)]
        if not moved:
            return None
        node = moved[0]
