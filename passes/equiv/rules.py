"""What each operator does to a scale per channel: pass it on, contract it, take it as a sink, or block it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ir import ops as _ops  # noqa: F401  (registers the nomul operators)
from ir.program import is_call
from passes.equiv.walk import UNSCALED, Blocked, Labels, Rule, Walk, constant_over, per_channel

aten, nomul = torch.ops.aten, torch.ops.nomul

RULES: dict[Any, Rule] = {}


def _packets(names: str) -> list[Any]:
    return [getattr(aten, name) for name in names.split()]


# Operators that only move, repeat or drop elements of their first argument.
MOVES = _packets(
    """view reshape _unsafe_view flatten unflatten view_as reshape_as transpose t permute swapaxes movedim mT expand
    expand_as unsqueeze squeeze slice select narrow split split_with_sizes chunk unbind tensor_split alias detach
    contiguous clone stack repeat repeat_interleave tile flip roll"""
)
CASTS = _packets("to _to_copy type_as")
# Operators that read only the shape of their argument.
SHAPES = _packets("sym_size sym_numel empty_like zeros_like ones_like full_like new_zeros new_ones new_full")
LINEARS = (aten.linear, nomul.grouped_linear)
NORMS = (aten.rms_norm, aten.layer_norm)
PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm)
ACTIVATIONS = _packets(
    """silu gelu relu relu6 sigmoid tanh leaky_relu elu celu selu mish hardtanh hardsigmoid hardswish softplus"""
)


def _rule(packets: Iterable[Any]) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, rule))
        return rule

    return enter


@_rule(MOVES)
def _move(walk: Walk, node: fx.Node) -> Labels:
    return walk.moved(node)


@_rule(SHAPES)
def _shape_only(walk: Walk, node: fx.Node) -> None:
    del walk, node


@_rule([operator.getitem])
def _getitem(walk: Walk, node: fx.Node) -> Labels:
    parts, index = walk.values[node.all_input_nodes[0]], node.args[1]
    if not isinstance(parts, tuple) or not isinstance(index, int):
        raise Blocked(f"{node.name} takes one position out of a tensor")
    return parts[index]


@_rule(CASTS)
def _cast(walk: Walk, node: fx.Node) -> Labels | None:
    if not node.meta["type"].dtype.is_floating_point:
        raise Blocked(f"{node.name} rounds the scaled value to an integer type")
    return walk.labels(node.args[0])


@_rule([aten.cat])
def _cat(walk: Walk, node: fx.Node) -> Labels:
    for part in node.all_input_nodes:
        if part.op == "placeholder":
            _check_state(walk, node, part)
    return walk.moved(node)


def _check_state(walk: Walk, node: fx.Node, past: fx.Node) -> None:
    """Accept an input as cached state: nothing else reads it, and what it is joined to is returned in its place.

    A scale then changes the basis of the state from one step to the next in the same way.
    """
    if any(
        user is not node and RULES.get(getattr(user.target, "overloadpacket", None)) is not _shape_only
        for user in past.users
    ):
        raise Blocked(f"the cached state {past.name} is read elsewhere")
    inputs, outputs = walk.program.inputs, walk.program.outputs
    place = inputs.index(past) - len(inputs)
    if len(outputs) < -place or outputs[place] is not node:
        raise Blocked(f"the input {past.name} is joined to it, but the result is not returned in its place")
    walk.states.add(node)


@_rule([aten.neg])
def _negate(walk: Walk, node: fx.Node) -> Labels | None:
    walk.marks.add("factor")
    return walk.labels(node.args[0])


@_rule([aten.mul, aten.div])
def _multiply(walk: Walk, node: fx.Node) -> Labels:
    a, b = (walk.labels(value) for value in node.args[:2])
    if a is not None and b is not None:
        raise Blocked(f"{node.name} multiplies two scaled values")
    if b is not None and node.target.overloadpacket is aten.div:  # type: ignore[union-attr]
        raise Blocked(f"{node.name} divides by the scaled value")
    walk.marks.add("factor")
    carrier = b if a is None else a
    assert carrier is not None
    return carrier.expand(walk.shape(node))


def offset_after(norm: object) -> fx.Node | None:
    """Return the addition that gives an RMS norm an offset: its one reader, of a parameter that nothing else reads."""
    if not is_call(norm, aten.rms_norm) or len(norm.users) != 1:  # type: ignore[attr-defined]
        return None
    (reader,) = norm.users  # type: ignore[attr-defined]
    offset = reader.args[1] if is_call(reader, aten.add) and reader.args[0] is norm else None
    own = isinstance(offset, fx.Node) and offset.op == "get_attr" and list(offset.users) == [reader]
    return reader if own else None


@_rule([aten.add, aten.sub])
def _add(walk: Walk, node: fx.Node) -> Labels | None:
    if offset_after(node.args[0]) is node:
        return walk.labels(node.args[0])
    if not all(isinstance(value, fx.Node) for value in node.args[:2]):
        raise Blocked(f"{node.name} adds a constant to the scaled value")
    a, b = (walk.labels_or_unscaled(value) for value in node.args[:2])  # type: ignore[arg-type]
    walk.marks.add("factor")
    walk.tie(a, b, False, f"{node.name} adds it to")
    return a.expand(walk.shape(node))


@_rule([aten.relu, aten.leaky_relu])
def _rectify(walk: Walk, node: fx.Node) -> Labels | None:
    walk.marks |= {"positive", "factor"}
    return walk.labels(node.args[0])


@_rule([nomul.rope])
def _rope(walk: Walk, node: fx.Node) -> Labels:
    """A rotation mixes the two channels of a pair, so they must share a scale; channels past its width are free."""
    x, cos, sin, interleaved = walk.args(node)
    labels = walk.labels(x)
    if labels is None or walk.labels(cos) is not None or walk.labels(sin) is not None:
        raise Blocked(f"the scale enters the angles of {node.name}")
    turned = labels[..., : walk.shape(cos)[-1]]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    walk.marks.add("factor")
    walk.tie(a, b, False, f"{node.name} mixes it with")
    return labels


@_rule([aten.index])
def _index(walk: Walk, node: fx.Node) -> Labels:
    x, indices = walk.args(node)
    labels = walk.labels(x)
    if labels is None:
        raise Blocked(f"{node.name} uses the scaled value as an index")
    if all(index is None or index.op == "get_attr" for index in indices):
        return walk.moved(node)
    if len(indices) >= labels.dim():
        raise Blocked(f"{node.name} picks channels by computed indices")
    return per_channel(labels, node).expand(walk.shape(node))


@_rule([aten.scaled_dot_product_attention])
def _attention(walk: Walk, node: fx.Node) -> Labels | None:
    """Softmax mixes positions, not channels: queries contract with keys, values pass, per query head of a group."""
    q, k, v, mask = walk.args(node)[:4]
    if walk.labels(mask) is not None:
        raise Blocked(f"the scale enters the mask of {node.name}")
    heads = walk.shape(q)[-3]
    if walk.labels(q) is not None or walk.labels(k) is not None:
        walk.tie(_heads(walk, q, heads), _heads(walk, k, heads), True, f"{node.name} multiplies it with")
    if walk.labels(v) is None:
        return None
    return _heads(walk, v, heads).unsqueeze(-2).expand(walk.shape(node))


def _heads(walk: Walk, node: fx.Node, heads: int) -> Tensor:
    labels = walk.labels_or_unscaled(node)
    one = constant_over(labels, -2, f"the scale of a channel differs between positions at {node.name}")
    return one.repeat_interleave(heads // one.shape[-2], dim=-2)


@_rule(PRODUCTS)
def _product(walk: Walk, node: fx.Node) -> Labels | None:
    """A product of activations: scales along the contracted dim must cancel, those along the others pass."""
    added = is_call(node, aten.baddbmm)
    a, b = (walk.labels(value) for value in node.args[added : added + 2])
    if added and (walk.labels(node.args[0]) is not None or a is None or b is None):
        raise Blocked(f"{node.name} adds a value that does not carry the scale")
    if a is not None and b is not None:
        mixed = f"the scale differs along a dim that {node.name} keeps"
        walk.tie(constant_over(a, -2, mixed), constant_over(b, -1, mixed), True, f"{node.name} multiplies it with")
        return None
    mixed = f"{node.name} sums over channels of different scale"
    if b is not None:
        return constant_over(b, -2, mixed).unsqueeze(-2).expand(walk.shape(node))
    assert a is not None
    return constant_over(a, -1, mixed).unsqueeze(-1).expand(walk.shape(node))


@_rule(LINEARS)
def _sink(walk: Walk, node: fx.Node) -> None:
    x, weight = walk.args(node)[:2]
    labels = walk.labels(x)
    if labels is None or weight.op != "get_attr":
        raise Blocked(f"the weight of {node.name} is computed")
    channels = per_channel(labels, node)
    if bool((channels != UNSCALED).any()):
        walk.sinks[node] = channels
