"""The inputs and outputs of a language model's ONNX graph, named and ordered as programs have them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from ir.edit import Editor
from ir.errors import UnsupportedError
from ir.program import Program, is_call, rename, tensor_type_of
from ir.types import Dim, ScalarType, TensorType, ValueType

aten = torch.ops.aten
IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
KINDS = "token_type_ids"
# As exporters write them: past_key_values.3.key, past_key_3, present.3.value, present_key_values.3.value.
_CACHE = re.compile(r"(?:past|present)[a-z_]*?[._]?(?:(key|value)[._](\d+)|(\d+)[._](?:decoder[._])?(key|value))$")


def cache_place(name: str) -> tuple[int, str] | None:
    """Return layer and kind (`key`, `value`) of a cache by the name of its input or output, None for another."""
    found = _CACHE.match(name)
    if found is None:
        return None
    kind, layer, other, after = found.groups()
    return int(layer or other), str(kind or after)


def is_language_model(program: Program, outputs: list[str]) -> bool:
    """Return whether a graph takes token ids with a mask and a cache, and gives logits."""
    names = [n.name for n in program.inputs]
    return IDS in names and MASK in names and LOGITS in outputs and any(cache_place(n) for n in outputs)


def name_language_model(program: Program, outputs: list[str]) -> None:
    """Put ids, mask and caches first, logits and caches last, in the order and under the names of programs.

    outputs: their names in the model. Raises UnsupportedError for inputs that a program of a language model lacks.
    """
    inputs = {n.name: n for n in program.inputs}
    caches = {place: node for name, node in inputs.items() if (place := cache_place(name)) is not None}
    others = [n for n in inputs if n not in (IDS, MASK) and cache_place(n) is None]
    if others:
        raise UnsupportedError(
            f"the model has an input {others[0]} besides ids, mask and cache",
            where=others[0],
            why="what a language model reads besides its tokens must follow from them",
            fix="export it without that input",
        )
    ordered = [inputs[IDS], inputs[MASK], *(caches[place] for place in sorted(caches, key=_order))]
    first = next(iter(program.graph.nodes))
    for node in ordered:
        first.prepend(node)
    for (layer, kind), node in caches.items():
        rename(node, f"past_{kind}_{layer}")
        node.target = node.name
    given = dict(zip(outputs, program.outputs, strict=True))
    kept = sorted((place for name in outputs if (place := cache_place(name)) is not None), key=_order)
    by_place = {cache_place(name): node for name, node in given.items()}
    program.output.args = ((given[LOGITS], *(by_place[place] for place in kept)),)
    _name_dims(program, caches)
    program.version += 1


def lead_with_tokens(program: Program) -> None:
    """Put the inputs of a text model that is no language model in the order ids, mask, kinds; leave others alone."""
    inputs = {n.name: n for n in program.inputs}
    if IDS in inputs:
        first = next(iter(program.graph.nodes))
        for name in (IDS, MASK, KINDS):
            if name in inputs and inputs[name] is not first:
                first.prepend(inputs[name])
        program.version += 1


def look_up_as_given(program: Program) -> None:
    """Look tokens up as they are: ONNX counts negative ones from the end, and what feeds programs refuses these."""
    editor = Editor(program, "onnx")
    for node in list(program.calls(aten.embedding.default)):
        ids = _given(node.args[1])
        if ids is not None:
            editor.set_args(node, (node.args[0], ids, *node.args[2:]), dict(node.kwargs))
    editor.sweep()


def _given(index: Any) -> fx.Node | None:
    """Return the input of token ids whose negative entries a look-up counts from the end, by their sign."""
    if not is_call(index, aten.where):
        return None
    condition, wrapped, ids = index.args
    named = isinstance(ids, fx.Node) and ids.op == "placeholder" and ids.target in (IDS, KINDS)
    signs = is_call(condition, aten.lt) and condition.args == (ids, 0)
    return ids if named and signs and is_call(wrapped, aten.add) and wrapped.args[0] is ids else None


def _order(place: tuple[int, str]) -> tuple[int, bool]:
    return place[0], place[1] == "value"


def _name_dims(program: Program, caches: dict[tuple[int, str], fx.Node]) -> None:
    """Call the dims batch, seq, past and total, in all types."""
    dims = list(tensor_type_of(program.inputs[0]).dims)
    names = {dims[0]: "batch", dims[1]: "seq"}
    for node in caches.values():
        names.setdefault(tensor_type_of(node).dims[2], "past")
    names.setdefault(tensor_type_of(program.inputs[1]).dims[1], "total")
    table = {str(old): new for old, new in names.items() if isinstance(old, str) and old.isidentifier()}
    for node in program.graph.nodes:
        if "type" in node.meta:
            node.meta["type"] = _renamed(node.meta["type"], table)
    program.symbols = tuple(table.get(s, s) for s in program.symbols)


def _renamed(kind: ValueType, table: dict[str, str]) -> ValueType:
    if isinstance(kind, TensorType):
        return TensorType(kind.dtype, tuple(_dim(d, table) for d in kind.dims))
    if isinstance(kind, ScalarType):
        return ScalarType(kind.kind, str(_dim(kind.expr, table)))
    return tuple(_renamed(k, table) for k in kind) if isinstance(kind, tuple) else kind


def _dim(dim: Dim, table: dict[str, str]) -> Dim:
    return dim if isinstance(dim, int) else re.sub(r"[A-Za-z_]\w*", lambda m: table.get(m.group(), m.group()), dim)
