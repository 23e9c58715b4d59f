"""What a compilation will take, from configuration and headers alone: bytes a tensor, peak memory, disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import ResourceError

if TYPE_CHECKING:
    from ir.analysis import Block
    from ir.program import Program
    from passes.base import PlanRow
    from passes.pipeline import Pipeline

# Interpreter, torch, transformers and tokenizer, measured on an import of all of them.
_BASE_BYTES = 620 << 20


@dataclass(frozen=True)
class Estimate:
    """rows: what each pass will do at each site; bytes before and after; peak memory and disk in bytes."""

    rows: tuple[PlanRow, ...]
    float_bytes: int
    artifact_bytes: int
    peak_bytes: int
    free_disk: int
    free_memory: int

    def as_json(self) -> dict[str, Any]:
        """Return the estimate with its rows spelled out."""
        return {
            "float_bytes": self.float_bytes,
            "artifact_bytes": self.artifact_bytes,
            "peak_bytes": self.peak_bytes,
            "free_disk_bytes": self.free_disk,
            "free_memory_bytes": self.free_memory,
            "sites": [{"site": r.site, "pass": r.action, **r.figures} for r in self.rows],
        }


def estimate(
    program: Program, pipeline: Pipeline, samples: int, seqlen: int, out: Path, layers: int | None = None
) -> Estimate:
    """Return what compiling `program` will take; no weight is read.

    layers: how many blocks the model has, when the program is an outline with fewer; its last block stands for them.
    Peak memory: what is imported, the streams of activations, and the larger of one block in float with its second
    moments and the head's logits for one held-out window.
    """
    import psutil

    from ir.analysis import blocks

    parts = blocks(program)
    missing = max(0, (layers or 0) - len(parts))
    rows = _all_rows(_claimed(program, pipeline), parts, missing)
    total = program.params.total_bytes()
    saved = sum(row.figures["weights"] * 4 - row.figures["bytes"] for row in rows if "bytes" in row.figures)
    width = _last_dim(parts[0].entry) if parts else 0
    needs = [need for pass_ in pipeline.passes() if (need := pass_.needs()) is not None]
    streams = max((2 if need.stream == "both" else 1 for need in needs), default=0)
    activations = streams * samples * seqlen * width * 4
    block_params = sum(program.params.nbytes(n) for n in parts[0].region(program).params) if parts else total
    total += missing * block_params
    largest = max((program.params.nbytes(n) for n in program.params), default=0)
    vocabulary = _last_dim(program.outputs[0])
    working = max(8 * block_params, 2 * largest, largest + 4 * 256 * vocabulary * 4)
    codes = sum(int(row.figures["bytes"]) for row in rows if "bytes" in row.figures)
    peak = _BASE_BYTES + activations + working + codes
    home = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    return Estimate(
        tuple(rows),
        total,
        int(total - saved),
        int(peak),
        shutil.disk_usage(home).free,
        psutil.virtual_memory().available,
    )


def _claimed(program: Program, pipeline: Pipeline) -> list[PlanRow]:
    """Return what each pass plans; a site goes to the first that compresses it, as it will when they run."""
    rows, taken, outline = [], set(), program.clone()
    for pass_ in pipeline.passes():
        planned = [row for row in pass_.plan(outline) if row.site not in taken or "bytes" not in row.figures]
        taken |= {row.site for row in planned if "bytes" in row.figures}
        rows += planned
        pass_.foresee(outline)
    return rows


def _all_rows(rows: list[PlanRow], parts: tuple[Block, ...], missing: int) -> list[PlanRow]:
    """Repeat the rows of the last block for `missing` more, its path's index counted up."""
    if not missing or not parts or not parts[-1].path:
        return rows
    path = parts[-1].path
    stem, _, index = path.rpartition(".")
    last = [row for row in rows if row.site.startswith(f"{path}.")]
    extra = [
        replace(row, site=f"{stem}.{int(index) + more}{row.site.removeprefix(path)}")
        for more in range(1, missing + 1)
        for row in last
    ]
    return rows + (extra if index.isdigit() else [])


def check_resources(found: Estimate, out: Path) -> None:
    """Raise ResourceError when the disk or the memory at hand does not suffice for an estimate."""
    needed = int(found.artifact_bytes * 2.1) + (32 << 20)
    if found.free_disk < needed:
        raise ResourceError(
            "the disk has too little room",
            where=str(out),
            why=f"{needed >> 20} MiB are needed for the artifact and its work files, {found.free_disk >> 20} are free",
            fix="free some space, or choose an --out on another disk",
        )
    if found.free_memory < found.peak_bytes:
        raise ResourceError(
            "memory does not suffice",
            why=f"about {found.peak_bytes >> 20} MiB are needed, {found.free_memory >> 20} are free",
            fix="lower --samples or --seqlen, or close other programs",
        )


def _last_dim(node: Any) -> int:
    dims = node.meta["type"].dims
    return dims[-1] if dims and isinstance(dims[-1], int) else 0
