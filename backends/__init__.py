"""Backends (Program -> something that runs), known by name and imported only when one is asked for."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING

from ir.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from backends.base import Backend

ENTRY_POINT_GROUP = "nomul.backends"
DEFAULT = "reference"

_BUILT_IN = {
    DEFAULT: "backends.reference:BACKEND",
    "onnxruntime": "backends.onnxruntime:BACKEND",
    "native": "backends.native.backend:BACKEND",
}


@cache
def _installed() -> dict[str, str]:
    from importlib.metadata import entry_points

    # A built-in name cannot be taken over: an artifact that says it must mean the same everywhere.
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)} | _BUILT_IN


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends, built-in ones first, then those that other packages' entry points bring."""
    return (*_BUILT_IN, *sorted(_installed().keys() - _BUILT_IN.keys()))


def load_backend(name: str) -> Backend:
    """Import and return a backend; raises UsageError for an unknown name, UnsupportedError when it cannot be."""
    if name not in _installed():
        near = get_close_matches(name, backend_names(), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`? " if near else ""
        raise UsageError(f"there is no target {name}", fix=f"{hint}the targets are {', '.join(backend_names())}")
    module, _, attribute = _installed()[name].partition(":")
    try:
        found: Backend = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"target {name} cannot be loaded",
            where=_installed()[name],
            why=str(error),
            fix="install what it needs, or use --target reference",
        ) from error
    return found
