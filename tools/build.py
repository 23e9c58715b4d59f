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
    from tools.calibration import TokenData
    from tools.costs import CostStep
    from tools.estimate import Estimate
    from tools.gate import Quality
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
    from tools.estimate import check_resources, estimate
    from tools.self_text import SELF
    from tools.text import load_text
    from tools.work import work_folder

    clock = _Clock()
    planned = plan(options)
    for line in planned.notes:
        note(line)
    # A text that cannot be read is found out before a model is traced.
    if options.calib != SELF:
        load_text(options.calib)
    with PeakMemory() as peak:
        with clock.phase("open"):
            model = open_model(options.model, note)
        target_backend(options).require(model.program)
        check(planned.pipeline, model.program.level, model.program.facts)
        found = estimate(model.program, planned.pipeline, options.samples, options.seqlen, options.out)
        check_resources(found, options.out)
        with clock.phase("text"):
            data = _data(model, planned.pipeline, options)
        with clock.phase("check weights"):
            _check_weights(model.program)
        before = model.program.clone()
        with work_folder(options, model, planned.pipeline, data) as work:
            ran = _run(model.program, planned, options, data, work, clock, listener)
            with clock.phase("judge"):
                quality = _judge(before, model.program, data, options)
            return _finish(options, planned, model, ran, quality, data, work, clock, peak)


def _data(model: Model, pipeline: Pipeline, options: BuildOptions) -> TokenData | None:
    """Return calibration and held-out tokens; None when no pass needs data and the model has no tokenizer."""
    from frontend.tokenizer import load_tokenizer
    from tools.calibration import token_data
    from tools.self_text import SELF, self_data

    needed = any(pass_.needs() is not None for pass_ in pipeline.passes())
    if options.calib == SELF:
        _check_context(model, options.seqlen)
        return self_data(model.program, options.samples if needed else 1, options.seqlen, options.seed)
    try:
        tokenizer = load_tokenizer(model.path)
    except UnsupportedError as error:
        if needed:
            raise
        note(f"no tokenizer ({error.why}): the quality of the result is not judged")
        return None
    _check_context(model, options.seqlen)
    samples = options.samples if needed else 1
    data = token_data(tokenizer, options.calib, samples, options.seqlen, options.seed)
    known, largest = model.program.outputs[0].meta["type"].dims[-1], max(int(b.max()) for b in data.calibration)
    if largest >= int(known):
        raise UnsupportedError(
            "the tokenizer does not belong to the model",
            where=str(model.path),
            why=f"it gives token {largest}, and the model knows {known} tokens",
            fix="put the tokenizer files of the original model beside its weights",
        )
    return data


def _check_context(model: Model, seqlen: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if isinstance(context, int) and seqlen > context:
        raise UsageError(
            f"--seqlen {seqlen} is longer than the model's context",
            where=str(model.path),
            why=f"its configuration allows {context} positions",
            fix=f"give --seqlen {context} or less",
        )


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
    data: TokenData | None,
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


def _judge(before: Program, after: Program, data: TokenData | None, options: BuildOptions) -> Quality | None:
    from tools.console import progress
    from tools.gate import judge

    if data is None:
        return None
    with progress("judge", len(data.held_out)) as step:
        return judge(before, after, data.held_out, options.max_kl if options.gate else float("inf"), step)


def _finish(
    options: BuildOptions,
    planned: Plan,
    model: Model,
    ran: _Ran,
    quality: Quality | None,
    data: TokenData | None,
    work: Path,
    clock: _Clock,
    peak: Any,
) -> Report:
    """Write the artifact beside its place, then move it there."""
    from backends.detours import detour_lines
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


def _settings(options: BuildOptions, data: TokenData | None) -> dict[str, Any]:
    names = ("calib", "samples", "seqlen", "seed", "precision")
    digest = None if data is None else data.digest
    return {**{name: getattr(options, name) for name in names}, "calibration_sha256": digest}


def _write_manifest(
    folder: Path,
    options: BuildOptions,
    planned: Plan,
    model: Model,
    hashes: dict[str, str],
    quality: Quality | None,
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
