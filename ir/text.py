"""The text form of a program: what `dump` prints, `ir.parse.parse` reads back as the same program."""

from __future__ import annotations

import builtins
import json
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ir.errors import InvariantError, UnsupportedError
from ir.program import ORIGIN, PATH, TYPE, Program
from ir.types import ValueType, dtype_text, type_text

_OPERATORS = (
    *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_"),
)
_SYMBOLIC = ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float", "sym_ite", "sym_sum", "_sym_sqrt")

# The only plain functions a program may call: arithmetic on sizes, and taking one value out of a tuple.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt", "log2")},
    "builtins.round": builtins.round,
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

BARE_PARAM = re.compile(r"[A-Za-z0-9_./-]+")
BARE_WORD = re.compile(r"[A-Za-z0-9_./+-]+")
BARE_PATH = re.compile(r'[^\s|"]+')


def op_name(target: Any) -> str:
    """Return the name of what a call node calls, without overload: `aten.linear`, `operator.add`.

    Raises UnsupportedError for a function that is neither an operator overload nor in `FUNCTIONS`.
    """
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"{namespace}.{name}"
    if target not in _FUNCTION_NAMES:
        raise UnsupportedError(
            f"a program cannot call {target}",
            where=str(target),
            why="calls are of ATen or nomul operator overloads, or of the few functions on sizes in ir.text.FUNCTIONS",
            fix="rewrite the call in the frontend, or add the function to ir.text.FUNCTIONS if it is pure",
        )
    return _FUNCTION_NAMES[target]


def target_text(target: Any) -> str:
    """Return the text of a call target: its `op_name`, and the overload unless that is `default`."""
    name = op_name(target)
    overload = getattr(target, "_overloadname", "default")
    return name if overload == "default" else f"{name}.{overload}"


def param_text(name: str) -> str:
    """Return the text of a parameter: `@name`, quoted where the name has characters of its own."""
    return f"@{name}" if BARE_PARAM.fullmatch(name) else f"@{json.dumps(name)}"


def value_text(value: Any) -> str:
    """Return the text of one argument; raises UnsupportedError for a value no program holds."""
    if isinstance(value, fx.Node):
        return param_text(str(value.target)) if value.op == "get_attr" else f"%{value.name}"
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        inner = ", ".join(map(value_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    return _rare_text(value)


def _rare_text(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return _dtype_text(value)
    if isinstance(value, slice):
        return f"slice({value_text(value.start)}, {value_text(value.stop)}, {value_text(value.step)})"
    for kind, word in ((torch.device, "device"), (torch.layout, "layout"), (torch.memory_format, "format")):
        if isinstance(value, kind):
            return f"{word}({str(value).removeprefix('torch.')})"
    raise UnsupportedError(
        f"a program cannot hold the argument {value!r}",
        where=str(value),
        why=f"it is a {type(value).__name__}, which has no text form",
        fix="pass nodes, numbers, strings, dtypes, devices, layouts, memory formats, slices, lists and tuples only",
    )


def _dtype_text(dtype: torch.dtype) -> str:
    try:
        return dtype_text(dtype)
    except KeyError:
        raise UnsupportedError(f"a program cannot hold the dtype {dtype}", fix="convert it in the frontend") from None


def node_line(node: fx.Node) -> str:
    """Return the line of a placeholder, call or output node; raises UnsupportedError for other nodes and odd values."""
    suffix = _suffix(node)
    if node.op == "placeholder":
        return f"input  %{node.name}{suffix}"
    if node.op == "output":
        return f"return {value_text(node.args[0] if node.args else ())}{suffix}"
    if node.op == "get_attr":
        return f"param  {param_text(str(node.target))}{suffix}"
    if node.op != "call_function":
        raise UnsupportedError(f"a program cannot hold the {node.op} node {node.name}", fix="inline it in the frontend")
    arguments = [value_text(a) for a in node.args]
    arguments += [f"{key}={value_text(a)}" for key, a in node.kwargs.items()]
    return f"%{node.name} = {target_text(node.target)}({', '.join(arguments)}){suffix}"


def _suffix(node: fx.Node) -> str:
    meta, text = node.meta, ""
    if TYPE in meta:
        text = f" : {_type_text(meta[TYPE])}"
    path, origin = meta.get(PATH), meta.get(ORIGIN)
    if path:
        text += f"   # {_word(str(path), BARE_PATH)}"
    if origin:
        text += f"{'' if path else '   #'} | by {_word(str(origin), BARE_PATH)}"
    return text


def _type_text(kind: ValueType) -> str:
    try:
        return type_text(kind)
    except KeyError as error:
        raise UnsupportedError(f"a program cannot hold the dtype {error}", fix="convert it in the frontend") from None


def _word(text: str, bare: re.Pattern[str]) -> str:
    return text if bare.fullmatch(text) else json.dumps(text)


def header_line(program: Program) -> str:
    """Return the first line of a program's text: name, level, facts, symbols, history, attributes."""
    parts = ["program", _word(program.name, BARE_WORD), f"level={_word(program.level, BARE_WORD)}"]
    for key, words in (("facts", sorted(program.facts)), ("symbols", program.symbols)):
        if words:
            parts.append(f"{key}=[{', '.join(_word(w, BARE_WORD) for w in words)}]")
    if program.history:
        parts.append(f"history={json.dumps(list(program.history))}")
    if program.attributes:
        try:
            parts.append(f"attributes={json.dumps(program.attributes, sort_keys=True)}")
        except (TypeError, ValueError) as error:
            raise InvariantError(
                f"the attributes of program {program.name} are not JSON", why=str(error), fix="store plain values there"
            ) from None
    return " ".join(parts)


def param_lines(program: Program) -> list[str]:
    """Return the lines of parameters (those read, in graph order, then the others by name) and of tied names."""
    lines: dict[str, str] = {}
    for node in program.param_nodes():
        if node.users:
            lines.setdefault(str(node.target), node_line(node))
    for name in sorted(program.params):
        if name not in lines:
            lines[name] = f"param  {param_text(name)} : {_type_text(program.params.type_of(name))}"
    ties = sorted(program.params.aliases().items())
    return [*lines.values(), *(f"tied   {param_text(alias)} = {param_text(name)}" for alias, name in ties)]


def dump(program: Program) -> str:
    """Return the text of a program, one line a parameter, input or call; `ir.parse.parse` gives the same program back.

    Raises UnsupportedError, naming it, for a node, function, dtype or argument that has no text form.
    """
    lines = [header_line(program), *param_lines(program)]
    nodes = [n for n in program.graph.nodes if n.op != "get_attr"]
    lines += [node_line(n) for n in nodes if n.op == "placeholder"]
    lines += [node_line(n) for n in nodes if n.op not in ("placeholder", "output")]
    lines += [node_line(n) for n in nodes if n.op == "output"]
    return "\n".join(lines) + "\n"
