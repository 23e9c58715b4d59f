"""Running a pipeline: each pass timed, verified, probed and dumped, and a report that can be reproduced on a crash."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ir.errors import InvariantError, NomulError, UnsupportedError
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from passes.base import Context, Diagnostic, Event, Log, Pass, SiteReport
from passes.memory import PeakMemory, give_back_memory
from passes.pipeline import Pipeline, check
from passes.probe import Probe, check_probe, float_dtype, take_probe
from passes.stream import token_batches

VerifyMode = Literal["off", "each", "full"]
DumpMode = Literal["none", "before", "after", "each"]


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its text, seconds, peak resident bytes, whether it changed anything, the probe's error."""

    text: str
    seconds: float
    peak_bytes: int
    changed: bool
    probe_error: float | None
    sites: tuple[SiteReport, ...]
    diagnostics: tuple[Diagnostic, ...]


@dataclass(frozen=True)
class Settings:
    """How carefully to run: verification, whether exact passes are probed, where dumps and crash reports go."""

    verify: VerifyMode = "each"
    probe: bool = True
    dump: DumpMode = "none"
    folder: Path | None = None


@dataclass
class _Run:
    """State handed along a pipeline: the last probe is reused while the program has not changed.

    original: the program before the first pass that changes its function, where a later pass wants it.
    """

    probe: Probe | None = None
    probed: tuple[int, int] = (-1, -1)
    reports: list[PassReport] = field(default_factory=list)
    original: Program | None = None


def run_pipeline(
    program: Program,
    pipeline: Pipeline,
    ctx: Context,
    settings: Settings,
    started: Callable[[Pass], None] = lambda _: None,
    finished: Callable[[PassReport], None] = lambda _: None,
) -> tuple[PassReport, ...]:
    """Run every pass of a scheduled pipeline on the program, in place; return one report a pass.

    The whole pipeline is checked before anything runs. Raises what the passes raise, with a crash folder written when
    the fault is the compiler's own; InvariantError when a pass breaks its contract, UnsupportedError under
    `ctx.strict` for a skipped site.
    """
    check(pipeline, program.level, program.facts)
    _check_batches(program, pipeline, ctx)
    if settings.verify != "off":
        verify(program, full=settings.verify == "full")
    _dump(program, settings, "before", 0, "before")
    state = _Run()
    for index, item in enumerate(pipeline):
        started(item.pass_)
        before = dump(program) if settings.folder is not None else ""
        try:
            following = tuple(Pipeline(pipeline.items[index + 1 :]).passes())
            first = state.original is None and program.level == "model" and not item.pass_.exact
            if first and any(_wants_original(pass_) for pass_ in following):
                state.original = program.clone()
            own = replace(ctx, following=following, original=state.original)
            report = _run_one(program, item.pass_, own, settings, state, index)
        except Exception as error:
            if settings.folder is not None and not _outside_fault(error):
                # What went wrong must be heard even where the folder cannot be written.
                with suppress(OSError):
                    _write_crash(settings.folder, before, pipeline, index, ctx, error)
            raise
        state.reports.append(report)
        finished(report)
        _dump(program, settings, "each", index + 1, item.pass_.name)
    _dump(program, settings, "after", len(state.reports), "after")
    return tuple(state.reports)


def _check_batches(program: Program, pipeline: Pipeline, ctx: Context) -> None:
    """Raise UsageError for a pass that learns from predictions of tokens where there are none."""
    for pass_ in pipeline.passes():
        if (calib := pass_.needs()) is not None and calib.tokens and ctx.calibration:
            token_batches(ctx, program, f"pass {pass_.name}")


def _wants_original(pass_: Pass) -> bool:
    calib = pass_.needs()
    return calib is not None and calib.original


def _run_one(program: Program, pass_: Pass, ctx: Context, settings: Settings, state: _Run, index: int) -> PassReport:
    log = Log(pass_.name, _strict_listener(ctx) if ctx.strict else ctx.log.listener)
    work = None if ctx.work is None else ctx.work / f"{index:02d}-{pass_.name}"
    stamp, writes = _stamp(program), len(program.params.writes)
    probing = pass_.exact and settings.probe
    if probing and state.probed != stamp:
        state.probe, state.probed = _probe(program, ctx), stamp
    start = time.perf_counter()
    with PeakMemory() as peak:
        pass_.run(program, replace(ctx, log=log, work=work))
    give_back_memory()
    seconds = time.perf_counter() - start
    ctx.log.reports.extend(log.reports)
    ctx.log.diagnostics.extend(log.diagnostics)
    ctx.log.notes.extend(log.notes)
    changed = _stamp(program) != stamp
    if changed:
        program.level = pass_.level[1]
        program.history = (*program.history, str(_text(pass_)))
    program.facts = pass_.facts_after(program.facts)
    if settings.verify != "off":
        _verify_after(program, pass_, full=settings.verify == "full")
    written = [name for _, name in program.params.writes[writes:]]
    error = _probe_after(program, pass_, ctx, state, changed, written) if probing else None
    return PassReport(
        str(_text(pass_)), seconds, peak.bytes, changed, error, tuple(log.reports), tuple(log.diagnostics)
    )


def _stamp(program: Program) -> tuple[int, int]:
    """Return what grows with every change: edits of the graph, and writes of weights, which need no edit."""
    return program.version, len(program.params.writes)


def _strict_listener(ctx: Context) -> Callable[[Event], None]:
    """Return a listener that ends the run at the first site left alone: not after hours of work on the others."""

    def listen(event: Event) -> None:
        ctx.log.listener(event)
        if isinstance(event, Diagnostic) and not event.asked:
            raise UnsupportedError(
                f"pass {event.by} leaves a site alone, which --strict forbids",
                where=event.site,
                why=event.reason,
                fix="name it in the pass's skip option, or run without --strict to see all such sites in the report",
            )

    return listen


def _verify_after(program: Program, pass_: Pass, full: bool) -> None:
    try:
        verify(program, full)
    except InvariantError as error:
        raise InvariantError(
            f"after pass {pass_.name}, {error.what}",
            fix="this is a bug in the pass; run without it, and report the crash folder",
        ) from error


def _probe(program: Program, ctx: Context) -> Probe:
    return take_probe(program, ctx.seed, ctx.calibration[0] if ctx.calibration else None)


def _probe_after(program: Program, pass_: Pass, ctx: Context, state: _Run, changed: bool, written: list[str]) -> float:
    """Compare with the probe before the pass; what it did not write it cannot have rounded."""
    if not changed or state.probe is None:
        return 0.0
    after = _probe(program, ctx)
    error = check_probe(state.probe, after, pass_.name, float_dtype(program, written))
    state.probe, state.probed = after, _stamp(program)
    return error


def _text(pass_: Pass) -> str:
    from passes.pipeline import Item

    return str(Item(pass_))


def _outside_fault(error: Exception) -> bool:
    """Return whether the input, the options or the machine is to blame, and no reproducer would help."""
    if isinstance(error, InvariantError):
        return False
    return isinstance(error, (NomulError, OSError, MemoryError))


def _dump(program: Program, settings: Settings, moment: str, index: int, name: str) -> None:
    wanted = {"before": ("before",), "after": ("after",), "each": ("before", "each")}.get(settings.dump, ())
    if settings.folder is not None and moment in wanted:
        folder = settings.folder / "ir"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:02d}-{name}.ir").write_text(dump(program), encoding="utf-8")


def _write_crash(folder: Path, before: str, pipeline: Pipeline, index: int, ctx: Context, error: Exception) -> None:
    """Write what is needed to see the failure again: the program before the pass, the passes left, and the seed."""
    crash = folder / "crash"
    crash.mkdir(parents=True, exist_ok=True)
    (crash / "before.ir").write_text(before, encoding="utf-8")
    rest = ",".join(str(item) for item in list(pipeline)[index:])
    facts = {"passes": rest, "seed": ctx.seed, "error": f"{type(error).__name__}: {error}"}
    (crash / "reproduce.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
