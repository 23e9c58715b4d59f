"""Measure how fast things run here; nothing is judged by the exit code, ratios within one run are reported."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ir.errors import UsageError
from tools import console
from tools.entry import run

if TYPE_CHECKING:
    from tools.decode_bench import Settings as DecodeSettings
    from tools.kernel_bench import Settings as KernelSettings
    from tools.solver_bench import Settings as SolverSettings

T = TypeVar("T")
_SOLVER_SHAPES, _QUICK_SOLVER_SHAPES = ["576x576", "1536x576", "4096x4096"], ["576x576"]
_KERNEL_SHAPES = ["4096x4096", "4096x11008", "11008x4096", "1536x576", "576x1536", "192x576"]
_QUICK_KERNEL_SHAPES = ["1536x576"]
_TOKENS, _QUICK_TOKENS = [1, 4, 16, 128], [1]
_HEADS, _MOST_THREADS = ["float", "quantized"], 1024
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's options."""
    p = argparse.ArgumentParser(prog="nomul bench", description=__doc__)
    kinds = p.add_subparsers(dest="what", required=True, metavar="solver | kernels | decode | training")
    _solver_options(kinds.add_parser("solver", help="the shift-add solver against the float work on the same layer"))
    _kernel_options(kinds.add_parser("kernels", help="our kernels against ONNX Runtime's and a read of memory"))
    _decode_options(
        kinds.add_parser("decode", help="an artifact in ONNX Runtime against its model in float32 and 4-bit")
    )
    _training_options(kinds.add_parser("training", help="a step of training a block against its float passes"))
    return p


def _solver_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS", help=f"layers ({' '.join(_SOLVER_SHAPES)})")
    p.add_argument("--bits", type=int, default=3, metavar="N", help="sign planes (3)")
    p.add_argument("--quick", action="store_true", help="one repetition, few tokens, and one small layer by default")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _kernel_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS", help=f"layers ({' '.join(_KERNEL_SHAPES)})")
    p.add_argument("--tokens", nargs="+", type=int, metavar="N", help="tokens at once (1 4 16 128)")
    p.add_argument("--threads", nargs="+", type=int, metavar="N", help="threads (1 2)")
    p.add_argument("--bits", nargs="+", type=int, metavar="N", default=[2, 3, 4], help="sign planes (2 3 4)")
    p.add_argument("--modes", nargs="+", metavar="MODE", help="how activations enter (14bit 8bit exact)")
    p.add_argument("--where", nargs="+", metavar="hot|cold", help="weights in the cache, or not (hot cold)")
    p.add_argument("--quick", action="store_true", help="short samples; one small layer, token and thread by default")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _decode_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("artifact", metavar="ARTIFACT", help="compiled with --target onnxruntime")
    p.add_argument("--against", metavar="MODEL", help="the model it was made from (default: as its report says)")
    p.add_argument("--threads", nargs="+", type=int, metavar="N", help="threads (1 2)")
    p.add_argument("--head", nargs="+", metavar="HEAD", help="of the 4-bit model: float quantized (default: both)")
    p.add_argument("--rounds", type=int, metavar="N", help="samples of every figure (5)")
    p.add_argument("--quick", action="store_true", help="two short samples on one thread by default")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _training_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="whose first block is trained")
    p.add_argument("--tokens", nargs="+", type=int, metavar="N", help="tokens a step (512 2048)")
    p.add_argument("--rounds", type=int, metavar="N", help="steps of everything (5)")
    p.add_argument("--quick", action="store_true", help="two steps of few tokens by default")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        raise UsageError(
            "there is nothing to measure by this name",
            where=argv[0],
            why=f"what can be measured is {', '.join(_COMMANDS)}",
            fix="run `python -m tools.bench kernels`",
        )
    options = parser().parse_args(argv)
    found, text = _COMMANDS[options.what](options)
    if options.json:
        console.print_json(found)
    else:
        print(text)
    return 0


def _solver(options: argparse.Namespace) -> tuple[object, str]:
    settings = _solver_settings(options)
    from tools.solver_bench import as_text, measure

    found = measure(settings, console.note)
    return found, as_text(found)


def _kernels(options: argparse.Namespace) -> tuple[object, str]:
    settings = _kernel_settings(options)
    from tools.kernel_bench import measure
    from tools.kernel_text import as_text

    found = measure(settings, console.note)
    return found, as_text(found)


def _decode(options: argparse.Namespace) -> tuple[object, str]:
    settings = _decode_settings(options)
    from tools.decode_bench import measure
    from tools.decode_text import as_text

    found = measure(settings, console.note)
    return found, as_text(found)


def _training(options: argparse.Namespace) -> tuple[object, str]:
    tokens = options.tokens or ([64] if options.quick else [512, 2048])
    rounds = (2 if options.quick else 5) if options.rounds is None else options.rounds
    _check_range("--tokens", tokens, 1 << 20)
    _check_range("--rounds", [rounds], 1000)
    from tools.training_bench import Settings, as_text, measure

    found = measure(Settings(options.model, _once(tokens), rounds), console.note)
    return found, as_text(found)


_COMMANDS = {"solver": _solver, "kernels": _kernels, "decode": _decode, "training": _training}


def _solver_settings(options: argparse.Namespace) -> SolverSettings:
    from tools.solver_bench import Settings

    shapes = options.shapes or (_QUICK_SOLVER_SHAPES if options.quick else _SOLVER_SHAPES)
    return Settings(_sizes(shapes), options.bits, options.quick)


def _kernel_settings(options: argparse.Namespace) -> KernelSettings:
    from backends.native.library import MODES

    quick = options.quick
    shapes = _sizes(options.shapes or (_QUICK_KERNEL_SHAPES if quick else _KERNEL_SHAPES))
    tokens = options.tokens or (_QUICK_TOKENS if quick else _TOKENS)
    threads = options.threads or ([1] if quick else [1, 2])
    modes = options.modes or ["14bit", "8bit", "exact"]
    _check_range("--tokens", tokens, 1 << 20)
    _check_range("--threads", threads, _MOST_THREADS)
    _check_range("--bits", options.bits, 8)
    from tools.kernel_bench import WHERE, Settings

    where = options.where or WHERE
    _check_known("--modes", modes, tuple(MODES))
    _check_known("--where", where, WHERE)
    return Settings(shapes, _once(tokens), _once(threads), _once(options.bits), _once(modes), _once(where), quick)


def _decode_settings(options: argparse.Namespace) -> DecodeSettings:
    from pathlib import Path

    threads = options.threads or ([1] if options.quick else [1, 2])
    heads = options.head or _HEADS
    _check_range("--threads", threads, _MOST_THREADS)
    _check_known("--head", heads, _HEADS)
    rounds = (2 if options.quick else 5) if options.rounds is None else options.rounds
    _check_range("--rounds", [rounds], 1000)
    from tools.decode_bench import Settings

    artifact = Path(options.artifact).expanduser()
    return Settings(artifact, options.against, _once(threads), _once(heads), rounds, options.quick)


def _check_range(name: str, values: Sequence[int], most: int) -> None:
    for value in values:
        if not 1 <= value <= most:
            raise UsageError(f"{name} cannot be {value}", where=name, why=f"it must be 1 to {most}")


def _check_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    strange = [v for v in values if v not in known]
    if strange:
        raise UsageError(f"{name} cannot be {strange[0]}", where=name, fix=f"use {', '.join(known)}")


def _once(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def _sizes(shapes: Sequence[str]) -> tuple[tuple[int, int], ...]:
    matches = [(text, _SHAPE.fullmatch(text)) for text in shapes]
    for text, match in matches:
        if match is None:
            raise UsageError("a shape is written ROWSxCOLUMNS", where=text, fix="write for example 4096x4096")
    return tuple((int(match[1]), int(match[2])) for _, match in matches if match is not None)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
