"""What commands print: results to stdout, progress and notes to stderr, plain wherever no person is watching."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_LINE_SECONDS = 10.0


def note(text: str) -> None:
    """Print one line of progress or advice to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print one JSON object to stdout; sizes and figures as numbers, NaN and infinity as null."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return aligned columns as text, numbers to the right; floats in four significant digits."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    right = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    lines = []
    for row in (list(columns), *texts):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size_text(count: int) -> str:
    """Return a number of bytes in binary units: `98.4 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def duration_text(seconds: float) -> str:
    """Return a duration in whole seconds: `42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def watched() -> bool:
    """Return whether stderr is a terminal that may be drawn on: NO_COLOR unset and TERM not dumb."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """Give a function to call after each of `total` equal steps, with a word on how it goes.

    On a terminal this is a bar; elsewhere plain lines, one in ten seconds at most, and always the last.
    """
    if watched():
        with _bar(label, total) as step:
            yield step
    else:
        yield _lines(label, total)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[word]}"))
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, word="")
        yield lambda word: bar.update(task, advance=1, word=word)


def _lines(label: str, total: int) -> Callable[[str], None]:
    start = shown = time.monotonic()
    done = 0

    def step(word: str) -> None:
        nonlocal done, shown
        done += 1
        now = time.monotonic()
        if done == total or now - shown >= _LINE_SECONDS:
            shown, eta = now, (now - start) / done * (total - done)
            note(f"{label} {done}/{total}{word and '  ' + word}  eta {duration_text(eta)}")

    return step


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finite(value: object) -> object:
    """Return a JSON-able value with NaN and infinity as None."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value
