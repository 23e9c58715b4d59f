"""Pipelines run on small programs as the compiler runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ir.program import Program
from passes.base import Context, Log
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse, schedule
from passes.training import loop
from tests.watch import batches

# Enough samples that some are kept for judging.
LONG = batches((16, 32), (16, 32))


def run(program: Program, text: str, data: Sequence[Tensor], work: Path | None = None) -> tuple[Program, Log]:
    """A copy of a program after a pipeline, put in order and closed, and what was said."""
    program, log = program.clone(), Log("test")
    pipeline, _ = schedule(parse(text))
    run_pipeline(program, pipeline, Context(log=log, calibration=data, work=work), Settings())
    return program, log


@dataclass(frozen=True)
class Resumed:
    """A run that was not stopped, and one that was and went on."""

    whole: Program
    log: Log
    again: Program
    said: Log


def resumed(
    program: Program, text: str, data: Sequence[Tensor], work: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> Resumed:
    """Run a pipeline whose training is stopped when a state is judged for the time after `stop`, and go on."""
    whole, log = run(program, text, data)
    judge, times = loop.judge, 0

    def failing(*args: Any) -> float:
        nonlocal times
        times += 1
        if times > stop:
            raise KeyboardInterrupt
        return judge(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "judge", failing)
        with pytest.raises(KeyboardInterrupt):
            run(program, text, data, work)
    return Resumed(whole, log, *run(program, text, data, work))
