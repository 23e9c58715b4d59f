"""Measure a model on a text: perplexity, and how far it is from another model.

perplexity = exp(mean of -ln p(token | tokens before it in its window)), over non-overlapping windows of --ctx tokens.
The text is one string, tokenised without special tokens; the first token of a window is not scored, and what does not
fill a window at the end is dropped. With --against: KL(other || model) in nats a token, and how often both predict the
same token first, over the same predictions. Encoders are measured by the cosine between their embeddings of sentences
of the text and those of the model that --against names.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.errors import UsageError
from tools import console
from tools.entry import run

if TYPE_CHECKING:
    from torch import Tensor

    from backends.base import Runtime
    from tools.perplexity import Tally


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options."""
    p = argparse.ArgumentParser(
        prog="nomul evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "model",
        metavar="PATH",
        nargs="+",
        help="artifact, Hugging Face directory or hub id, .gguf file or zoo name; several, of one vocabulary, are "
        "measured on the same windows and shown side by side, and --against runs once for all",
    )
    p.add_argument("--text", default="builtin", metavar="FILE", help="text to predict, or `builtin` (the default)")
    p.add_argument("--ctx", type=int, default=1024, metavar="N", help="tokens a window (default 1024)")
    p.add_argument("--windows", type=int, metavar="N", help="how many windows, from the start (default: all)")
    p.add_argument("--last", action="store_true", help="take the windows from the end: compile calibrates before it")
    p.add_argument("--batch", type=int, default=1, metavar="B", help="windows run at once (default 1)")
    p.add_argument("--sentences", type=int, default=200, metavar="N", help="of encoders: how many (default 200)")
    p.add_argument("--against", metavar="MODEL", help="the model to compare with, such as the original")
    p.add_argument("--mode", metavar="MODE", help="run compressed linears by multiply (default), shift or codes")
    p.add_argument("--target", metavar="NAME", help="run on this backend (default: the one it was compiled for)")
    p.add_argument("--planes", type=int, metavar="N", help="planes that nested linears use (default: as stored)")
    p.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of the matrix products")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from ir.analysis import predicts_tokens
    from ir.products import products_in
    from tools.load import load
    from tools.text import load_text

    if options.batch < 1:
        raise UsageError("--batch must be at least 1", why=f"it is {options.batch}")
    text = load_text(options.text)
    students = [load(path, options.target, options.mode, console.note, options.planes) for path in options.model]
    if not predicts_tokens(students[0].program):
        return _compare_encoders(options, students, text)
    for student in students:
        student.require_language_model()
    windows = tokenised(students[0], text, options.ctx, options.windows, options.last)
    teacher = load(options.against, progress=console.note) if options.against else None
    if teacher is not None:
        teacher.require_language_model()
    for other in (*students[1:], *([] if teacher is None else [teacher])):
        check_same_vocabulary(students[0], other)
    with products_in(options.precision):
        measured = measure(students, windows, options.batch, teacher)
    rows = [
        _report(options, path, student, windows, *found)
        for path, student, found in zip(options.model, students, measured, strict=True)
    ]
    if options.json:
        console.print_json(rows[0] if len(rows) == 1 else {"models": rows})
    else:
        print(_text(rows[0]) if len(rows) == 1 else _table(rows))
    return 0


def _compare_encoders(options: argparse.Namespace, students: Sequence[Runtime], text: str) -> int:
    from ir.products import products_in
    from tools.load import load
    from tools.sentences import compare, shown

    if options.against is None:
        raise UsageError(
            "an encoder predicts no tokens", why="it is measured by another's embeddings", fix="give --against MODEL"
        )
    teacher = load(options.against, progress=console.note)
    with products_in(options.precision):
        rows = compare(options.model, students, options.against, teacher, text, options.sentences)
    if options.json:
        console.print_json(rows[0] if len(rows) == 1 else {"models": rows})
    else:
        print(shown(rows, options.text))
    return 0


def tokenised(runtime: Runtime, text: str, ctx: int, windows: int | None, last: bool = False) -> Tensor:
    """Return the windows of a text as one model's tokenizer gives them, int64 [windows, ctx], first or last ones."""
    from tools.perplexity import window_tokens

    encoded = runtime.tokenizer(text, add_special_tokens=False, verbose=False)
    ids = encoded["input_ids"]
    return window_tokens(ids[-(windows or len(ids) // ctx) * ctx :] if last else ids, ctx, windows)


def check_same_vocabulary(student: Runtime, teacher: Runtime) -> None:
    """Raise UsageError when the logits of two models are not over the same number of tokens."""
    ours, theirs = student.interface.vocabulary, teacher.interface.vocabulary
    if ours != theirs:
        why = f"one predicts {ours} tokens, the other {theirs}"
        raise UsageError("the two models cannot be compared", why=why, fix="compare with the model it was made from")


def measure(
    students: Sequence[Runtime], windows: Tensor, batch: int = 1, teacher: Runtime | None = None
) -> list[tuple[Tally, float]]:
    """Return each model's sums over all windows [windows, ctx] and its seconds, with progress on stderr.

    batch: windows run at once; each model's seconds leave the others' and the teacher's out.
    """
    from tools.perplexity import Tally

    tallies, seconds = [Tally() for _ in students], [0.0] * len(students)
    chunks = windows.split(batch)
    with console.progress("windows", len(windows)) as step:
        for ids in chunks:
            wanted = teacher.forward(ids)[0] if teacher is not None else None
            for i, (student, tally) in enumerate(zip(students, tallies, strict=True)):
                start = time.perf_counter()
                logits, _ = student.forward(ids)
                seconds[i] += time.perf_counter() - start
                tally.add(logits, ids, wanted)
            for _ in ids:
                step("perplexity " + ", ".join(f"{tally.perplexity:.3f}" for tally in tallies))
    return list(zip(tallies, seconds, strict=True))


def _report(
    options: argparse.Namespace, path: str, student: Runtime, windows: Tensor, tally: Tally, seconds: float
) -> dict[str, object]:
    from tools.perplexity import FORMULA
    from tools.storage import storage

    count, ctx = windows.shape
    report: dict[str, object] = {
        "model": path,
        "text": options.text,
        "formula": FORMULA,
        "ctx": ctx,
        "windows": count,
        "from": "end" if options.last else "start",
        "precision": options.precision,
        "tokens": windows.numel(),
        "predictions": count * (ctx - 1),
        "perplexity": tally.perplexity,
        "seconds": seconds,
        **storage(student.program).as_json(),
    }
    if options.against:
        report |= {"against": options.against, "kl": tally.kl, "top1_agreement": tally.top1}
    return report


def _text(report: dict[str, object]) -> str:
    r = report
    lines = [
        f"model       {r['model']}",
        f"text        {r['text']}: {r['windows']} windows of {r['ctx']} tokens from its {r['from']}",
        f"formula     {r['formula']}",
        f"perplexity  {r['perplexity']:.3f}   (token level)",
    ]
    if "kl" in r:
        lines.append(f"against     {r['against']}: KL {r['kl']:.4f} nats a token, top-1 {r['top1_agreement']:.2%}")
    parts = (
        ("bits_per_weight_compressed", f"compressed linears ({r['compressed_linears']} of {r['linears']})"),
        ("bits_per_weight_linears", "all linears"),
        ("bits_per_weight_model", "whole model"),
    )
    shown = [f"{r[key]:.3f} {label}" for key, label in parts if r[key] is not None]
    lines.append(f"bits        {', '.join(shown)}; stored bits a weight")
    lines.append(f"time        {r['seconds']:.1f} s")
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, object]]) -> str:
    """Return several models side by side."""
    first = rows[0]
    kept = [("kl", "KL", "{:.4f}"), ("top1_agreement", "top-1", "{:.2%}")] if "kl" in first else []
    parts = (
        ("perplexity", "perplexity", "{:.3f}"),
        *kept,
        ("bits_per_weight_compressed", "bits of compressed", "{:.3f}"),
        ("bits_per_weight_model", "bits of all", "{:.3f}"),
        ("seconds", "seconds", "{:.1f}"),
    )
    cells = [[r["model"], *("-" if r[key] is None else shape.format(r[key]) for key, _, shape in parts)] for r in rows]
    lines = [
        f"text        {first['text']}: {first['windows']} windows of {first['ctx']} tokens from its {first['from']}",
        f"formula     {first['formula']}",
        *([f"against     {first['against']}: KL in nats a token, top-1 agreement"] if kept else []),
        console.table(("model", *(label for _, label, _ in parts)), cells),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
