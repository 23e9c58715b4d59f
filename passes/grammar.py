"""The syntax of pipeline text; the lexer yields text only, and the fields of a pass give it meaning.

    pipeline = item { "," item }
    item     = name [ "{" { option } "}" ] [ "(" pipeline ")" ]
    option   = key [ "=" value ]                        a bare key is key=true
    value    = atom | "[" { atom } "]"                  atoms of a list stand apart by blanks or commas
    atom     = BARE | '"' JSON string '"'               BARE = [A-Za-z0-9_.:/*+-]+

In a recipe file newlines between items are commas, and `#` starts a comment.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ir.errors import UsageError

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\f]+)|(?P<newline>\n)|(?P<comment>\#[^\n]*)|(?P<bare>[A-Za-z0-9_.:/*+-]+)"""
    r"""|(?P<quoted>"(?:[^"\\\n]|\\.)*")|(?P<mark>[{}()\[\],=])"""
)
BARE = re.compile(r"[A-Za-z0-9_.:/*+-]+")


@dataclass(frozen=True)
class Source:
    """Pipeline text with the name errors call it by; `recipe` turns on newlines as commas and comments."""

    text: str
    label: str = "pipeline"
    recipe: bool = False

    def where(self, pos: int) -> str:
        """Return the place of a character as `label, column 7`, its line, and a caret under it."""
        start = self.text.rfind("\n", 0, pos) + 1
        end = self.text.find("\n", pos)
        line = self.text[start : end if end >= 0 else len(self.text)]
        number = f" line {self.text.count(chr(10), 0, pos) + 1}," if "\n" in self.text.strip("\n") else ""
        shown = line.replace("\t", " ").replace("\r", " ")
        return f"{self.label},{number} column {pos - start + 1}\n      {shown}\n      {' ' * (pos - start)}^"

    def error(self, pos: int, what: str, *, why: str = "", fix: str = "") -> UsageError:
        """Return the error that points at a character."""
        return UsageError(what, where=self.where(pos), why=why, fix=fix)


@dataclass(frozen=True)
class Atom:
    """One word of a value; quoted atoms are always strings."""

    text: str
    quoted: bool = False


Value = Atom | tuple[Atom, ...]


@dataclass(frozen=True)
class OptionText:
    """`key=value` as written; a bare key has the value `true`."""

    key: str
    value: Value
    key_pos: int
    value_pos: int


@dataclass(frozen=True)
class ItemText:
    """One pass as written."""

    name: str
    pos: int
    options: tuple[OptionText, ...] = ()
    nested: tuple[ItemText, ...] = ()
    nested_pos: int = 0


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    pos: int


def _lex(source: Source) -> list[_Token]:
    tokens: list[_Token] = []
    pos = depth = 0
    while pos < len(source.text):
        match = _TOKEN.match(source.text, pos)
        if match is None:
            raise _bad_character(source, pos)
        kind, text = str(match.lastgroup), match.group()
        if kind == "comment" and not source.recipe:
            raise source.error(pos, "a comment is only allowed in a recipe file", fix="leave it out, or write @FILE")
        if kind == "mark":
            depth += (text in "{[") - (text in "}]")
            tokens.append(_Token(text, text, pos))
        elif kind in ("bare", "quoted"):
            tokens.append(_Token(kind, text, pos))
        elif kind == "newline" and source.recipe and depth == 0:
            tokens.append(_Token("newline", text, pos))
        pos = match.end()
    return [*tokens, _Token("end", "", len(source.text))]


def _bad_character(source: Source, pos: int) -> UsageError:
    if source.text[pos] == '"':
        return source.error(pos, "a quoted string is not closed", fix='end it with " on the same line')
    return source.error(
        pos,
        f"character {source.text[pos]!r} has no meaning here",
        why="unquoted words are made of letters, digits and _ . : / * + -",
        fix='put the value in "double quotes"',
    )


class _Cursor:
    def __init__(self, source: Source) -> None:
        self.source, self.tokens, self.index = source, _lex(source), 0

    @property
    def now(self) -> _Token:
        return self.tokens[self.index]

    def take(self, kind: str) -> _Token | None:
        token = self.now
        if token.kind != kind:
            return None
        self.index += 1
        return token

    def newlines(self) -> bool:
        start = self.index
        while self.take("newline"):
            pass
        return self.index > start

    def expected(self, what: str, *, fix: str = "") -> UsageError:
        token = self.now
        found = {"end": "the end", "newline": "a new line"}.get(token.kind, f"`{token.text}`")
        return self.source.error(token.pos, f"expected {what}, found {found}", fix=fix)

    def unclosed(self, opening: _Token, closing: str) -> UsageError:
        return self.source.error(opening.pos, f"`{opening.text}` is never closed", fix=f"add `{closing}`")


def read(source: Source) -> tuple[ItemText, ...]:
    """Return the items of pipeline text, none for blank text; raise UsageError with line, column and caret."""
    cursor = _Cursor(source)
    cursor.newlines()
    if cursor.now.kind == "end":
        return ()
    items = _items(cursor)
    if cursor.now.kind != "end":
        raise cursor.expected("`,` or the end", fix="separate passes by commas, and options by blanks inside {}")
    return items


def _items(cursor: _Cursor) -> tuple[ItemText, ...]:
    items = [_item(cursor)]
    while True:
        broken = cursor.newlines()
        comma = cursor.take(",")
        cursor.newlines()
        if comma is not None and cursor.now.kind in ("end", ")"):
            raise cursor.source.error(comma.pos, "a comma ends the pipeline", fix="remove it, or name another pass")
        if comma is None and (not broken or cursor.now.kind in ("end", ")")):
            return tuple(items)
        items.append(_item(cursor))


def _item(cursor: _Cursor) -> ItemText:
    cursor.newlines()
    name = cursor.take("bare")
    if name is None:
        raise cursor.expected("the name of a pass")
    options = _options(cursor)
    opening = cursor.take("(")
    if opening is None:
        return ItemText(name.text, name.pos, options)
    nested = _items(cursor)
    if not cursor.take(")"):
        raise cursor.unclosed(opening, ")") if cursor.now.kind == "end" else cursor.expected("`,` or `)`")
    return ItemText(name.text, name.pos, options, nested, opening.pos)


def _options(cursor: _Cursor) -> tuple[OptionText, ...]:
    opening = cursor.take("{")
    if opening is None:
        return ()
    options: list[OptionText] = []
    while not cursor.take("}"):
        if cursor.now.kind == "end":
            raise cursor.unclosed(opening, "}")
        options.append(_option(cursor))
    return tuple(options)


def _option(cursor: _Cursor) -> OptionText:
    key = cursor.take("bare")
    if key is None:
        blanks = "separate options by blanks, as in {bits=3 group=64}" if cursor.now.kind == "," else ""
        raise cursor.expected("an option or `}`", fix=blanks)
    if not cursor.take("="):
        return OptionText(key.text, Atom("true"), key.pos, key.pos)
    start = cursor.now
    value = _list(cursor, start) if cursor.take("[") else _atom(cursor)
    return OptionText(key.text, value, key.pos, start.pos)


def _list(cursor: _Cursor, opening: _Token) -> tuple[Atom, ...]:
    atoms: list[Atom] = []
    while not cursor.take("]"):
        if cursor.now.kind == "end":
            raise cursor.unclosed(opening, "]")
        atoms.append(_atom(cursor))
        if cursor.take(",") and cursor.now.kind == "]":
            raise cursor.expected("another value")
    return tuple(atoms)


def _atom(cursor: _Cursor) -> Atom:
    if bare := cursor.take("bare"):
        return Atom(bare.text)
    quoted = cursor.take("quoted")
    if quoted is None:
        raise cursor.expected("a value", fix='put it in "double quotes" if it has other characters than a word')
    try:
        return Atom(json.loads(quoted.text, strict=False), quoted=True)
    except json.JSONDecodeError as error:
        what = "a quoted string has an escape that is not one of JSON's"
        raise cursor.source.error(quoted.pos, what, why=error.msg, fix="write a backslash as two") from None


def quote(text: str) -> str:
    """Return the quoted atom that reads back as `text`."""
    return json.dumps(text)
