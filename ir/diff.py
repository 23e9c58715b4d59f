"""The difference of two programs as text, in which a change repeated in every block is shown once with a count."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ir.program import Program
from ir.text import dump

_TOKEN = re.compile(r'[%@][A-Za-z0-9_./-]+|@"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")
_SUFFIX = re.compile(r"_\d+(?=_|$)")
_INDEXED = re.compile(r"^(.*?)\.(\d+)(?=\.|$)")


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
    """Return the changes between two texts in order, those of one block together."""
    before, after = old.splitlines(), new.splitlines()
    blocks: dict[tuple[str, int], list[str]] = {}
    found: list[list[str]] = []
    owners: list[tuple[str, int] | None] = []
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        loose = True
        for line in [] if tag == "equal" else [*_signed("-", before[i:j]), *_signed("+", after[k:m])]:
            block = block_of(line)
            if block is None and loose and found and owners[-1] is None and found[-1] is last:
                last.append(line)
                continue
            loose = block is None
            if block is None or block not in blocks:
                last = []
                found.append(last)
                owners.append(block)
            if block is not None:
                last = blocks.setdefault(block, last)
            last.append(line)
    return [Change(tuple(lines), owner) for lines, owner in zip(found, owners, strict=True)]
