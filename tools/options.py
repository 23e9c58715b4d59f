"""The options of a compilation, as on the command line, and what they may be."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ir.errors import UsageError

if TYPE_CHECKING:
    from backends.base import Backend
    from ir.products import Precision

DEFAULT_MAX_KL, DEFAULT_MAX_ERROR = 3.0, 0.5


@dataclass(frozen=True)
class BuildOptions:
    """The options of a compilation, as on the command line.

    max_kl is the gate of language models, max_error that of others.
    kernel_mode, uniform, accuracy_level: settings of the target, None for its own defaults. activation_budget: bytes of
    calibration's activations that stay in memory, None for all.
    """

    model: str
    passes: str
    out: Path
    target: str = "reference"
    calib: str = "builtin"
    samples: int = 128
    seqlen: int = 512
    seed: int = 0
    precision: Precision = "float32"
    resume: bool = False
    dump_ir: Literal["none", "before", "after", "each"] = "none"
    verify: Literal["off", "each", "full"] = "each"
    strict: bool = False
    keep_order: bool = False
    gate: bool = True
    max_kl: float = DEFAULT_MAX_KL
    energy: bool = False
    kernel_mode: Literal["exact", "14bit", "8bit"] | None = None
    uniform: Literal["own", "contrib"] | None = None
    accuracy_level: int | None = None
    activation_budget: int | None = None
    max_error: float = DEFAULT_MAX_ERROR


def target_backend(options: BuildOptions) -> Backend:
    """Return the backend of `--target` with the settings asked for; raises UsageError for those it does not have."""
    from backends import load_backend

    backend = load_backend(options.target)
    asked = {"mode": options.kernel_mode, "uniform": options.uniform, "accuracy_level": options.accuracy_level}
    flags = {"mode": "--kernel-mode", "uniform": "--uniform", "accuracy_level": "--accuracy-level"}
    given = {name: value for name, value in asked.items() if value is not None}
    for name in given.keys() - backend.settings().keys():
        raise UsageError(
            f"target {options.target} has no {flags[name]}", fix="leave it out, or compile with --target onnxruntime"
        )
    return replace(backend, **given)


def check_options(options: BuildOptions) -> None:
    """Raise UsageError for an option out of range or an output directory that cannot be made."""
    for name, value, low, high in (
        ("--samples", options.samples, 1, float("inf")),
        ("--seqlen", options.seqlen, 2, float("inf")),
        ("--seed", options.seed, 0, 2**63 - 1),
        ("--max-kl", options.max_kl, 0, float("inf")),
        ("--max-error", options.max_error, 0, float("inf")),
    ):
        if not low <= value <= high:
            most = "or more" if high == float("inf") else f"to {high}"
            raise UsageError(f"{name} {value} is out of range", fix=f"give {low} {most}")
    if options.out.exists():
        raise UsageError(
            "the output directory exists", where=str(options.out), fix="choose another --out, or remove it"
        )
    home = next(p for p in options.out.absolute().parents if p.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        why = "it cannot be written" if home.is_dir() else "it is a file"
        raise UsageError("the output directory cannot be made", where=str(home), why=why, fix="choose another --out")
