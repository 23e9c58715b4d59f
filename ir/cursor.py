"""A cursor over one line of program text, and the value types it reads there."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

from ir.errors import UsageError
from ir.types import Dim, ScalarType, TensorType, ValueType, dtype_of_text, is_dtype_text

DEPTH = 32  # nesting of lists, tuples and types beyond which a text is refused rather than the Python stack used up

STRING = r'"(?:[^"\\]|\\.)*"'
_WORD = re.compile(rf"[A-Za-z0-9_./+-]+|{STRING}")
_BLANK = re.compile(r"\s*")
_TYPED = re.compile(r"([a-z0-9]+)([\[(])")


@dataclass
class Cursor:
    """A place in one line of the text, from which the pieces are taken left to right."""

    text: str
    number: int
    at: int = 0

    def wrong(self, expected: str, why: str = "") -> UsageError:
        """Return the error that shows the line with a caret at the cursor and says what was expected there."""
        problem = why or f"expected {expected}"
        return UsageError(
            f"the program text is wrong at line {self.number}, column {self.at + 1}: {problem}",
            where=f"line {self.number}\n    {self.text}\n    {' ' * self.at}^",
            why=f"expected {expected}" if why else "",
            fix="correct the line, or dump the program again",
        )

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Step over blanks and then over `pattern`, returning its match, or None with the cursor before it."""
        self.skip()
        match = pattern.match(self.text, self.at)
        if match:
            self.at = match.end()
        return match

    def need(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        """Take `pattern`, or raise UsageError."""
        match = self.take(pattern)
        if match is None:
            raise self.wrong(expected)
        return match

    def skip(self) -> None:
        """Step over blanks."""
        match = _BLANK.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def has(self, literal: str) -> bool:
        """Step over `literal` and the blanks before it if it is next."""
        self.skip()
        found = self.text.startswith(literal, self.at)
        if found:
            self.at += len(literal)
        return found

    def want(self, literal: str) -> None:
        """Step over `literal`, or raise UsageError."""
        if not self.has(literal):
            raise self.wrong(f"`{literal}`")

    def end(self) -> None:
        """Raise UsageError unless only blanks are left."""
        self.skip()
        if self.at < len(self.text):
            raise self.wrong("the end of the line")

    def unquote(self, text: str) -> str:
        """Return the word `text` stands for: itself, or what it quotes; raise UsageError when it is misquoted."""
        if not text.startswith('"'):
            return text
        try:
            return str(json.loads(text, strict=False))
        except json.JSONDecodeError as error:
            raise self.wrong("a JSON string", f"the string does not read: {error.msg}") from None

    def word(self, expected: str) -> str:
        """Take a bare or quoted word. or raise UsageError."""
        return self.unquote(self.need(_WORD, expected).group())

    def json(self) -> Any:
        """Take one JSON value. or raise UsageError."""
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except (ValueError, RecursionError) as error:
            raise self.wrong("JSON", f"this is not JSON: {error}") from None
        return value


def read_type(line: Cursor, depth: int = 0) -> ValueType:
    """Return the value type at a cursor: `f32[batch,seq,64]`, `int(seq)`, `(f32[2], i64[2])` or `none`.

    Raises UsageError for anything else.
    """
    if depth > DEPTH:
        raise line.wrong("a type that is not nested so deep")
    if line.has("("):
        kinds: list[ValueType] = []
        while not line.has(")"):
            if kinds:
                line.want(",")
            kinds.append(read_type(line, depth + 1))
        return tuple(kinds)
    if line.has("none"):
        return None
    match = line.need(_TYPED, "a type such as `f32[batch,64]`, `int(seq)`, `(f32[2], i64[2])` or `none`")
    word, bracket = match.groups()
    if bracket == "[" and is_dtype_text(word):
        return TensorType(dtype_of_text(word), _dims(_bracketed(line, "]")))
    if bracket == "(" and word in ("int", "float", "bool"):
        return ScalarType(word, _bracketed(line, ")"))
    line.at = match.start()
    raise line.wrong("a dtype and its dims, or int(..), float(..), bool(..)")


def _bracketed(line: Cursor, close: str) -> str:
    start, depth = line.at, 0
    for place in range(start, len(line.text)):
        char = line.text[place]
        if depth == 0 and char == close:
            line.at = place + 1
            return line.text[start:place]
        depth += (char in "([") - (char in ")]")
    line.at = len(line.text)
    raise line.wrong(f"`{close}` that closes the type")


@functools.lru_cache(4096)
def _dims(text: str) -> tuple[Dim, ...]:
    dims: list[str] = []
    depth, start = 0, 0
    for place, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            dims.append(text[start:place].strip())
            start = place + 1
    if text.strip():
        dims.append(text[start:].strip())
    return tuple(int(d) if re.fullmatch(r"-?\d{1,18}", d) else d for d in dims)
