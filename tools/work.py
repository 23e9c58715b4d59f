"""Where a compilation keeps finished blocks while it runs, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ir.errors import ResourceError, UnsupportedError, UsageError
from tools.console import note

if TYPE_CHECKING:
    from frontend.open import Model
    from passes.pipeline import Pipeline
    from tools.data import Data
    from tools.options import BuildOptions

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def work_folder(options: BuildOptions, model: Model, pipeline: Pipeline, data: Data | None) -> Iterator[Path]:
    """Give a folder beside the output; it goes when the run is through, and stays for --resume when it was cut short.

    A run whose input is at fault (exit codes 2 and 3) leaves nothing either. Raises UsageError when --resume meets the
    work of another model, pipeline, text, seed or version, ResourceError when the disk fills up.
    """
    folder = options.out.absolute().parent / f".{options.out.name}.work"
    _claim(folder, _fingerprint(options, model, pipeline, data), options.resume)
    model.program.params.spill_to(folder)
    try:
        yield folder
    except (UsageError, UnsupportedError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ResourceError(
            "the disk is full",
            where=str(folder.parent),
            why=error.strerror or "",
            fix="free some space; the same command with --resume goes on where it stopped",
        ) from error
    except Exception:
        crash = folder / "crash"
        if crash.is_dir():
            note(f"what reproduces this failure is in {crash}")
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _claim(folder: Path, wanted: str, resume: bool) -> None:
    mark = folder / "fingerprint"
    known = mark.read_text(encoding="utf-8") if mark.is_file() else None
    if resume and known not in (None, wanted):
        raise UsageError(
            "there is work to resume, but of another compilation",
            where=str(folder),
            why="the model, the pipeline, the text, the seed or nomul itself is not the same",
            fix="give the same command as before, or run without --resume to start over",
        )
    if resume and known == wanted:
        note(f"resuming: {len(list(folder.rglob('block-*.json')))} finished blocks found")
        shutil.rmtree(folder / "crash", ignore_errors=True)
        return
    if resume:
        note("nothing to resume: starting from the beginning")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.write_text(wanted, encoding="utf-8")


def _fingerprint(options: BuildOptions, model: Model, pipeline: Pipeline, data: Data | None) -> str:
    """Hash all that decides what bytes come out."""
    import torch

    text = data.digest if data else ""
    facts = [
        model.fingerprint,
        _stamps(model.path),
        str(pipeline),
        text,
        options.seed,
        options.precision,
        _code_version(),
    ]
    return hashlib.sha256(json.dumps([*facts, torch.__version__]).encode()).hexdigest()


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of a model's files: two finetunes can share every weight that a fingerprint reads."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _code_version() -> str:
    """Return a hash of the modules that decide what bytes come out."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for package in ("ir", "passes", "frontend"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
