"""Compile a model: run a pipeline of passes on it and write the artifact."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ir.errors import GateError
from tools.console import note, print_json, size_text, table
from tools.entry import run

if TYPE_CHECKING:
    from passes.base import Event
    from tools.options import BuildOptions
    from tools.report import Report


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    p = argparse.ArgumentParser("compile", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "model", metavar="MODEL", help="Hugging Face directory or hub id, .gguf or .onnx file, artifact or zoo name"
    )
    p.add_argument("--passes", default="", help="pipeline, e.g. 'fold,shiftadd{bits=3 group=64}'; `tools.passes` lists")
    p.add_argument("--recipe", type=Path, metavar="FILE", help="file with a pipeline, one pass a line")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="artifact directory to make")
    p.add_argument("--target", default="reference", help="backend to lower to")
    settings = {"default": argparse.SUPPRESS}
    how = "how kernels of onnxruntime take activations: as float, in 14 bits (default) or 8"
    p.add_argument("--kernel-mode", choices=["exact", "14bit", "8bit"], help=how, **settings)
    who = "who runs uniform codes in onnxruntime: nomul's kernels (default) or MatMulNBits"
    p.add_argument("--uniform", choices=["own", "contrib"], help=who, **settings)
    level = "of MatMulNBits: 4 takes activations in 8 bits (default), 0 as float (default with --kernel-mode exact)"
    p.add_argument("--accuracy-level", type=int, choices=range(5), help=level, **settings)
    text = (
        "text that passes look at or learn; .jsonl: a text, or prompt and response, a line; self: the model writes it; "
        ".npz: no text but an array for every input, samples along the first axis"
    )
    p.add_argument("--calib", default="builtin", metavar="builtin|self|FILE", help=text)
    p.add_argument("--samples", type=int, default=128, help="calibration windows, or samples of arrays")
    p.add_argument("--seqlen", type=int, default=512, help="tokens a window")
    p.add_argument("--seed", type=int, default=0, help="of the choice of windows, and of every pass")
    p.add_argument(
        "--activation-budget", type=_bytes, metavar="SIZE", help="memory for calibration's activations, such as 2GB"
    )
    p.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of calibration's products")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted compilation")
    p.add_argument("--dry-run", action="store_true", help="say what would be done and what it takes, then stop")
    p.add_argument("--dump-ir", default="none", choices=["none", "before", "after", "each"], help="keep text dumps")
    p.add_argument("--verify", default="each", choices=["off", "each", "full"], help="how carefully to check programs")
    p.add_argument("--strict", action="store_true", help="a site left alone, or run by no kernel, is an error")
    p.add_argument("--keep-order", action="store_true", help="refuse a pipeline whose order cannot work")
    p.add_argument("--max-kl", type=float, default=3.0, help="quality gate: largest KL to the input model, in nats")
    error = "the same for models that are no language models: largest relative error of their first result"
    p.add_argument("--max-error", type=float, default=0.5, help=error)
    p.add_argument("--no-gate", action="store_true", help="accept any quality")
    p.add_argument("--energy", action="store_true", help="add the energy model's table: published unit costs, 45 nm")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    from tools.build import compile_model

    options = _options(args)
    if args.dry_run:
        return _show_plan(options, args.json)
    with _listener() as listener:
        report = compile_model(options, listener)
    if args.json:
        print_json(report.as_json())
    else:
        print(summary(report))
    if report.quality is not None and not report.quality.passed:
        failed = report.quality.failure
        raise GateError(failed.what, where=str(options.out), why=failed.why, fix=failed.fix)
    return 0


def _bytes(text: str) -> int:
    """Return the bytes that `512MB`, `2GiB` or a number stand for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no size; write for example 2GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def _options(args: argparse.Namespace) -> BuildOptions:
    from ir.errors import UsageError
    from tools.options import BuildOptions

    if args.recipe is not None and args.passes:
        raise UsageError("a pipeline comes from --passes or from --recipe, not from both")
    passes = f"@{args.recipe}" if args.recipe is not None else args.passes
    return BuildOptions(
        args.model, passes, args.out, args.target, args.calib, args.samples, args.seqlen, args.seed, args.precision,
        args.resume, args.dump_ir, args.verify, args.strict, args.keep_order, not args.no_gate, args.max_kl,
        args.energy, getattr(args, "kernel_mode", None), getattr(args, "uniform", None),
        getattr(args, "accuracy_level", None), args.activation_budget, args.max_error,
    )  # fmt: skip


def _show_plan(options: BuildOptions, as_json: bool) -> int:
    from tools.build import dry_run

    planned, found, remark = dry_run(options)
    for line in planned.notes:
        note(line)
    if as_json:
        print_json({"passes": str(planned.pipeline), **found.as_json(), "remark": remark})
        return 0
    rows = [(r.site, r.action, r.figures.get("bits"), _planned_size(r.figures)) for r in found.rows]
    if rows:
        print(table(("site", "pass", "bits", "size"), rows))
    print(f"passes    {planned.pipeline}")
    print(f"size      {size_text(found.float_bytes)} in float -> {size_text(found.artifact_bytes)} stored")
    print(f"memory    about {size_text(found.peak_bytes)} at the peak, {size_text(found.free_memory)} free")
    print(f"disk      {size_text(found.free_disk)} free")
    print(f"estimate  {remark}")
    return 0


def _planned_size(figures: Mapping[str, float]) -> str:
    return size_text(int(figures["bytes"])) if "bytes" in figures else ""


@contextmanager
def _listener() -> Iterator[Callable[[Event], None]]:
    """Give a listener that shows each pass's progress, one bar or line at a time, and its notes.

    Work that begins within other work takes its place; the steps of the other are then no longer shown. The bar is
    taken down when the run ends in an error too: it hides the cursor while it is up.
    """
    from passes.base import Note, Progress
    from tools.console import note, progress

    with ExitStack() as bars:
        step: Callable[[str], None] | None = None
        shown = ""

        def listen(event: Event) -> None:
            nonlocal step, shown
            if isinstance(event, Note):
                note(f"{event.by}: {event.text}")
            if not isinstance(event, Progress):
                return
            if event.done == 0:
                bars.close()
                step, shown = bars.enter_context(progress(event.label, event.total)), event.label
            elif step is not None and event.label == shown:
                step("")
            if event.done == event.total and event.label == shown:
                bars.close()

        yield listen


def summary(report: Report) -> str:
    """Return what a person reads at the end of a compilation."""
    from tools.costs import change_line, unknown_lines
    from tools.report import detours, energy_table, left_alone, pass_table, site_table, work_table

    totals, quality = report.totals, report.quality
    parts = [pass_table(report.reports), work_table(report), site_table(report.reports), left_alone(report.reports)]
    parts += [detours(report), energy_table(report)]
    bits = totals["bits_per_weight_compressed"]
    size = f"size      {size_text(int(totals['artifact_bytes']))}"
    parts.append(
        size + (f", {bits:.3f} stored bits per weight in {totals['compressed_linears']} linears" if bits else "")
    )
    if report.costs:
        parts += [change_line(report.costs), *unknown_lines(report.costs[-1].unknown)]
    if quality is not None:
        parts.append(f"quality   {quality.text}")
        parts.append(f"gate      {'passed' if quality.passed else 'FAILED'} ({quality.rule})")
    share = ", ".join(f"{name} {seconds:.0f}s" for name, seconds in report.phases.items() if seconds >= 0.5)
    parts.append(f"time      {sum(report.phases.values()):.0f}s ({share}), peak memory {size_text(report.peak_bytes)}")
    if report.results:
        parts.append(f"next      python -m tools.inspect {report.out} --cost")
        parts.append(f"          python -m tools.evaluate {report.out} --against {report.model}   (an encoder of text)")
        parts.append(f"          python -c \"import nomul; print(nomul.load('{report.out}').signature)\"")
    else:
        parts.append(f'next      python -m tools.generate {report.out} "The capital of France is"')
        parts.append(f"          python -m tools.evaluate {report.out} --against {report.model} --windows 8 --last")
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
