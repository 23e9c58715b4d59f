"""Loading whatever a MODEL argument names into something that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ir.errors import UsageError

if TYPE_CHECKING:
    from backends.base import Runtime

REFERENCE = "reference"


def load(
    model: str | Path,
    target: str | None = None,
    mode: str | None = None,
    progress: Callable[[str], None] | None = None,
    planes: int | None = None,
) -> Runtime:
    """Return the runtime of an artifact, a Hugging Face directory or hub id, a GGUF file or a zoo name.

    target: the backend (default: the one the artifact was compiled for, otherwise `reference`); mode: how the
    reference backend runs compressed linears (`backends.reference.execute.MODES`); planes: how many planes its nested
    linears use (default: as stored). Raises UsageError for a name that is nothing, a mode or planes with another
    backend and planes that the model does not have, UnsupportedError for a damaged or unsupported model.
    """
    from backends import load_backend
    from backends.reference.execute import DEFAULT_MODE
    from backends.reference.runtime import ReferenceRuntime
    from frontend.open import open_model
    from frontend.tokenizer import load_tokenizer
    from ir.precision import set_planes

    folder = Path(model).expanduser()
    chosen = target or artifact_target(folder)
    if chosen != REFERENCE:
        for what, value in (("modes", mode), ("a choice of planes", planes)):
            if value is not None:
                raise UsageError(f"only the reference backend has {what}", where=str(value), why=f"it is {chosen}")
        return load_backend(chosen).load(folder)
    opened = open_model(str(model), progress or (lambda text: None))
    if planes is not None:
        set_planes(opened.program, planes)
    place = opened.path if opened.path.is_dir() else None
    return ReferenceRuntime(opened.program, place, lambda: load_tokenizer(opened.path), mode or DEFAULT_MODE)


def artifact_target(folder: Path) -> str:
    """Return the backend an artifact folder was compiled for; `reference` where it says none."""
    from ir.artifact import MANIFEST_FILE, PROGRAM_FILE, read_manifest

    if not ((folder / PROGRAM_FILE).is_file() and (folder / MANIFEST_FILE).is_file()):
        return REFERENCE
    return str(read_manifest(folder).get("target") or REFERENCE)
