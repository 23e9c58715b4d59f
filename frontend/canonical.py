"""From the graph as exported to the graph passes see: no mutation, no no-ops, no duplicates, stable names."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from frontend.raising import raise_structure
from ir.edit import Editor
from ir.errors import UnsupportedError
from ir.program import PATH, TYPE, Program, is_call, rename
from ir.simplify import merge_duplicates
from ir.types import ScalarType, TensorType, type_text

aten = torch.ops.aten
_BY = "canonical"
_END = 2**63 - 1


def canonicalise(program: Program) -> None:
    """Bring a raw program to the `model` level's normal form, in place; adds the fact `canonical`.

    Raises UnsupportedError for mutation that cannot be made functional.
    """
    unify_sizes(program)
    make_functional(program)
    strip_noops(program)
    merge_duplicates(program, _BY)
    raise_structure(program)
    views_to_reshapes(program)
    strip_noops(program)
    merge_duplicates(program, _BY)
    Editor(program, _BY).sweep()
    drop_empty_constants(program)
    name_values(program)
    program.facts |= {"canonical"}


def unify_sizes(program: Program) -> None:
    """Read every declared dim from one place, and drop device arguments: the backend decides where a program runs."""
    editor, first = Editor(program, _BY), dict[str, fx.Node]()
    for node in list(program.graph.nodes):
        if is_call(node, aten.sym_size):
            expr = node.meta[TYPE].expr
            same = first.setdefault(expr, node)
            if same is not node and expr in program.symbols:
                editor.replace(node, same)
                editor.erase(node)
        elif node.op == "call_function" and {"device", "pin_memory", "layout"} & set(node.kwargs):
            kept = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
            editor.set_args(node, node.args, kept)


def make_functional(program: Program) -> None:
    """Replace in-place calls by their functional twins; later readers of the mutated value read the result.

    Raises UnsupportedError when the mutated tensor is also seen through another name (a view that is read later).
    """
    editor = Editor(program, _BY)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for node in list(program.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        twin = _functional_twin(target)
        base = node.args[0]
        if twin is None or not isinstance(base, fx.Node) or base.op != "call_function" or _viewed(base, node, order):
            raise UnsupportedError(
                f"{target} writes into a tensor that is read elsewhere",
                where=f"{node.meta.get(PATH) or 'the model'}, node {node.name}",
                why="nomul programs are functional: a value never changes after it is computed",
                fix="use an implementation of that module without in-place updates",
            )
        new = editor.before(node).call(twin, *node.args, like=node, **node.kwargs)
        for user in [u for u in base.users if order.get(u, -1) > order[node]]:
            user.replace_input_with(base, new)
        editor.replace(node, new, keep_name=True)
        editor.erase(node)


def _functional_twin(target: torch._ops.OpOverload) -> Any:
    name = target.overloadpacket.__name__
    packet = getattr(aten, name.rstrip("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _viewed(base: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Return whether a view of `base`, or what `base` is a view of, is read after the write."""
    views = (aten.view, aten.transpose, aten.slice, aten.select, aten.unsqueeze, aten.squeeze, aten.expand, aten.t)
    if is_call(base, *views, aten.permute, aten.reshape):
        return True
    later = [v for v in base.users if v is not write and is_call(v, *views, aten.permute, aten.reshape)]
    return any(order.get(u, -1) > order[write] for view in later for u in view.users)


def strip_noops(program: Program) -> None:
    """Remove calls that return their input: casts to the same type, full slices, same-shape views, dropout, aliases."""
    editor = Editor(program, _BY)
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        same = _same_as(node)
        if same is not None:
            editor.replace(node, same)
            editor.erase(node)
        elif is_call(node, aten.to) and not is_call(node, aten.to.dtype):
            _plain_cast(editor, node)


def _same_as(node: fx.Node) -> fx.Node | None:
    """Return the input a call is equal to, if its operator and types show that it is."""
    source = node.args[0] if node.args else None
    if is_call(node, aten.cat):
        return _cat_of_one(node)
    if not isinstance(source, fx.Node):
        return None
    if is_call(node, *_ALIASES):
        return source
    if is_call(node, aten.dropout) and node.args[2] is False:
        return source
    same_type = isinstance(node.meta[TYPE], TensorType) and node.meta[TYPE] == source.meta[TYPE]
    if is_call(node, aten.to, aten.view, aten.reshape, aten.expand, aten.type_as, aten._to_copy) and same_type:
        return source
    if is_call(node, aten.slice) and same_type and _starts_at_zero(node):
        return source
    if is_call(node, aten.add, aten.sub) and node.args[1] == 0 and same_type and not isinstance(node.args[1], fx.Node):
        return source
    return None


_ALIASES = (aten.alias, aten.detach, aten.lift_fresh_copy, aten.lift_fresh, aten.contiguous, aten.clone)


def _starts_at_zero(node: fx.Node) -> bool:
    start = node.args[2] if len(node.args) > 2 else None
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start in (None, 0) and step == 1)


def _cat_of_one(node: fx.Node) -> fx.Node | None:
    """Return the only operand of a concatenation that is not the exporter's empty one-dimensional placeholder."""
    given: Any = node.args[0]
    parts: list[fx.Node] = [p for p in given if p.meta[TYPE].dims != (0,)]
    return parts[0] if len(parts) == 1 else None


def _plain_cast(editor: Editor, node: fx.Node) -> None:
    """Rewrite the cast overloads that name a device or layout into the one that names a dtype."""
    dtype = node.meta[TYPE].dtype
    editor.replace(node, editor.before(node).call(aten.to.dtype, node.args[0], dtype, like=node), keep_name=True)
    editor.erase(node)


def views_to_reshapes(program: Program) -> None:
    """Spell every change of shape `reshape`: a view counts on a memory layout that its producer may no longer have.

    Copies that made values contiguous are gone, and fused operators lay out their results as they please.
    """
    editor = Editor(program, _BY)
    for node in list(program.calls(aten.view.default)):
        new = editor.before(node).call(aten.reshape.default, *node.args, like=node)
        editor.replace(node, new, keep_name=True)
        editor.erase(node)


def drop_empty_constants(program: Program) -> None:
    """Forget parameters that nothing reads; the exporter brings every buffer of the model along."""
    read = {str(n.target) for n in program.param_nodes()}
    for name in [n for n in program.params if n not in read]:
        program.params.drop(name)


def name_values(program: Program) -> None:
    """Name every call after its module path and operator, so that dumps of two runs line up and blocks look alike."""
    taken = {n.name for n in program.graph.nodes if n.op in ("placeholder", "get_attr", "output")}
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    names = _interface_names(program)
    taken |= set(names.values())
    counts: dict[str, int] = {}
    for node in calls:
        if node not in names:
            base = _base_name(node)
            counts[base] = counts.get(base, 0) + 1
            name = base if counts[base] == 1 else f"{base}_{counts[base]}"
            while name in taken:
                counts[base] += 1
                name = f"{base}_{counts[base]}"
            names[node] = name
            taken.add(name)
    for node, name in names.items():
        rename(node, name)


def _interface_names(program: Program) -> dict[fx.Node, str]:
    """Return the names of results: those that the program gives them, or those of a language model."""
    names, taken = dict[fx.Node, str](), {n.name for n in program.inputs}
    given = program.attributes.get("outputs")
    for index, node in enumerate(program.outputs):
        kind = "logits" if index == 0 else f"present_{'value' if index % 2 == 0 else 'key'}_{(index - 1) // 2}"
        name = kind if given is None else _identifier(str(given[index])) if index < len(given) else ""
        if node.op == "call_function" and name and name not in taken:
            names.setdefault(node, name)
            taken.add(name)
    return names


def _identifier(text: str) -> str:
    """Return a text as the name of a value; the text form has no place for keywords."""
    found = re.sub(r"\W+", "_", text).strip("_")
    return f"{found}_" if keyword.iskeyword(found) or found[:1].isdigit() else found


_KEEP_PATH: tuple[Callable[..., Any], ...] = (aten.linear, aten.rms_norm, aten.layer_norm, aten.embedding)


def _base_name(node: fx.Node) -> str:
    kind = node.meta.get(TYPE)
    if isinstance(kind, ScalarType) and kind.expr.isidentifier():
        return f"size_{kind.expr}"
    path = re.sub(r"^(model|transformer|gpt_neox)\.(decoder\.)?", "", str(node.meta.get(PATH, "")))
    packet = getattr(node.target, "overloadpacket", node.target)
    op = getattr(packet, "__name__", "value").strip("_")
    text = path if path and is_call(node, *_KEEP_PATH) else f"{path}_{op}" if path else op
    return _identifier(text) or type_text(kind)
