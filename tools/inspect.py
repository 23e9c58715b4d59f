"""Show what is in a model: sizes, stored bits, linears, repeated blocks, the program itself; no weight is read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ir.errors import UnsupportedError
from tools import console
from tools.entry import run

if TYPE_CHECKING:
    from ir.program import Program
    from tools.storage import Storage

Report = dict[str, object]


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options."""
    p = argparse.ArgumentParser(prog="nomul inspect", description=__doc__)
    p.add_argument("model", metavar="PATH", help="artifact, Hugging Face directory or hub id, .gguf or .ir file, zoo")
    p.add_argument("--ir", action="store_true", help="print the program's text and nothing else")
    p.add_argument("--sites", action="store_true", help="list the linears: shape, bits, group, planes, stored bytes")
    p.add_argument("--blocks", action="store_true", help="list the repeated blocks that the dataflow shows")
    p.add_argument("--cost", action="store_true", help="count multiplies, adds, shifts, look-ups and bytes of a run")
    p.add_argument("--energy", action="store_true", help="with the counts, the energy model's table (45 nm unit costs)")
    p.add_argument("--tokens", type=int, default=1, metavar="N", help="new tokens of the run that --cost counts (1)")
    p.add_argument("--past", type=int, default=0, metavar="N", help="tokens in its cache (0)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from frontend.zoo import resolve
    from ir.artifact import PROGRAM_FILE

    place = resolve(options.model, console.note)
    stored = isinstance(place, Path) and (place.suffix == ".ir" or (place / PROGRAM_FILE).is_file())
    asked = options.ir or options.sites or options.blocks or options.cost or options.energy
    if stored or asked or not isinstance(place, Path):
        report, text = _program_report(options, place)
    else:
        report, text = _checkpoint_report(place)
    if options.json:
        console.print_json(report)
    else:
        print(text)
    return 0


def read_ir(path: Path) -> Program:
    """Return the program of an .ir file, its weights known by type alone; raises UsageError when it cannot be read."""
    from ir.errors import UsageError
    from ir.parse import parse

    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the program cannot be read", where=str(path), why=str(error)) from None


def _program_report(options: argparse.Namespace, place: Path | str) -> tuple[Report, str]:
    """Return the report of a model whose program is there or is traced, as data and as text."""
    from ir.text import dump
    from tools.storage import storage

    has_weights = not (isinstance(place, Path) and place.suffix == ".ir")
    program = read_ir(place) if isinstance(place, Path) and not has_weights else _opened(options.model)
    if options.ir:
        text = dump(program)
        return {"ir": text}, text.rstrip("\n")
    found = storage(program) if has_weights else None
    report = _facts(options.model, program, place)
    parts = [_facts_text(report)]
    if found is not None:
        report |= found.as_json()
        parts.append(_storage_text(found))
    if found is not None and (options.sites or program.level != "model"):
        report["sites"] = [{**asdict(s), "bits_per_weight": s.bits_per_weight} for s in found.sites]
        parts.append(_site_table(found))
    if options.blocks:
        report["blocks"], table = _blocks(program)
        parts.append(table)
    if options.cost or options.energy:
        found_cost, table = _cost(program, options)
        report |= found_cost
        parts.append(table)
    return report, "\n\n".join(parts)


def _opened(model: str) -> Program:
    from frontend.open import open_model

    return open_model(model, console.note).program


def _facts(model: str, program: Program, place: Path | str) -> Report:
    from ir.artifact import MANIFEST_FILE, read_manifest

    calls = sum(n.op == "call_function" for n in program.graph.nodes)
    report: Report = {
        "model": model,
        "name": program.name,
        "level": program.level,
        "facts": sorted(program.facts),
        "history": list(program.history),
        "attributes": program.attributes,
        "inputs": {n.name: str(n.meta["type"]) for n in program.inputs},
        "calls": calls,
        "parameters": len(program.params),
    }
    if isinstance(place, Path) and (place / MANIFEST_FILE).is_file():
        report["manifest"] = read_manifest(place)
    return report


def _facts_text(report: Report) -> str:
    inputs = report["inputs"]
    assert isinstance(inputs, dict)
    shown = [f"{name}: {kind}" for name, kind in inputs.items() if not name.startswith("past_")]
    caches = len(inputs) - len(shown)
    shown += [f"{caches} past keys and values"] if caches else []
    rows = [
        ("model", f"{report['model']} ({report['name']})"),
        ("level", f"{report['level']}, facts: {', '.join(report['facts']) or 'none'}"),  # type: ignore[arg-type]
        ("history", ", ".join(report["history"]) or "no pass has run"),  # type: ignore[arg-type]
        ("graph", f"{report['calls']} calls, {report['parameters']} parameters"),
        ("inputs", ", ".join(shown)),
    ]
    manifest = report.get("manifest")
    if isinstance(manifest, dict):
        rows += [(key, str(manifest[key])) for key in ("pipeline", "target", "gate") if key in manifest]
    return "\n".join(f"{key:<9} {value}" for key, value in rows)


def _storage_text(found: Storage) -> str:
    rows = [f"stored    {console.size_text(found.total_bytes)} for {found.total_weights} weights"]
    figures = (
        ("compressed linears", found.compressed_bits),
        ("all linears", found.linear_bits),
        ("whole model", found.model_bits),
    )
    shown = ", ".join(f"{label} {value:.3f}" for label, value in figures if value is not None)
    return "\n".join([*rows, f"bits      a weight, as stored: {shown}"])


def _site_table(found: Storage) -> str:
    columns = ("site", "op", "rows", "inputs", "bits", "planes", "group", "bytes", "bits/weight")
    rows = [
        (s.name, s.op, s.rows, s.inputs, s.bits, s.planes, s.group, s.stored_bytes, round(s.bits_per_weight, 3))
        for s in found.sites
    ]
    return console.table(columns, rows)


def _blocks(program: Program) -> tuple[list[Report], str]:
    from ir.analysis import blocks

    rows: list[Report] = [
        {"index": b.index, "path": b.path, "entry": b.entry.name, "exit": b.exit.name, "calls": len(b.nodes)}
        for b in blocks(program)
    ]
    if not rows:
        return rows, "blocks    nothing repeats"
    return rows, console.table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def _cost(program: Program, options: argparse.Namespace) -> tuple[Report, str]:
    """Return what one run costs and, when asked, what the energy model makes of it, as data and as text."""
    from ir.cost_model import program_cost
    from tools.costs import cost_json, cost_text, energy_json, energy_text

    found = program_cost(program, tokens=options.tokens, past=options.past)
    report: Report = {"cost": cost_json(found)}
    parts = [cost_text(found)] if options.cost else []
    if options.energy:
        costs = {f"tokens: {found.tokens}": found.total}
        report["energy"] = energy_json(costs)
        parts.append(energy_text(costs, found.unknown))
    return report, "\n\n".join(parts)


def _checkpoint_report(path: Path) -> tuple[Report, str]:
    """Return what the headers of a checkpoint say, as data and as text; nothing is traced."""
    from frontend.open import read_config
    from frontend.weights import open_checkpoint

    if path.is_dir():
        config, source = read_config(path), open_checkpoint(path)
    elif path.suffix.lower() == ".gguf":
        from frontend.gguf import GgufSource, gguf_config

        config, source = gguf_config(path), GgufSource(path)
    else:
        raise UnsupportedError(
            "this kind of file cannot be inspected",
            where=str(path),
            why=f"its name ends in {path.suffix or 'nothing'}",
            fix="give an artifact, a Hugging Face directory, a .gguf file or an .ir file",
        )
    tensors = [_tensor_row(name, source.type_of(name), source.stored_bytes(name)) for name in source.names()]
    stored, weights = sum(row[2] for row in tensors), sum(row[3] for row in tensors)
    keys = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "tie_word_embeddings")
    facts = {key: getattr(config, key) for key in keys if getattr(config, key, None) is not None}
    report: Report = {"model": str(path), **facts, "stored_bytes": stored, "weights": weights}
    report["bits_per_weight_model"] = 8 * stored / max(1, weights)
    columns = ("tensor", "type", "bytes", "weights", "bits/weight")
    head = "\n".join(f"{key:<22} {value}" for key, value in report.items())
    report["tensors"] = [dict(zip(columns, row, strict=True)) for row in tensors]
    return report, f"{head}\n\n{console.table(columns, tensors)}"


def _tensor_row(name: str, kind: object, stored: int) -> tuple[str, str, int, int, float]:
    import math

    from ir.types import TensorType

    assert isinstance(kind, TensorType)
    weights = math.prod(int(d) for d in kind.dims)
    return name, str(kind), stored, weights, round(8 * stored / max(1, weights), 3)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
