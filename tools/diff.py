"""Compare two programs: the lines that differ, repeated changes shown once, and the weights that differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools import console
from tools.entry import run

if TYPE_CHECKING:
    from ir.program import Program


@dataclass(frozen=True)
class WeightChange:
    """One parameter that differs: `only in A`, `only in B`, `type` or `values`, and the largest absolute difference."""

    name: str
    change: str
    entries: int | None = None
    max_abs: float | None = None


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options."""
    p = argparse.ArgumentParser(prog="nomul diff", description=__doc__)
    p.add_argument("a", metavar="A", help="artifact, .ir file or any model")
    p.add_argument("b", metavar="B", help="the same, to compare with")
    p.add_argument("--ir-only", action="store_true", help="leave the weights alone")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, which is 0 for different programs too."""
    options = parser().parse_args(argv)
    from ir.diff import diff

    a, b = _read(options.a), _read(options.b)
    text = diff(a, b)
    no_weights = options.ir_only or any(Path(p).suffix == ".ir" for p in (options.a, options.b))
    changes = [] if no_weights else weight_changes(a, b)
    if options.json:
        console.print_json(
            {
                "equal": not text and not changes,
                "ir": text,
                "weights_compared": not no_weights,
                "weights": [asdict(c) for c in changes],
            }
        )
    else:
        print(_text(text, changes, compared=not no_weights))
    return 0


def weight_changes(a: Program, b: Program) -> list[WeightChange]:
    """Return the parameters that are not bit for bit the same in both programs, by name, one tensor read at a time."""
    names = sorted({*a.params, *b.params})
    found = []
    with console.progress("weights", len(names)) as step:
        for name in names:
            change = _change(a, b, name)
            found += [] if change is None else [change]
            step("")
    return found


def _change(a: Program, b: Program, name: str) -> WeightChange | None:
    import torch

    if name not in a.params or name not in b.params:
        return WeightChange(name, "only in A" if name in a.params else "only in B")
    if a.params.type_of(name) != b.params.type_of(name):
        return WeightChange(name, f"{a.params.type_of(name)} -> {b.params.type_of(name)}")
    x, y = a.params.get(name), b.params.get(name)
    # Compared as bytes, so that NaN equals itself and -0.0 differs from 0.0.
    if torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)):
        return None
    difference = (x.double() - y.double()).abs()
    return WeightChange(name, "values", int((x != y).sum()), float(difference.max()))


def _read(model: str) -> Program:
    from frontend.open import open_model
    from tools.inspect import read_ir

    path = Path(model).expanduser()
    return read_ir(path) if path.suffix == ".ir" else open_model(model, console.note).program


def _text(text: str, changes: list[WeightChange], compared: bool) -> str:
    parts = [text.rstrip("\n") or "the programs are the same"]
    if compared and not changes:
        parts.append("the weights are the same")
    if changes:
        rows = [(c.name, c.change, c.entries, c.max_abs) for c in changes]
        parts.append(console.table(("weight", "change", "entries", "max abs"), rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
