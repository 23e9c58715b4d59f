"""The `nomul` command: `nomul COMMAND ...` runs tools/COMMAND.py, imported only when it is asked for."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ir.errors import UsageError
from tools.entry import run

_USAGE = "usage: nomul COMMAND [OPTIONS]      (or: python -m tools.COMMAND [OPTIONS])"


def commands() -> dict[str, str]:
    """Return command name -> one-line summary: the modules of `tools` that define main, read but not imported."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not path.stem.startswith("_") and "\ndef main(" in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name (the process's own when None) and return its exit code."""
    return run(_dispatch, sys.argv[1:] if argv is None else argv)


def _dispatch(argv: Sequence[str]) -> int:
    if not argv:
        print(_help(), file=sys.stderr)
        return UsageError.exit_code
    if argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"nomul {version('nomul')}")
        return 0
    known = commands()
    if argv[0] not in known:
        near = get_close_matches(argv[0], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise UsageError(f"there is no command {argv[0]}", fix=f"{hint}the commands are {', '.join(known)}")
    return int(importlib.import_module(f"tools.{argv[0]}").main(list(argv[1:])))


def _help() -> str:
    rows = commands()
    width = max(map(len, rows), default=0)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in rows.items()]
    return "\n".join([_USAGE, "", "commands:", *lines, "", "nomul COMMAND --help lists the options of one."])


if __name__ == "__main__":
    sys.exit(main())
