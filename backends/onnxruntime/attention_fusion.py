"""Attention with its cache, its grouped heads and its changes of layout as one standard `Attention` (opset 23)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from backends.onnxruntime.attention import scale_of
from backends.onnxruntime.elementwise import dtype_of
from backends.onnxruntime.emitter import Emitter
from backends.onnxruntime.groups import Fused
from backends.onnxruntime.rotary import rotated, rotation
from ir.overloads import bound_args
from ir.program import is_call, tensor_type_of

aten, nomul = torch.ops.aten, torch.ops.nomul


@dataclass(frozen=True)
class Rows:
    """How to get a [batch, heads, seq, width] operand as [batch, seq, heads * width]: what that reads and emits."""

    heads: int
    width: int
    reads: tuple[fx.Node, ...]
    emit: Callable[[Emitter], Any]


@dataclass(frozen=True)
class _Operand:
    """Keys or values: the cache before, if there is one, what is new, and the node that joins them."""

    past: fx.Node | None
    new: fx.Node
    joined: fx.Node


def attention_group(node: fx.Node, order: dict[fx.Node, int]) -> Fused | None:
    """Return the group of an attention call, or None where the operator has no form for it."""
    args = bound_args(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    if args is None or dtype_of(node) != torch.float32:
        return None
    q, k, v, mask, dropout, causal, scale, _ = args
    keys, values = _operand(k, node), _operand(v, node)
    cached = keys.past is not None and values.past is not None
    if not cached:
        keys, values = _Operand(None, k, k), _Operand(None, v, v)
    rows = [_rows(x) for x in (q, keys.new, values.new)]
    if dropout or (causal and cached) or any(r is None for r in rows) or not _mask_fits(mask):
        return None
    found = [r for r in rows if r is not None]
    last = _flattened(node)
    made = _Attention(node, found, keys, values, mask, bool(causal), scale, last)
    binds = [*last] if last else [node]
    reads = [n for r in found for n in r.reads] + ([] if mask is None else [mask])
    if cached:
        binds += [keys.joined, values.joined]
        reads += [p for p in (keys.past, values.past) if p is not None]
    return Fused(node, tuple(binds), tuple(reads), made.emit)


def _mask_fits(mask: Any) -> bool:
    if mask is None:
        return True
    return dtype_of(mask) in (torch.bool, torch.float32) and len(tensor_type_of(mask).dims) in (2, 4)


@dataclass(frozen=True)
class _Attention:
    node: fx.Node
    rows: list[Rows]
    keys: _Operand
    values: _Operand
    mask: fx.Node | None
    causal: bool
    scale: float | None
    last: tuple[fx.Node, ...]

    def emit(self, e: Emitter) -> None:
        """Add the operator, and bind its result and the new cache."""
        q, k, v = self.rows
        cached = self.keys.past is not None
        inputs = [r.emit(e) for r in self.rows]
        inputs.append(None if self.mask is None else e.value(self.mask))
        inputs += [e.value(x.past) for x in (self.keys, self.values) if x.past is not None]
        made = e.add(
            "Attention",
            *inputs,
            q_num_heads=q.heads,
            kv_num_heads=k.heads,
            scale=scale_of(self.node.args[0], self.scale),  # type: ignore[arg-type]
            is_causal=int(self.causal),
            outputs=3 if cached else 1,
        )
        result = made[0] if cached else made
        if cached:
            e.bind(self.keys.joined, made[1])
            e.bind(self.values.joined, made[2])
        for node in self.last:
            e.bind(node, result)
        if not self.last:
            wide = e.add("Reshape", result, [0, 0, q.heads, v.width])
            e.bind(self.node, e.add("Transpose", wide, perm=[0, 2, 1, 3]))


def _operand(node: fx.Node, reader: fx.Node) -> _Operand:
    """Return keys or values as cache and new part, where only this call and the program's output read them joined."""
    args: Any = node.args
    if is_call(node, aten.cat) and len(args[0]) == 2:
        (past, new), dim = (*args, 0)[:2]
        alone = all(user is reader or user.op == "output" for user in node.users)
        if past.op == "placeholder" and dim in (2, -2) and alone and not is_call(new, aten.cat):
            return _Operand(past, new, node)
    return _Operand(None, node, node)


def _flattened(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the reshapes to [batch, seq, heads * width], if they are all that the result is used for."""
    ends: list[fx.Node] = []
    for turned in node.users:
        if not is_swap(turned):
            return ()
        for end in turned.users:
            if not _merges(end, turned):
                return ()
            ends.append(end)
    return tuple(ends)


def is_swap(node: fx.Node) -> bool:
    """Return whether a call swaps dims 1 and 2 of four."""
    args: Any = node.args
    if is_call(node, aten.transpose.int):
        return {d % 4 for d in args[1:3]} == {1, 2} and len(tensor_type_of(node).dims) == 4
    return is_call(node, aten.permute) and tuple(args[1]) == (0, 2, 1, 3)


def _merges(node: fx.Node, source: fx.Node) -> bool:
    """Return whether a call makes [a, b, c * d] of [a, b, c, d]."""
    if not is_call(node, aten.reshape, aten.view):
        return False
    *lead, c, d = tensor_type_of(source).dims
    return isinstance(c, int) and isinstance(d, int) and tensor_type_of(node).dims == (*lead, c * d)


def _rows(node: fx.Node) -> Rows | None:
    """Return how to get an operand with heads side by side, without moving it if possible."""
    node = whole(node)
    args: Any = node.args
    _, heads, _, width = tensor_type_of(node).dims
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    if is_call(node, nomul.rope):
        angles = rotation(node)
        source = _rows(args[0])
        if angles is None or source is None:
            return None
        reads = (*source.reads, *angles.reads)
        return Rows(heads, width, reads, lambda e: rotated(e, source.emit(e), angles, heads))
    if is_swap(node):
        return _side_by_side(args[0], heads, width)
    return _piece(node, heads, width) or _turned(node, heads, width)


def whole(node: fx.Node) -> fx.Node:
    """Return the only operand of a concatenation that is not empty, or the node itself."""
    if is_call(node, aten.cat):
        parts: Any = node.args[0]
        full = [p for p in parts if 0 not in tensor_type_of(p).dims]
        if len(full) == 1:
            return whole(full[0])
    return node


def _side_by_side(node: fx.Node, heads: int, width: int) -> Rows:
    """Return [batch, seq, heads, width] as rows: what it was reshaped from, or a reshape that moves nothing."""
    source = node.args[0] if is_call(node, aten.reshape, aten.view) else None
    if isinstance(source, fx.Node) and _merges_back(source, node):
        return Rows(heads, width, (source,), lambda e: e.value(source))
    return Rows(heads, width, (node,), lambda e: e.add("Reshape", e.value(node), [0, 0, heads * width]))


def _merges_back(source: fx.Node, node: fx.Node) -> bool:
    *lead, c, d = tensor_type_of(node).dims
    return isinstance(c, int) and isinstance(d, int) and tensor_type_of(source).dims == (*lead, c * d)


def _piece(node: fx.Node, heads: int, width: int) -> Rows | None:
    """Return a piece of the last dim of a swapped tensor: the split goes before the swap, which is then not needed."""
    if not is_call(node, operator.getitem):
        return None
    split, index = cast(tuple[Any, int], node.args)
    if not is_call(split, aten.chunk, aten.split, aten.split_with_sizes):
        return None
    swap, kinds = split.args[0], split.meta["type"]
    sizes = [kind.dims[-1] for kind in kinds]
    if not is_swap(swap) or sum(sizes) != tensor_type_of(swap).dims[-1]:
        return None
    source = swap.args[0]

    def emit(e: Emitter) -> Any:
        parts = e.add("Split", e.value(source), sizes, axis=3, outputs=len(sizes))
        return e.add("Reshape", parts[index], [0, 0, heads * width])

    return Rows(heads, width, (source,), emit)


def _turned(node: fx.Node, heads: int, width: int) -> Rows:
    """Return any other operand as rows: swapped here."""

    def emit(e: Emitter) -> Any:
        return e.add("Reshape", e.add("Transpose", e.value(node), perm=[0, 2, 1, 3]), [0, 0, heads * width])

    return Rows(heads, width, (node,), emit)
