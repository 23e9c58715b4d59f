"""The figures of the kernels as tables."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from tools.console import table

_CASE = ("shape", "tokens", "threads", "where")
_HEAD = ("", "MB", "ms", "GB/s", "of stream", "x float32", "x 4-bit acc4", "spread")


def as_text(found: dict[str, Any]) -> str:
    """Return the figures as tables: one a case, the rest, and the targets, with a line on how they were taken."""
    parts = [_case(case, list(rows)) for case, rows in groupby(found["rows"], lambda r: tuple(r[k] for k in _CASE))]
    parts += [f"left out  {x['name']} at {x['shape']}: {x['why']}" for x in found["left_out"]]
    parts += [_details(found), _targets(found), _how(found)]
    return "\n\n".join(parts)


def _case(case: tuple[Any, ...], rows: list[dict[str, Any]]) -> str:
    shape, tokens, threads, where = case
    marks = f"   disturbed: {', '.join(rows[0]['marks'])}" if rows[0]["marks"] else ""
    lines = [
        (
            row["name"],
            row["bytes"] / 1e6,
            row["seconds"] * 1e3,
            row["gigabytes_per_second"],
            row["to_stream"],
            row.get("to_float32"),
            row.get("to_4bit"),
            f"{row['spread']:.0%}",
        )
        for row in rows
    ]
    return f"{shape}, {tokens} tokens, {threads} threads, {where}{marks}\n{table(_HEAD, lines)}"


def _details(found: dict[str, Any]) -> str:
    prepare = [(r["mode"], r["seconds"] * 1e6) for r in found["prepare"]]
    errors = [(r["mode"], r["tokens"], f"{r['error']:.1e}") for r in found["errors"]]
    node = found["node"]
    built_in = ", ".join(f"{op} {seconds * 1e6:.2f}" for op, seconds in node["built_in_seconds"].items())
    return "\n\n".join(
        [
            table(("table build, 4096 inputs", "us"), prepare),
            table(("against float64", "tokens", "relative error"), errors),
            f"us a node  {built_in}; ours {node['our_seconds'] * 1e6:.2f}, of that its kernel "
            f"{node['kernel_seconds'] * 1e6:.2f}; {node['extra_seconds'] * 1e6:.2f} beyond the slowest built-in",
        ]
    )


def _targets(found: dict[str, Any]) -> str:
    rows = [
        (
            t["target"], t["case"], t["threads"], f"{'>=' if t['at_least'] else '<='} {t['bound']:g}",
            t["measured"], t["verdict"] + (" (disturbed)" if t["marks"] and t["measured"] is not None else ""),
        )
        for t in found["targets"]
    ]  # fmt: skip
    return table(("target", "case", "threads", "bound", "measured", ""), rows)


def _how(found: dict[str, Any]) -> str:
    m = found["machine"]
    return "\n".join(
        [
            f"time      {found['statistic']}; {found['rounds']} rounds",
            f"hot       {found['hot']}",
            f"cold      {found['cold']}",
            "stream    a read of as many bytes, eight pages at once; in order: one after the other",
            "acc4      MatMulNBits rounding activations to 8 bits; acc0: float activations",
            "direct    the same kernel called without the runtime, table build included as in all others",
            f"machine   {m['processor']}; {m['usable_cores']} of {m['cores']} cores, {m['scheduling']} scheduling, "
            f"load before {m['load_before']:.1f}; kernels {m['level']} of {', '.join(m['levels'])}; onnxruntime "
            f"{m['onnxruntime']}, torch {m['torch']}",
        ]
    )
