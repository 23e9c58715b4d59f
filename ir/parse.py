"""Reads the text form of a program back: the inverse of `ir.text.dump`, with errors that point at a column."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import ir.ops  # noqa: F401 - registers the nomul operators that a text may name
from ir.cursor import DEPTH, STRING, Cursor, read_type
from ir.errors import UnsupportedError, UsageError
from ir.params import Entry, ParamStore
from ir.program import LEVELS, ORIGIN, PATH, TYPE, Program, flat_name
from ir.text import FUNCTIONS
from ir.types import TensorType, dtype_of_text, is_dtype_text

SEEDED_STD = 0.02

_PARAM = re.compile(rf"@(?:([A-Za-z0-9_./-]+)|({STRING}))")
_NODE = re.compile(r"%([A-Za-z_][A-Za-z0-9_]*)")
_VALUE = re.compile(
    r"%(?P<node>[A-Za-z_][A-Za-z0-9_]*)"
    rf"|(?P<param>@(?:[A-Za-z0-9_./-]+|{STRING}))"
    r"|(?P<float>-?(?:\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|inf\b|nan\b))"
    r"|(?P<int>-?\d{1,40})"
    rf"|(?P<string>{STRING})"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<open>[\[(])"
)
_KEYWORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")
_TARGET = re.compile(r"[A-Za-z_]\w*(?:\.\w+){1,2}(?=\()")
_COMMENT = re.compile(rf'#(?:\s+(?P<path>(?!\|)(?:{STRING}|[^\s|"]+)))?(?:\s*\|\s*by\s+(?P<by>{STRING}|[^\s|"]+))?\s*$')
_WORDS: dict[str, Any] = {"True": True, "False": False, "None": None}
_SIGNED = re.compile(r"(device|layout|format)\(([A-Za-z0-9_:]+)\)")


class SeededSource:
    """Parameters of declared types, made when read: floats N(0, 0.02) seeded by name, everything else zeros."""

    def __init__(self, types: dict[str, TensorType]) -> None:
        self._types = types

    def names(self) -> tuple[str, ...]:
        return tuple(self._types)

    def type_of(self, name: str) -> TensorType:
        return self._types[name]

    def stored_bytes(self, name: str) -> int:
        return self._types[name].nbytes

    def load(self, name: str) -> torch.Tensor:
        kind = self._types[name]
        size = [int(d) for d in kind.dims]
        if not (kind.dtype.is_floating_point or kind.dtype.is_complex):
            return torch.zeros(size, dtype=kind.dtype)
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
        wide = torch.float32 if kind.dtype.itemsize < 4 else kind.dtype
        return (torch.randn(size, dtype=wide, generator=generator) * SEEDED_STD).to(kind.dtype)


@dataclass
class _Reading:
    """What has been read so far."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    taken: frozenset[str] = frozenset()
    values: dict[str, fx.Node] = field(default_factory=dict)
    params: dict[str, fx.Node] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    returned: bool = False


def parse(text: str, params: ParamStore | None = None) -> Program:
    """Return the program a text describes, one `get_attr` node for each parameter that is read.

    params: store with the weights (a clone of it becomes the program's); None makes up deterministic random ones.
    Raises UsageError with line and column for a malformed text, UnsupportedError when `params` does not fit it.
    """
    lines = list(_lines(text))
    if not lines:
        raise UsageError("the program text is empty", fix="give a text that starts with a `program` line")
    header = _header(lines[0])
    reading = _Reading(taken=frozenset(m.group(1) for line in lines if (m := _defined(line.text))))
    for line in lines[1:]:
        if reading.returned:
            raise line.wrong("nothing after the `return` line")
        _statement(reading, line)
    if not reading.returned:
        lines[-1].at = len(lines[-1].text)
        raise lines[-1].wrong("a `return` line after this one")
    for node in reading.params.values():
        if not node.users:
            reading.graph.erase_node(node)
    return Program(reading.graph, _store(reading, params), **header)


def _lines(text: str) -> Iterator[Cursor]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield Cursor(line.rstrip("\r"), number)


def _defined(line: str) -> re.Match[str] | None:
    return re.match(r"\s*(?:input\s+)?%([A-Za-z_][A-Za-z0-9_]*)", line)


def _header(line: Cursor) -> dict[str, Any]:
    line.need(re.compile(r"program(?=\s)"), "the header `program NAME level=LEVEL ...`")
    header: dict[str, Any] = {"name": line.word("the program's name")}
    while match := line.take(_KEYWORD):
        key = match.group(1)
        if key == "level":
            header[key] = line.word("a level")
            if header[key] not in LEVELS:
                raise line.wrong(f"one of the levels {', '.join(LEVELS)}")
        elif key in ("facts", "symbols"):
            header[key] = (frozenset if key == "facts" else tuple)(_words(line))
        elif key in ("history", "attributes"):
            value = line.json()
            if not isinstance(value, list if key == "history" else dict):
                raise line.wrong("a JSON list" if key == "history" else "a JSON object")
            header[key] = tuple(value) if key == "history" else value
        else:
            raise line.wrong("level=, facts=, symbols=, history= or attributes=", f"the header has no field {key}")
    line.end()
    return header


def _words(line: Cursor) -> list[str]:
    line.want("[")
    words: list[str] = []
    while not line.has("]"):
        if words:
            line.want(",")
        words.append(line.word("a word"))
    return words


def _statement(reading: _Reading, line: Cursor) -> None:
    match = line.take(re.compile(r"(?:param|tied|input|return)(?=[\s(\[])|(?=%)"))
    if match is None:
        raise line.wrong("param, tied, input, %NAME = ... or return")
    _STATEMENTS[match.group()](reading, line)
    line.end()


def _read_param(reading: _Reading, line: Cursor) -> None:
    name = _new_param(reading, line)
    line.want(":")
    kind = read_type(line)
    if not isinstance(kind, TensorType) or not all(isinstance(d, int) and d >= 0 for d in kind.dims):
        raise line.wrong("a tensor type whose dims are all numbers")
    flat = flat_name(name)
    while flat in reading.taken:
        flat += "_"
    node = reading.graph.create_node("get_attr", name, name=flat)
    node.meta = {TYPE: kind, **_provenance(line)}
    reading.params[name], reading.types[name] = node, kind


def _new_param(reading: _Reading, line: Cursor) -> str:
    match = line.need(_PARAM, "a parameter `@name`")
    name = match.group(1) or line.unquote(match.group(2))
    if name in reading.types or name in reading.ties:
        raise line.wrong("a new name", f"@{name} is declared twice")
    return name


def _read_tied(reading: _Reading, line: Cursor) -> None:
    alias = _new_param(reading, line)
    line.want("=")
    reading.ties[alias] = str(_param(reading, line, line.need(_PARAM, "a parameter `@name`").group()).target)


def _read_input(reading: _Reading, line: Cursor) -> None:
    name = line.need(_NODE, "an input `%name`").group(1)
    node = reading.graph.create_node("placeholder", name, name=name)
    _define(reading, line, name, node)
    _finish(line, node)


def _read_call(reading: _Reading, line: Cursor) -> None:
    name = line.need(_NODE, "`%name`").group(1)
    line.want("=")
    line.skip()
    start = line.at
    text = line.need(_TARGET, "an op such as `aten.linear(`").group()
    target = resolve_target(text)
    if target is None:
        line.at = start
        raise line.wrong("a registered operator, or a function of ir.text.FUNCTIONS", f"there is no op {text}")
    line.want("(")
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    while not line.has(")"):
        if args or kwargs:
            line.want(",")
        if keyword := line.take(_KEYWORD):
            kwargs[keyword.group(1)] = _value(reading, line)
        elif kwargs:
            raise line.wrong("`key=value`, as named arguments come last")
        else:
            args.append(_value(reading, line))
    node = reading.graph.create_node("call_function", target, tuple(args), kwargs, name)
    _define(reading, line, name, node)
    _finish(line, node)


def _read_return(reading: _Reading, line: Cursor) -> None:
    node = reading.graph.output(_value(reading, line))
    _finish(line, node)
    reading.returned = True


_STATEMENTS: dict[str, Callable[[_Reading, Cursor], None]] = {
    "param": _read_param,
    "tied": _read_tied,
    "input": _read_input,
    "return": _read_return,
    "": _read_call,
}


def _define(reading: _Reading, line: Cursor, name: str, node: fx.Node) -> None:
    if name in reading.values:
        raise line.wrong("a new name", f"%{name} is defined twice")
    if node.name != name:
        raise line.wrong("a name that Python leaves free", f"%{name} cannot be the name of a value")
    reading.values[name] = node


def _finish(line: Cursor, node: fx.Node) -> None:
    if line.has(":"):
        node.meta[TYPE] = read_type(line)
    node.meta.update(_provenance(line))


def _provenance(line: Cursor) -> dict[str, str]:
    line.skip()
    if not line.text.startswith("#", line.at):
        return {}
    match = line.need(_COMMENT, "a comment `# module.path | by pass`")
    pairs = ((PATH, match.group("path")), (ORIGIN, match.group("by")))
    return {key: line.unquote(text) for key, text in pairs if text}


def _value(reading: _Reading, line: Cursor, depth: int = 0) -> Any:
    match = line.take(_VALUE)
    if match is None or depth > DEPTH:
        raise line.wrong("a value: %node, @param, a number, string, dtype, list or tuple")
    kind, text = match.lastgroup, match.group()
    if kind == "node":
        node = reading.values.get(text[1:])
        if node is None:
            line.at = match.start()
            raise line.wrong("a name defined on a line above", f"{text} is not defined")
        return node
    if kind == "param":
        return _param(reading, line, text)
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    if kind == "string":
        return line.unquote(text)
    if kind == "open":
        return _sequence(reading, line, text, depth)
    return _named_value(reading, line, match, depth)


def _param(reading: _Reading, line: Cursor, text: str) -> fx.Node:
    name = line.unquote(text[1:])
    node = reading.params.get(reading.ties.get(name, name))
    if node is None:
        line.at -= len(text)
        raise line.wrong("a parameter declared by a `param` line above", f"{text} is not declared")
    return node


def _sequence(reading: _Reading, line: Cursor, bracket: str, depth: int) -> list[Any] | tuple[Any, ...]:
    items: list[Any] = []
    close = "]" if bracket == "[" else ")"
    while not line.has(close):
        if items:
            line.want(",")
            if line.has(close):
                break
        items.append(_value(reading, line, depth + 1))
    return items if bracket == "[" else tuple(items)


def _named_value(reading: _Reading, line: Cursor, match: re.Match[str], depth: int) -> Any:
    word = match.group()
    if word in _WORDS:
        return _WORDS[word]
    if is_dtype_text(word):
        return dtype_of_text(word)
    if word == "slice" and line.text.startswith("(", line.at):
        parts = _sequence(reading, line, line.need(re.compile(r"\("), "`(`").group(), depth)
        if len(parts) != 3:
            raise line.wrong("`slice(start, stop, step)`")
        return slice(*parts)
    line.at = match.start()
    signed = line.take(_SIGNED)
    value = None if signed is None else _torch_value(signed.group(1), signed.group(2))
    if value is None:
        line.at = match.start()
        raise line.wrong(
            "True, False, None, a dtype, slice(..), device(..), layout(..) or format(..)", f"{word} is no value"
        )
    return value


def _torch_value(word: str, name: str) -> Any:
    if word == "device":
        try:
            return torch.device(name)
        except RuntimeError:
            return None
    value = getattr(torch, name, None)
    return value if isinstance(value, torch.layout if word == "layout" else torch.memory_format) else None


@functools.cache
def resolve_target(text: str) -> Any:
    """Return the overload or function that `ir.text.target_text` prints as `text`, or None if there is none."""
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    namespace, name, *overload = text.split(".")
    try:
        target = getattr(getattr(getattr(torch.ops, namespace), name), overload[0] if overload else "default")
    except AttributeError:
        return None
    return target if isinstance(target, torch._ops.OpOverload) else None


def _store(reading: _Reading, given: ParamStore | None) -> ParamStore:
    if given is None:
        store, source = ParamStore(), SeededSource(reading.types)
        for name, kind in reading.types.items():
            by = reading.params[name].meta.get(ORIGIN, "")
            store.enter(name, Entry(source, name, kind, by))
    else:
        store = given.clone()
        _check_fit(reading.types, store)
    for alias, name in reading.ties.items():
        store.tie(alias, name)
    return store


def _check_fit(types: dict[str, TensorType], store: ParamStore) -> None:
    wrong = []
    for name, kind in types.items():
        if name not in store:
            wrong.append(f"@{name}: declared {kind}, absent from the weights")
        elif store.type_of(name) != kind:
            wrong.append(f"@{name}: declared {kind}, the weights have {store.type_of(name)}")
    if wrong:
        raise UnsupportedError(
            f"the weights do not fit the program text in {len(wrong)} of {len(types)} parameters",
            where="; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else ""),
            why="text and weights are of different programs, or one of them was changed",
            fix="read both from the same artifact",
        )
