"""Pipelines run on small programs as the compiler runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ir.program import Program
from passes.base import Context, Log
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse, schedule
from tests.watch import batches

# Enough samples that some are kept for judging.
LONG = batches((16, 32), (16, 32))


def run(program: Program, text: str, data: Sequence[Tensor], work: Path | None = None) -> tuple[Program, Log]:
    """A copy of a program after a pipeline, put in order and closed, and what was said."""
    program, log = program.clone(), Log("test")
    pipeline, _ = schedule(parse(text))
    run_pipeline(program, pipeline, Context(log=log, calibration=data, work=work), Settings())
    return program, log
