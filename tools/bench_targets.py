"""What kernels are to reach, as ratios within one run, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NOT_MEASURED, MET, MISSED = "not measured", "met", "missed"


@dataclass(frozen=True)
class Target:
    """A bound on how many times as fast `name` is as `against`, both as rows are called.

    at_least: the least ratio; level: the instruction set it is for, with a "-" before it for all but it, "" for any.
    """

    name: str
    against: str
    at_least: float
    where: str
    tokens: int = 1
    shape: str = "4096x4096"
    level: str = ""


_OURS, _FOUR, _SMALL = "3 planes 14bit", "4-bit acc4", "1536x576"

SPEEDS = (
    Target(_OURS, "stream", 0.75, "cold"),
    Target(_OURS, "stream", 0.75, "hot"),
    Target(_OURS, "float32", 8, "cold"),
    Target(_OURS, "float32", 6, "hot"),
    Target("2 planes 14bit", "float32", 10, "cold"),
    Target("4 planes 14bit", "float32", 6, "cold"),
    Target(_OURS, _FOUR, 1.6, "cold"),
    Target(_OURS, _FOUR, 1.0, "hot"),
    Target(_OURS, "4-bit acc0", 3, "cold"),
    Target(_OURS, "4-bit acc0", 3.5, "hot"),
    Target("4 planes 14bit", _FOUR, 1.2, "cold"),
    Target("4 planes 14bit", _FOUR, 0.75, "hot"),
    Target("2 planes 14bit", "2-bit acc4", 1.2, "cold"),
    Target("2 planes 14bit", "2-bit acc4", 1.0, "hot"),
    Target("3 planes exact", "float32", 6, "cold"),
    Target(_OURS, "float32", 3, "hot", shape=_SMALL),
    Target(_OURS, _FOUR, 0.7, "hot", shape=_SMALL),
    Target(_OURS, "float32", 2.5, "hot", 128, level="amx"),
    Target(_OURS, _FOUR, 1.5, "hot", 128, level="amx"),
    Target(_OURS, "float32", 0.8, "hot", 128, level="-amx"),
)
# Most relative error, by mode and whether tokens are many; by default products of many may round to bfloat16.
ERRORS = (("14bit", 1, 5e-4), ("exact", 1, 1e-6), ("14bit", 128, 5e-3))
PREPARE_SECONDS = ("14bit", 10e-6)
NODE_SECONDS = 1e-6


def judged(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what a run measured, and whether that meets it; speeds once for each thread count."""
    return [*_speeds(found), *_errors(found), *_costs(found)]


def _speeds(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    by_case: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in found["rows"]:
        by_case.setdefault((row["shape"], row["tokens"], row["where"], row["threads"]), {})[row["name"]] = row
    threads = sorted({row["threads"] for row in found["rows"]}) or [1]
    level = found["machine"]["level"]
    for target in SPEEDS:
        for count in threads:
            rows = by_case.get((target.shape, target.tokens, target.where, count), {})
            tokens = f"{target.tokens} token{'s' if target.tokens > 1 else ''}"
            case = f"{target.shape}, {tokens}, {target.where}"
            text = f"{target.name} : {target.against}{_level_text(target.level)}"
            value = _ratio(target, rows) if _fits(target.level, level) else None
            marks: list[str] = next((row["marks"] for row in rows.values()), [])
            yield _verdict(text, case, target.at_least, value, True) | {"threads": count, "marks": marks}


def _ratio(target: Target, rows: dict[str, Any]) -> float | None:
    ours, other = rows.get(target.name), rows.get(target.against)
    if ours is None:
        return None
    if target.against == "stream":
        return float(ours["to_stream"])
    return None if other is None else float(other["seconds"] / ours["seconds"])


def _fits(wanted: str, level: str) -> bool:
    return level != wanted[1:] if wanted.startswith("-") else wanted in ("", level)


def _level_text(level: str) -> str:
    return f" ({'without ' if level.startswith('-') else 'with '}{level.lstrip('-')})" if level else ""


def _errors(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    errors = {(row["mode"], row["tokens"]): row["error"] for row in found["errors"]}
    for mode, tokens, most in ERRORS:
        case = f"{tokens} token{'s' if tokens > 1 else ''}"
        yield _verdict(f"relative error, {mode}", case, most, errors.get((mode, tokens)), False)


def _costs(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    mode, most = PREPARE_SECONDS
    seconds = {row["mode"]: row["seconds"] for row in found["prepare"]}
    yield _verdict(f"seconds of the table build, {mode}", "4096 inputs", most, seconds.get(mode), False)
    extra = found["node"]["extra_seconds"]
    yield _verdict("seconds of a node beyond a built-in one", "32x32, its kernel taken off", NODE_SECONDS, extra, False)


def _verdict(what: str, case: str, bound: float, value: float | None, at_least: bool) -> dict[str, Any]:
    verdict = NOT_MEASURED if value is None else MET if (value >= bound if at_least else value <= bound) else MISSED
    return {
        "target": what,
        "case": case,
        "threads": 1,
        "bound": bound,
        "at_least": at_least,
        "measured": value,
        "verdict": verdict,
        "marks": [],
    }
