"""The difference of two programs as text, in which a change repeated in every block is shown once with a count."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ir.program import Program
from ir.text import dump

_TOKEN = re.compile(r'[%@][A-Za-z0-9_./-]+|@"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"   # (?!\| by )(\S+)")
_SUFFIX = re.compile(r"_\d+(?=_|$)")
_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Change:
    """Lines that go (`-`) and come (`+`) together: those of one block, or one stretch of lines outside blocks."""

    lines: tuple[str, ...]
    block: tuple[str, int] | None

    @property
    def shape(self) -> tuple[str, ...]:
        """The lines with indices taken out of names; equal for two changes that differ in nothing else."""
        seen: dict[str, dict[str, int]] = {}
        return tuple(_without_indices(line, seen) for line in self.lines)


def diff(a: Program | str, b: Program | str) -> str:
    """Return what turns the text of `a` into that of `b`, or "" when they are equal.

    Lines that belong to a numbered module or parameter (`layers.3.`) are gathered by it, and blocks that change alike
    up to indices in names are shown once: "30 blocks, layers.0 to layers.29: the same 7 lines".
    """
    old = a if isinstance(a, str) else dump(a)
    new = b if isinstance(b, str) else dump(b)
    groups: dict[tuple[str, ...], list[Change]] = {}
    for change in changes(old, new):
        kind = "block" if change.block else "place"
        groups.setdefault((kind, *change.shape), []).append(change)
    return "".join(f"@@ {_title(group)}\n" + "".join(f"{x}\n" for x in group[0].lines) for group in groups.values())


def changes(old: str, new: str) -> list[Change]:
    """Return the changes between two texts in order of their first line, those of one block together."""
    before, after = old.splitlines(), new.splitlines()
    gathered: dict[tuple[str, int] | int, list[str]] = {}
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for stretch, (tag, i, j, k, m) in enumerate(matcher.get_opcodes()):
        if tag == "equal":
            continue
        for line in [*(f"- {x}" for x in before[i:j]), *(f"+ {x}" for x in after[k:m])]:
            owner = block_of(line)
            gathered.setdefault(stretch if owner is None else owner, []).append(line)
    return [Change(tuple(x), None if isinstance(owner, int) else owner) for owner, x in gathered.items()]


def block_of(line: str) -> tuple[str, int] | None:
    """Return the first numbered module of a line's path, or of its first parameter: `("model.layers", 3)`."""
    comment = _COMMENT.search(line)
    path = comment.group(1) if comment else next((t[1:] for t in _TOKEN.findall(line) if t[0] == "@"), "")
    index = _INDEX.search(path)
    return (path[: index.start()], int(index.group(1))) if index else None


def _without_indices(line: str, seen: dict[str, dict[str, int]]) -> str:
    def anonymous(match: re.Match[str]) -> str:
        token = match.group()
        base = _SUFFIX.sub("", token) if token[0] == "%" else _INDEX.sub(".#", token)
        # Names that differ in indices alone are told apart by order of appearance, so that wiring still counts.
        order = seen.setdefault(base, {})
        return f"{base}#{order.setdefault(token, len(order))}"

    line = _TOKEN.sub(anonymous, line)
    return _COMMENT.sub(lambda match: f"   # {_INDEX.sub('.#', match.group(1))}", line)


def _title(group: list[Change]) -> str:
    count = len(group[0].lines)
    same = f": the same {count} lines" if count > 1 else ": the same line"
    if group[0].block is None:
        return "1 place" if len(group) == 1 else f"{len(group)} places{same}"
    names = [f"{stem}.{index}" for stem, index in (c.block for c in group if c.block)]
    if len(names) == 1:
        return f"1 block, {names[0]}"
    return f"{len(names)} blocks, {names[0]} to {names[-1]}{same}"
