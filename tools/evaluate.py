"""Measure a model on a text: perplexity, and how far it is from another model.

perplexity = exp(mean of -ln p(token | tokens before it in its window)), over non-overlapping windows of --ctx tokens.
The text is one string, tokenised without special tokens; the first token of a window is not scored, and what does not
fill a window at the end is dropped. With --against: KL(other || model) in nats a token, and how often both predict the
same token first, over the same predictions.
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
    p.add_argument("model", metavar="PATH", help="artifact, Hugging Face directory or hub id, .gguf file or zoo name")
    p.add_argument("--text", default="builtin", metavar="FILE", help="text to predict, or `builtin` (the default)")
    p.add_argument("--ctx", type=int, default=1024, metavar="N", help="tokens a window (default 1024)")
    p.add_argument("--windows", type=int, metavar="N", help="how many windows, from the start (default: all)")
    p.add_argument("--last", action="store_true", help="take the windows from the end: compile calibrates before it")
    p.add_argument("--batch", type=int, default=1, metavar="B", help="windows run at once (default 1)")
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
    from ir.products import products_in
    from tools.load import load
    from tools.text import load_text

    if options.batch < 1:
        raise UsageError("--batch must be at least 1", why=f"it is {options.batch}")
    text = load_text(options.text)
    student = load(options.model, options.target, options.mode, console.note, options.planes)
    windows = tokenised(student, text, options.ctx, options.windows, options.last)
    teacher = load(options.against, progress=console.note) if options.against else None
    if teacher is not None:
        check_same_vocabulary(student, teacher)
    start = time.perf_counter()
    with products_in(options.precision):
        tally = measure(student, windows, options.batch, teacher)
    report = _report(options, student, windows, tally, time.perf_counter() - start)
    if options.json:
        console.print_json(report)
    else:
        print(_text(report))
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


def measure(student: Runtime, windows: Tensor, batch: int = 1, teacher: Runtime | None = None) -> Tally:
    """Return the sums over all windows [windows, ctx], `batch` of them run at once, with progress on stderr."""
    from tools.perplexity import Tally

    tally = Tally()
    chunks = windows.split(batch)
    with console.progress("windows", len(windows)) as step:
        for ids in chunks:
            logits, _ = student.forward(ids)
            tally.add(logits, ids, teacher.forward(ids)[0] if teacher is not None else None)
            for _ in ids:
                step(f"perplexity {tally.perplexity:.3f}")
    return tally


def _report(
    options: argparse.Namespace, student: Runtime, windows: Tensor, tally: Tally, seconds: float
) -> dict[str, object]:
    from tools.perplexity import FORMULA
    from tools.storage import storage

    count, ctx = windows.shape
    report: dict[str, object] = {
        "model": options.model,
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


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
