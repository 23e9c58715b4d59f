"""Runs of `shiftadd` on the tiny model: its sites, calibration data, and a copy of a program after the pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ir.analysis import blocks
from ir.program import Program
from passes.base import Context, Log, PlanRow
from passes.shiftadd import ShiftAdd
from tests.watch import batches, values

DATA = batches((4, 32), (4, 32))
SITES = [
    f"model.layers.{k}.{part}"
    for k in range(2)
    for part in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]
QUICK = {"rounds": 1, "starts": 1, "iterations": 1, "polish": 0, "sweeps": 1}


def compress(program: Program, work: Path | None = None, data: Any = DATA, **options: Any) -> tuple[Program, Log]:
    """A compressed copy of a program and what the pass said; two planes of groups of 16 unless told otherwise."""
    program, log = program.clone(), Log("shiftadd")
    chosen = ShiftAdd(**{"bits": 2, "group": 16, "rounds": 2, **options})
    chosen.validate()
    chosen.run(program, Context(log=log, calibration=data, work=work))
    return program, log


def error(found: Program, original: Program, data: Any = DATA) -> float:
    """The relative error of what the last block gives, over all batches."""
    name, off, size = blocks(original)[-1].exit.name, 0.0, 0.0
    for ids in data:
        wanted = values(original, ids)[name].double()
        off += float((values(found, ids)[name] - wanted).square().sum())
        size += float(wanted.square().sum())
    return (off / size) ** 0.5


def figures_of(rows: list[PlanRow]) -> dict[str, Any]:
    """What a plan says of each site it will code."""
    return {row.site: row.figures for row in rows if row.action == "shiftadd"}
