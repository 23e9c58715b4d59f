"""nomul for use from Python: `import nomul; nomul.compile(...)`; names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ir.errors import GateError, InvariantError, NomulError, ResourceError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from backends import backend_names, load_backend
    from backends.base import Backend, Runtime
    from frontend.open import Model, open_model
    from ir.diff import diff
    from ir.parse import parse as parse_program
    from ir.program import Program
    from ir.rewrite import No, Rules
    from ir.text import dump
    from ir.verify import verify
    from passes import load_pass, pass_names
    from passes.base import Calib, Context, Event, Pass, Stage
    from passes.pipeline import Pipeline, parse
    from tools.load import load
    from tools.report import Report

_PLACES = {
    "Backend": "backends.base",
    "Calib": "passes.base",
    "Context": "passes.base",
    "Model": "frontend.open",
    "No": "ir.rewrite",
    "Pass": "passes.base",
    "Pipeline": "passes.pipeline",
    "Report": "tools.report",
    "Program": "ir.program",
    "Rules": "ir.rewrite",
    "Runtime": "backends.base",
    "Stage": "passes.base",
    "backend_names": "backends",
    "diff": "ir.diff",
    "dump": "ir.text",
    "load": "tools.load",
    "load_backend": "backends",
    "load_pass": "passes",
    "open_model": "frontend.open",
    "parse": "passes.pipeline",
    "parse_program": "ir.parse:parse",
    "pass_names": "passes",
    "verify": "ir.verify",
}

__all__ = [
    "Backend",
    "Calib",
    "Context",
    "GateError",
    "InvariantError",
    "Model",
    "No",
    "NomulError",
    "Pass",
    "Pipeline",
    "Program",
    "Report",
    "ResourceError",
    "Rules",
    "Runtime",
    "Stage",
    "UnsupportedError",
    "UsageError",
    "backend_names",
    "compile",
    "diff",
    "dump",
    "load",
    "load_backend",
    "load_pass",
    "open_model",
    "parse",
    "parse_program",
    "pass_names",
    "verify",
]


def compile(
    model: str | Path,
    passes: str,
    out: str | Path,
    listener: Callable[[Event], None] | None = None,
    **options: Any,
) -> Report:
    """Compile a model into the artifact directory `out` and return the report.

    passes: a pipeline such as `fold,shiftadd{bits=3}`; listener: is called with what passes report as they run;
    options: further fields of `tools.options.BuildOptions`. Errors are those of `tools.build.compile_model`.
    """
    from pathlib import Path

    from tools.build import compile_model
    from tools.options import BuildOptions

    return compile_model(BuildOptions(str(model), passes, Path(out), **options), listener)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module nomul has no attribute {name}")
    import importlib

    module, _, attribute = _PLACES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), attribute or name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
