"""Measure how fast things run here: `solver` for the shift-add solver; nothing is judged, ratios are reported."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.errors import UsageError
from tools import console
from tools.entry import run

if TYPE_CHECKING:
    from tools.solver_bench import Settings

_SHAPES = ["576x576", "1536x576", "4096x4096"]
_QUICK_SHAPES = ["576x576"]
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options."""
    p = argparse.ArgumentParser(prog="nomul bench", description=__doc__)
    p.add_argument("what", metavar="solver", help="what to measure")
    p.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS", help=f"layers ({' '.join(_SHAPES)})")
    p.add_argument("--bits", type=int, default=3, metavar="N", help="sign planes (3)")
    p.add_argument("--quick", action="store_true", help="one repetition, few tokens, and one small layer by default")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    if options.what != "solver":
        raise UsageError(
            "only the solver can be measured so far",
            where=options.what,
            why="there are no fast kernels yet that an artifact could run on",
            fix="run `python -m tools.bench solver`",
        )
    settings = _settings(options)
    from tools.solver_bench import as_text, measure

    found = measure(settings, console.note)
    if options.json:
        console.print_json(found)
    else:
        print(as_text(found))
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    from tools.solver_bench import Settings

    shapes = options.shapes or (_QUICK_SHAPES if options.quick else _SHAPES)
    matches = [(text, _SHAPE.fullmatch(text)) for text in shapes]
    for text, match in matches:
        if match is None:
            raise UsageError("a shape is written ROWSxCOLUMNS", where=text, fix="write for example 4096x4096")
    sizes = tuple((int(match[1]), int(match[2])) for _, match in matches if match is not None)
    return Settings(sizes, options.bits, options.quick)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
