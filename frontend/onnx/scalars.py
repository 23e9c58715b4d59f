"""Constants of one number as numbers: rules look for numbers where programs traced from torch have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.edit import Editor
from ir.program import Program, is_call, tensor_type_of

aten = torch.ops.aten
_BY = "onnx"
# Which arguments of an operator may be a number as well as a tensor.
_PLACES = {aten.add: (1,), aten.sub: (1,), aten.mul: (1,), aten.div: (1,), aten.pow: (1,), aten.where: (1, 2)}
_COMMUTATIVE = (aten.add, aten.mul)
# What the exporter puts between a constant and its readers.
_SAME = (aten.item, aten.lift_fresh_copy, aten.lift_fresh, aten.detach, aten.alias, aten.clone)


def inline_scalars(program: Program) -> None:
    """Write constants without dims into the calls that read them, in place."""
    editor, known = Editor(program, _BY), dict[str, float]()
    for node in list(program.graph.nodes):
        packet = getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
        if packet not in _PLACES:
            continue
        args = list(node.args)
        if packet in _COMMUTATIVE and _number(program, args[0], known) is not None:
            args[:2] = args[1::-1]
        given = [_number(program, a, known) if i in _PLACES[packet] else None for i, a in enumerate(args)]
        new = [a if value is None else value for a, value in zip(args, given, strict=True)]
        if isinstance(new[0], fx.Node) and any(value is not None for value in given):
            made = editor.before(node).call(packet, *new, like=node, **node.kwargs)
            editor.replace(node, made, keep_name=True)
            editor.erase(node)
    editor.sweep()


def _number(program: Program, value: Any, known: dict[str, float]) -> float | None:
    """Return the number behind a constant float without dims, or behind the call that reads it off one."""
    while is_call(value, *_SAME):
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    kind = tensor_type_of(value)
    if kind.dims != () or not kind.dtype.is_floating_point:
        return None
    name = str(value.target)
    if name not in known:
        known[name] = float(program.params.get(name))
    return known[name]
