"""The options of a pass: its dataclass fields, with text converted by their annotations and back."""

from __future__ import annotations

import re
import types
import typing
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any, Literal

from passes.base import Pass
from passes.grammar import BARE, Atom, Value, quote

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf")
_SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Option:
    """One option of a pass; `default` is dataclasses.MISSING where the option must be given."""

    name: str
    annotation: Any
    default: Any
    help: str = ""

    def __str__(self) -> str:
        """Return `name: type = default`, in the words of pipeline text."""
        tail = "" if self.default is MISSING else f" = {value_text(self.annotation, self.default)}"
        return f"{self.name}: {type_text(self.annotation)}{tail}"


@cache
def options_of(kind: type[Pass]) -> tuple[Option, ...]:
    """Return the options of a pass in field order; raise TypeError if one has a type that text cannot give."""
    hints = typing.get_type_hints(kind)
    found = []
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.init:
            _check_annotation(kind, field.name, hints[field.name])
            found.append(Option(field.name, hints[field.name], default, field.metadata.get("help", "")))
    return tuple(found)


def did_you_mean(word: str, choices: typing.Iterable[str]) -> str:
    """Return "did you mean `x`? " for the choice nearest to a word, or nothing if none is near."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`? " if near else ""


def type_text(annotation: Any) -> str:
    """Return how help and errors name a type: `int`, `row|column`, `list of float`, `int|none`."""
    if _is_union(annotation):
        return "|".join(type_text(member) for member in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        members = typing.get_args(annotation)
        if members[-1] is Ellipsis:
            return f"list of {type_text(members[0])}"
        return f"[{' '.join(type_text(member) for member in members)}]"
    if typing.get_origin(annotation) is Literal:
        return "|".join(_words(choice)[0] for choice in typing.get_args(annotation))
    if annotation is types.NoneType:
        return "none"
    if issubclass(annotation, Enum):
        return "|".join(_words(choice)[0] for choice in annotation)
    return str(annotation.__name__)


def convert(annotation: Any, value: Value) -> Any:
    """Return the value that text stands for under an annotation; raise ValueError that says what was expected."""
    if _is_union(annotation):
        return _convert_union(annotation, value)
    if typing.get_origin(annotation) is tuple:
        return _convert_tuple(annotation, value)
    if isinstance(value, tuple):
        raise ValueError(f"it takes one {type_text(annotation)}, not a list")
    for choice in _choices(annotation):
        if value.text in _words(choice) and (isinstance(choice, (str, Enum)) or not value.quoted):
            return choice
    if annotation is str:
        return value.text
    if not value.quoted and annotation is int and _INT.fullmatch(value.text):
        return int(value.text)
    if not value.quoted and annotation is float and _FLOAT.fullmatch(value.text):
        return float(value.text)
    shown = quote(value.text) if value.quoted else f"`{value.text}`"
    hint = "" if value.quoted else did_you_mean(value.text, [_words(choice)[0] for choice in _choices(annotation)])
    raise ValueError(f"{shown} is not {type_text(annotation)}{hint and '; ' + hint.strip()}")


def value_text(annotation: Any, value: Any) -> str:
    """Return the text that `convert` reads back as this value; raise ValueError if the annotation has none."""
    if isinstance(value, tuple):
        for member in _members(annotation):
            try:
                return _list_text(member, value)
            except ValueError:
                continue
        raise ValueError(f"no text gives {value!r} as {type_text(annotation)}")
    for word in _words(value):
        for atom, text in ((Atom(word), word), (Atom(word, quoted=True), quote(word))):
            if (atom.quoted or BARE.fullmatch(word)) and _reads_as(annotation, atom, value):
                return text
    raise ValueError(f"no text gives {value!r} as {type_text(annotation)}")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if _is_union(annotation) else (annotation,)


def _check_annotation(kind: type[Pass], name: str, annotation: Any) -> None:
    for member in _members(annotation):
        if typing.get_origin(member) is tuple:
            for part in typing.get_args(member):
                if part is not Ellipsis:
                    _check_annotation(kind, name, part)
        elif typing.get_origin(member) is not Literal and not (
            isinstance(member, type) and (member in (*_SCALARS, types.NoneType) or issubclass(member, Enum))
        ):
            raise TypeError(f"{kind.__name__}.{name} has type {annotation!r}, which pipeline text cannot give")


def _choices(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    if annotation is types.NoneType:
        return (None,)
    if annotation is bool:
        return (True, False)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(annotation)
    return ()


def _words(value: Any) -> tuple[str, ...]:
    """Return the texts that may stand for a value, the canonical one first."""
    if value is None:
        return ("none",)
    if isinstance(value, bool):
        return (str(value).lower(),)
    if isinstance(value, Enum):
        return (value.name.lower(), value.name)
    if isinstance(value, int):
        return (str(value), repr(float(value))) if abs(value) < 2**53 else (str(value),)
    return (repr(value),) if isinstance(value, float) else (str(value),)


def _strictness(annotation: Any) -> int:
    # `4` under float|int is the int and `none` under str|None is None, so a looser type is asked after a stricter one.
    order = (types.NoneType, bool, int, float)
    return order.index(annotation) if annotation in order else len(order) + (annotation is str)


def _convert_union(annotation: Any, value: Value) -> Any:
    reasons = []
    for member in sorted(typing.get_args(annotation), key=_strictness):
        try:
            return convert(member, value)
        except ValueError as error:
            reasons.append(str(error))
    shown = value.text if isinstance(value, Atom) else "the list"
    only = [member for member in typing.get_args(annotation) if member is not types.NoneType]
    raise ValueError(reasons[-1] if len(only) == 1 else f"`{shown}` is not {type_text(annotation)}")


def _convert_tuple(annotation: Any, value: Value) -> tuple[Any, ...]:
    atoms = value if isinstance(value, tuple) else (value,)
    members = typing.get_args(annotation)
    if members[-1] is Ellipsis:
        return tuple(convert(members[0], atom) for atom in atoms)
    if len(atoms) != len(members):
        raise ValueError(f"it takes {len(members)} values, not {len(atoms)}: {type_text(annotation)}")
    return tuple(convert(member, atom) for member, atom in zip(members, atoms, strict=True))


def _list_text(annotation: Any, value: tuple[Any, ...]) -> str:
    if typing.get_origin(annotation) is not tuple:
        raise ValueError(f"{type_text(annotation)} is no list")
    members = typing.get_args(annotation)
    kinds = (members[0],) * len(value) if members[-1] is Ellipsis else members
    return f"[{' '.join(value_text(kind, part) for kind, part in zip(kinds, value, strict=True))}]"


def _reads_as(annotation: Any, atom: Atom, value: Any) -> bool:
    try:
        found = convert(annotation, atom)
    except ValueError:
        return False
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)
