"""The checks every level shares: each reads a program and returns a diagnostic for each broken rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ir.code_checks import CODE_CHECKS
from ir.errors import NomulError
from ir.op_checks import OP_CHECKS, pointwise, site_of
from ir.program import ORIGIN, TYPE, Program
from ir.text import node_line, op_name
from ir.types import ScalarType, TensorType, type_text


@dataclass(frozen=True)
class Diagnostic:
    """One broken rule: which check found it, the node's line and type, the pass that made the node, what to try."""

    check: str
    rule: str
    fix: str
    line: str = ""
    type: str = ""
    origin: str = ""

    def __str__(self) -> str:
        text = f"[{self.check}] {self.rule}"
        if self.line:
            text += f"\n    at: {self.line}\n    type: {self.type}; made by: {self.origin or 'the frontend'}"
        return f"{text}\n    try: {self.fix}"


# A row of a level: the name of the check, and what runs it.
Row = tuple[str, Callable[[Program], list[Diagnostic]]]

TYPE_FIX = "record the type the call really has (Editor.call type=, Editor.set_type), or correct its arguments"


def about(node: fx.Node, check: str, rule: str, fix: str) -> Diagnostic:
    """Return the diagnostic of a rule broken at a node."""
    try:
        line = node_line(node)
    except NomulError:
        # What is wrong may be the very thing that has no text form.
        line = node.format_node() or node.name
    kind = type_text(node.meta[TYPE]) if is_value_type(node.meta.get(TYPE, "")) else "untyped"
    return Diagnostic(check, rule, fix, line, kind, str(node.meta.get(ORIGIN, "")))


def is_value_type(kind: Any) -> bool:
    """Return whether `kind` is a tensor type, scalar type, or tuple of them."""
    if isinstance(kind, tuple):
        return all(map(is_value_type, kind))
    return isinstance(kind, (TensorType, ScalarType))


def check_structure(program: Program) -> list[Diagnostic]:
    """Report names used twice, values read before they are computed or not listed as users, and a bad output."""
    found: list[Diagnostic] = []
    names: set[str] = set()
    seen: set[fx.Node] = set()
    fix = "insert the node before its readers with Editor.before, and change graphs through Editor only"
    for node in program.graph.nodes:
        if node.name in names:
            found.append(about(node, "structure", f"the name %{node.name} is used twice", fix))
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            found.append(about(node, "structure", f"a program holds no {node.op} nodes", "inline it in the frontend"))
        for source in node.all_input_nodes:
            if source not in seen:
                found.append(about(node, "structure", f"%{source.name} is read before it is computed", fix))
            elif node not in source.users:
                found.append(about(node, "structure", f"%{source.name} does not know that it is read here", fix))
        names.add(node.name)
        seen.add(node)
    return found + list(_output_problems(program)) + _lint(program, bool(found))


def _lint(program: Program, known: bool) -> list[Diagnostic]:
    if known:
        return []
    try:
        program.graph.lint()
    except RuntimeError as error:
        rule = str(error).splitlines()[0]
        return [Diagnostic("structure", f"torch.fx finds the graph malformed: {rule}", "rebuild the graph with Editor")]
    return []


def _output_problems(program: Program) -> Iterator[Diagnostic]:
    outputs = [n for n in program.graph.nodes if n.op == "output"]
    fix = "return a tuple of computed values, logits first, in one output node at the end of the graph"
    if len(outputs) != 1:
        yield Diagnostic("structure", f"a program has one output node, but this one has {len(outputs)}", fix)
        return
    output = outputs[0]
    if output.next.op != "root":
        yield about(output, "structure", "the output node must be the last one", fix)
    values = output.args[0] if output.args else ()
    if not isinstance(values, (tuple, list, fx.Node)) or values in ((), []):
        yield about(output, "structure", "the program returns nothing", fix)
    elif not all(isinstance(v, fx.Node) for v in (values if isinstance(values, (tuple, list)) else (values,))):
        yield about(output, "structure", "what is returned must be computed values", fix)


def check_types(program: Program) -> list[Diagnostic]:
    """Report values without a type, and calls whose type is not of the form their operator returns."""
    found: list[Diagnostic] = []
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        kind = node.meta.get(TYPE)
        if not is_value_type(kind):
            found.append(about(node, "types", "every value has a type", TYPE_FIX))
        elif isinstance(node.target, torch._ops.OpOverload):
            rule = _form_problem(node.target, kind)
            if rule:
                found.append(about(node, "types", rule, TYPE_FIX))
    return found


def _form_problem(target: torch._ops.OpOverload, kind: Any) -> str:
    forms = [str(r.type) for r in target._schema.returns]
    if len(forms) > 1:
        if not isinstance(kind, tuple) or len(kind) != len(forms):
            return f"{op_name(target)} returns {len(forms)} values, but the type is {type_text(kind)}"
    elif forms == ["Tensor"] and not isinstance(kind, TensorType):
        return f"{op_name(target)} returns one tensor, but the type is {type_text(kind)}"
    elif forms == ["List[Tensor]"] and not isinstance(kind, tuple):
        return f"{op_name(target)} returns a list of tensors, but the type is {type_text(kind)}"
    elif forms and forms[0] in ("int", "SymInt", "float", "bool") and not isinstance(kind, ScalarType):
        return f"{op_name(target)} returns a number, but the type is {type_text(kind)}"
    return ""


def check_operands(program: Program) -> list[Diagnostic]:
    """Report calls whose arguments do not fit the schema, or whose types break a row of `OP_CHECKS`/`CODE_CHECKS`."""
    found: list[Diagnostic] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            name = op_name(node.target)
        except NomulError:
            continue  # the whitelist reports it
        check = OP_CHECKS.get(name) or CODE_CHECKS.get(name)
        if check is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            check = pointwise
        site = site_of(node)
        if site is None:
            found.append(about(node, "operands", f"the arguments do not fit {node.target._schema}", "correct them"))
        elif check is not None:
            found += [about(node, "operands", f"{name}: {rule}", TYPE_FIX) for rule in check(site)]
    return found


def check_params(program: Program) -> list[Diagnostic]:
    """Report parameters read under a name or type that is not the store's, and names that extend others."""
    found: list[Diagnostic] = []
    params, aliases = program.params, program.params.aliases()
    for node in program.param_nodes():
        name = str(node.target)
        if name in aliases:
            fix = "read it through Editor.param, which resolves tied names"
            found.append(about(node, "params", f"@{name} is tied to @{aliases[name]}; only that name is read", fix))
        elif name not in params:
            found.append(about(node, "params", f"@{name} is not in the store", "write it through Editor.param"))
        elif node.meta.get(TYPE) != params.type_of(name):
            fix = "write parameters through Editor.param, which corrects the type"
            found.append(about(node, "params", f"@{name} is {params.type_of(name)} in the store", fix))
    names = sorted((*params, *aliases))
    for name in names:
        parts = name.split(".")
        stems = (".".join(parts[:k]) for k in range(1, len(parts)))
        for stem in stems:
            if stem in params:
                fix = "drop the old parameter (Editor.sweep), or store the new one beside it as `stem_codes`"
                found.append(Diagnostic("params", f"@{name} extends the name of another parameter, @{stem}", fix))
    return found


CHECKS: tuple[Row, ...] = (
    ("structure", check_structure),
    ("types", check_types),
    ("params", check_params),
    ("operands", check_operands),
)
