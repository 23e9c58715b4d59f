"""What a language model's graph says of its caches, read off before it is run: their widths, and which slots count."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as onnx
import torch
from torch import Tensor

from frontend.onnx.interface import IDS, MASK, POSITIONS, cache_place

# Of GroupQueryAttention: the places of past keys and values, and of how many keys each row has, less one.
_PAST, _LENGTHS = (3, 4), 5
# Set on a node that reads the attention mask where it read these lengths.
SLOTS = "slots_of_mask"
_WHOLE = ("Cast", "Sub", "ReduceSum", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def settle_caches(graph: onnx.Graph) -> None:
    """Make a graph's caches what programs have, in place.

    Their width, which builders leave open, is that of the heads; rows of different lengths are told by the attention
    mask itself, slot by slot, where the graph only counts its ones: a program's cache grows by all new tokens of a
    batch, and the mask says which slots of it count.
    """
    inputs = {str(v.name): v for v in graph.inputs}
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        width = head_width(node)
        for place in _PAST:
            past = _input(node, place)
            if width is not None and past is not None and past.name in inputs and past.shape is not None:
                past.shape = onnx.Shape([*list(past.shape)[:-1], width])
        mask = inputs.get(MASK)
        if mask is not None and IDS in inputs and _counts(_input(node, _LENGTHS), mask):
            node.replace_input_with(_LENGTHS, mask)
            node.attributes.add(onnx.AttrInt64(SLOTS, 1))


def head_width(node: onnx.Node) -> int | None:
    """Return the entries of a head of an attention, by what is declared of its queries; None where that is nothing."""
    heads, shared = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    query, key = _input(node, 0), _input(node, 1)
    if query is None or query.shape is None or not isinstance(query.shape[-1], int):
        return None
    count = heads if key is not None else heads + 2 * shared
    return query.shape[-1] // count if count and query.shape[-1] % count == 0 else None


@dataclass(frozen=True)
class Positions:
    """The input of token positions, and those that tell them: token ids, and the keys or values of a cache."""

    value: onnx.Value
    ids: onnx.Value
    past: onnx.Value


def positions_of(graph: onnx.Graph) -> Positions | None:
    """Return the positions that a graph with a cache reads, None where it reads none or they are of another kind."""
    inputs = {str(v.name): v for v in graph.inputs}
    value, ids = inputs.get(POSITIONS), inputs.get(IDS)
    past = next((v for name, v in inputs.items() if cache_place(name) is not None), None)
    if value is None or ids is None or past is None or value.shape is None or past.shape is None:
        return None
    return Positions(value, ids, past) if (len(value.shape), len(past.shape)) == (2, 4) else None


def next_positions(ids: Tensor, past: Tensor) -> Tensor:
    """Return the positions [batch, seq] of tokens that follow those of a cache [batch, heads, past, width]."""
    return (torch.arange(ids.shape[1]) + past.shape[2]).unsqueeze(0).expand(ids.shape[0], -1)


def _input(node: onnx.Node, place: int) -> onnx.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _counts(lengths: onnx.Value | None, mask: onnx.Value) -> bool:
    """Return whether lengths are what a mask's ones add up to, less one."""
    kinds, value = list[str](), lengths
    while value is not None and value is not mask:
        node = value.producer()
        if node is None or node.op_type not in _WHOLE:
            return False
        kinds.append(node.op_type)
        value = node.inputs[0]
    return value is mask and kinds.count("ReduceSum") == 1 and kinds.count("Sub") == 1
