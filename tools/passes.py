"""List the passes, or one pass with its options, types and defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.errors import NomulError, UsageError
from tools import console
from tools.entry import run

if TYPE_CHECKING:
    from passes.base import Pass
    from passes.options import Option


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options."""
    p = argparse.ArgumentParser(prog="nomul passes", description=__doc__)
    p.add_argument("name", nargs="?", metavar="NAME", help="a pass, to show its contract and options")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    if options.name:
        report = describe(_load(options.name))
        text = _pass_text(report)
    else:
        report = {"passes": _all()}
        text = _list_text(_all())
    if options.json:
        console.print_json(report)
    else:
        print(text)
    return 0


def describe(kind: type[Pass]) -> dict[str, object]:
    """Return the contract and the options of a pass as plain values."""
    from passes.options import options_of

    options = [_option(option) for option in options_of(kind)]
    # As with every option at its default, where all have one: others may need less, or more.
    wanted = kind.data if any(option["default"] is None for option in options) else kind().needs()
    return {
        "name": kind.name,
        "summary": kind.summary,
        "stage": kind.stage.name.lower(),
        "level": list(kind.level),
        "exact": kind.exact,
        "requires": sorted(kind.requires),
        "gives": sorted(kind.gives),
        "removes": sorted(kind.removes),
        "calibration": None if wanted is None else wanted.stream,
        "nests": kind.nests,
        "options": options,
    }


def _option(option: Option) -> dict[str, object]:
    from dataclasses import MISSING

    from passes.options import type_text, value_text

    default = None if option.default is MISSING else value_text(option.annotation, option.default)
    return {"name": option.name, "type": type_text(option.annotation), "default": default, "help": option.help}


def _load(name: str) -> type[Pass]:
    from passes import load_pass, pass_names
    from passes.options import did_you_mean

    if name not in pass_names():
        raise UsageError(
            f"there is no pass {name}",
            fix=f"{did_you_mean(name, pass_names())}the passes are {', '.join(pass_names())}",
        )
    return load_pass(name)


def _all() -> list[dict[str, object]]:
    from passes import load_pass, pass_names

    rows: list[dict[str, object]] = []
    for name in pass_names():
        try:
            rows.append(describe(load_pass(name)))
        except NomulError as error:
            # One broken package must not hide the passes of the others.
            rows.append({"name": name, "error": f"{error.what}: {error.why}"})
    return rows


def _list_text(rows: list[dict[str, object]]) -> str:
    columns = ("pass", "stage", "level", "exact", "calibration", "")
    cells = [
        (r["name"], r["stage"], _span(r["level"]), "yes" if r["exact"] else "no", r["calibration"], r["summary"])
        if "error" not in r
        else (r["name"], None, None, None, None, r["error"])
        for r in rows
    ]
    return console.table(columns, cells) + "\n\nnomul passes NAME lists the options of one."


def _pass_text(report: dict[str, object]) -> str:
    rows = [
        ("stage", report["stage"]),
        ("level", _span(report["level"])),
        ("exact", "yes" if report["exact"] else "no"),
        *((key, ", ".join(report[key])) for key in ("requires", "gives", "removes") if report[key]),  # type: ignore[arg-type]
        ("calibration", report["calibration"] or "none"),
    ]
    head = "\n".join(f"{key:<12} {value}" for key, value in rows)
    options = report["options"]
    assert isinstance(options, list)
    cells = [(o["name"], o["type"], "required" if o["default"] is None else o["default"], o["help"]) for o in options]
    tail = console.table(("option", "type", "default", ""), cells) if cells else "It has no options."
    return f"{report['name']}: {report['summary']}\n\n{head}\n\n{tail}"


def _span(level: object) -> str:
    assert isinstance(level, list)
    return str(level[0]) if level[0] == level[-1] else f"{level[0]} to {level[-1]}"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
