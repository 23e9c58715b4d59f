"""One compilation from MODEL to artifact, as a function; `tools.compile` is its command line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import UnsupportedError, UsageError
from tools.console import note
from tools.options import BuildOptions, check_options, target_backend

if TYPE_CHECKING:
    from backends.detours import Detour
    from frontend.open import Model
    from ir.program import Program
    from passes.base import Event
    from passes.manager import PassReport
    from passes.pipeline import Pipeline
    from tools.costs import CostStep
    from tools.data import Data
    from tools.estimate import Estimate
    from tools.gate import Fidelity, Quality
    from tools.report import Report


@dataclass
class _Clock:
    """Seconds a phase."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class _Ran:
    """What the passes reported and noted, and the cost of the program before the first and after each."""

    reports: tuple[PassReport, ...]
    costs: tuple[CostStep, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A checked pipeline in the order it will run, and the lines to print about that."""

    pipeline: Pipeline
    notes: tuple[str, ...]


def plan(options: BuildOptions) -> Plan:
    """Parse, schedule and look over a pipeline before any model is opened; raises UsageError."""
    from backends import backend_names
    from passes.pipeline import parse, schedule

    if options.target not in backend_names():
        known = ", ".join(backend_names())
        raise UsageError(f"there is no target {options.target}", fix=f"the targets are {known}")
    check_options(options)
    backend = target_backend(options)
    pipeline, notes = schedule(parse(options.passes), options.keep_order)
    for pass_ in pipeline.passes():
        backend.require_operators(pass_.inserts(), f"pass {pass_.name}")
    return Plan(pipeline, tuple(notes))


def dry_run(options: BuildOptions) -> tuple[Plan, Estimate, str]:
    """Return the plan, an estimate and a remark on how it was made, reading configuration and headers only."""
    from frontend.open import open_outline
    from passes.pipeline import check
    from tools.estimate import estimate

    planned = plan(options)
    outline = open_outline(options.model, note)
    program = outline.program
    check(planned.pipeline, program.level, program.facts)
    found = estimate(program, planned.pipeline, options.samples, options.seqlen, options.out, outline.layers)
    return planned, found, outline.remark


def compile_model(options: BuildOptions, listener: Callable[[Event], None] | None = None) -> Report:
    """Compile a model into an artifact directory and return the report; the directory appears whole or not at all.

    Raises UsageError, UnsupportedError and ResourceError before anything is written, InvariantError for a broken law.
    A report whose quality gate failed belongs to an artifact that is kept and marked.
    """
    from frontend.open import open_model
    from passes.memory import PeakMemory
    from passes.pipeline import check
    from passes.stream import require_predictions
    from tools.data import calibration_data, readable_data
    from tools.estimate import check_resources, estimate
    from tools.work import work_folder

    clock = _Clock()
    planned = plan(options)
    for line in planned.notes:
        note(line)
    arrays = readable_data(options.calib)
    with PeakMemory() as peak:
        with clock.phase("open"):
            model = open_model(options.model, note)
        target_backend(options).require(model.program)
        for pass_ in planned.pipeline.passes():
            if (needs := pass_.needs()) is not None and needs.tokens:
                require_predictions(model.program, arrays is not None, f"pass {pass_.name}")
        check(planned.pipeline, model.program.level, model.program.facts)
        found = estimate(model.program, planned.pipeline, options.samples, options.seqlen, options.out)
        check_resources(found, options.out)
        with clock.phase("text"):
            data = calibration_data(model, planned.pipeline, options, arrays)
            del arrays
        with clock.phase("check weights"):
            _check_weights(model.program)
        before = model.program.clone()
        with work_folder(options, model, planned.pipeline, data) as work:
            ran = _run(model.program, planned, options, data, work, clock, listener)
            with clock.phase("judge"):
                quality = _judge(before, model.program, data, options)
            return _finish(options, planned, model, ran, quality, data, work, clock, peak)


def _check_weights(program: Program) -> None:
    """Raise UnsupportedError for a weight with NaN or infinity, which would spread to all that comes after it."""
    import torch

    from tools.console import progress

    with progress("check weights", len(program.params)) as step:
        for name in program.params:
            tensor = program.params.get(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise UnsupportedError(
                    "a weight of the model is not finite",
                    where=name,
                    why=f"{bad} of its {tensor.numel()} values are NaN or infinite",
                    fix="check the checkpoint; nothing was written",
                )
            step("")


def _run(
    program: Program,
    planned: Plan,
    options: BuildOptions,
    data: Data | None,
    work: Path,
    clock: _Clock,
    listener: Callable[[Event], None] | None,
) -> _Ran:
    from passes.base import Context, Log
    from passes.manager import Settings, run_pipeline
    from tools.costs import INPUT, cost_step

    log = Log() if listener is None else Log(listener=listener)
    calibration = None if data is None else data.calibration
    ctx = Context(
        options.seed, log, calibration, work, options.strict, options.precision,
        activation_budget=options.activation_budget, counted=None if data is None else data.counted,
    )  # fmt: skip
    settings = Settings(options.verify, options.verify != "off", options.dump_ir, work)
    costs = [cost_step(INPUT, program)]
    reports = run_pipeline(
        program, planned.pipeline, ctx, settings, finished=lambda done: costs.append(cost_step(done.text, program))
    )
    for report in reports:
        clock.phases[report.text] = clock.phases.get(report.text, 0.0) + report.seconds
    return _Ran(reports, tuple(costs), tuple(f"{n.by}: {n.text}" for n in log.notes))


def _judge(before: Program, after: Program, data: Data | None, options: BuildOptions) -> Quality | Fidelity | None:
    from torch import Tensor

    from ir.analysis import predicts_tokens
    from tools.calibration import in_batches
    from tools.console import progress
    from tools.gate import compared_result, judge, judge_results

    if data is None:
        return None
    held_out = data.held_out
    if isinstance(held_out, Tensor) and predicts_tokens(before):
        with progress("judge", len(held_out)) as step:
            return judge(before, after, held_out, options.max_kl if options.gate else float("inf"), step)
    if compared_result(before) is None:
        note("the model has no results of floats: the quality of what came out is not judged")
        return None
    batches = in_batches(held_out, len(data.calibration[0])) if isinstance(held_out, Tensor) else held_out
    with progress("judge", len(batches)) as step:
        return judge_results(before, after, batches, options.max_error if options.gate else float("inf"), step)


def _finish(
    options: BuildOptions,
    planned: Plan,
    model: Model,
    ran: _Ran,
    quality: Quality | Fidelity | None,
    data: Data | None,
    work: Path,
    clock: _Clock,
    peak: Any,
) -> Report:
    """Write the artifact beside its place, then move it there."""
    from backends.detours import detour_lines
    from ir.analysis import predicts_tokens, result_names
    from ir.artifact import read_program, write_program
    from tools.console import progress
    from tools.report import Report, write_report
    from tools.sidefiles import copy_side_files
    from tools.storage import storage

    partial = options.out.absolute().parent / f".{options.out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with clock.phase("write"), progress("write", len(model.program.params)) as step:
            hashes = write_program(model.program, partial, step=lambda: step(""))
        with clock.phase("lower"):
            # What was written is read back through a memory map: the codes that are stored are the codes that run.
            detours = _lowered(options, read_program(partial), partial)
        with clock.phase("write"):
            notes = (*detour_lines(detours), *copy_side_files(model, partial))
        for line in notes:
            note(line)
        if options.dump_ir != "none":
            shutil.copytree(work / "ir", partial / "ir")
        totals = storage(model.program, written=True).as_json() | {"artifact_bytes": _size(partial)}
        settings = _settings(options, data)
        _write_manifest(partial, options, planned, model, hashes, quality, settings)
        report = Report(
            options.model, str(planned.pipeline), str(options.out), clock.phases, peak.bytes, ran.reports, totals,
            quality, settings, (*planned.notes, *ran.notes, *notes), ran.costs, options.energy, detours,
            () if predicts_tokens(model.program) else result_names(model.program),
        )  # fmt: skip
        write_report(report, partial)
        os.replace(partial, options.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _lowered(options: BuildOptions, program: Program, folder: Path) -> tuple[Detour, ...]:
    """Write what the target needs; returns the sites it runs in another way, which --strict makes an error."""
    from backends.detours import detour_lines

    detours = target_backend(options).lower(program, folder)
    if detours and options.strict:
        raise UnsupportedError(
            f"{options.target} does not run all sites by the kernels asked for",
            where=", ".join(one.site for one in detours[:3]),
            why="; ".join(detour_lines(detours)),
            fix="leave out --strict to accept that, or choose other groups or codes; nothing was written",
        )
    return detours


def _settings(options: BuildOptions, data: Data | None) -> dict[str, Any]:
    from tools.arrays import is_array_file

    names = ("calib", "samples", "seqlen", "seed", "precision")
    found = {name: getattr(options, name) for name in names}
    if is_array_file(options.calib):
        found["seqlen"] = None
    return {**found, "calibration_sha256": None if data is None else data.digest}


def _write_manifest(
    folder: Path,
    options: BuildOptions,
    planned: Plan,
    model: Model,
    hashes: dict[str, str],
    quality: Quality | Fidelity | None,
    settings: dict[str, Any],
) -> None:
    """Write manifest.json; everything in it is the same in every run of the same compilation."""
    import torch

    from ir.artifact import FORMAT, MANIFEST_FILE, file_hash

    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: hashes.get(name) or file_hash(folder / name) for name in names}
    manifest = {
        "format": FORMAT,
        "name": model.program.name,
        "target": options.target,
        "target_settings": target_backend(options).settings(),
        "level": model.program.level,
        "pipeline": str(planned.pipeline),
        "history": list(model.program.history),
        "source": {"kind": model.kind, "fingerprint": model.fingerprint},
        "versions": {"nomul": "0.1.0", "torch": torch.__version__},
        "settings": settings,
        "gate": "not judged" if quality is None else "passed" if quality.passed else "failed",
        "files": files,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
