"""Building the kernel library: once for each machine, into the user's cache, unless it came with the package.

A stamp beside a library says which sources it was made of and what its bytes are. Nothing is loaded that its stamp does
not vouch for: mapping a file that was cut short ends the process. This module is imported while a wheel is built, where
no other package need be there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ir.errors import UnsupportedError

SOURCES = Path(__file__).parent / "src"
LIBRARY = "libnomul.so"
# Shipped beside the sources when the package was installed with a compiler.
INSTALLED = Path(__file__).parent / LIBRARY
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")
# GCC warns of the undefined values that its own intrinsics start from.
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
# One translation unit an instruction set, each with its flags: nothing compiled for a newer CPU is run on an older one.
_UNITS = {
    "dispatch": ("-O2",),
    "ort": ("-O2",),
    "stream": ("-O3",),
    # Its loops over sixteen rows take -O3 long to compile and gain little.
    "level_portable": ("-O2",),
    "level_avx2": ("-O3", "-mavx2", "-mfma", "-mf16c"),
    "level_avx512": (
        *("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni"),
        *("-mfma", "-mf16c"),
    ),
}
_UNITS["level_amx"] = (*_UNITS["level_avx512"], "-mamx-tile", "-mamx-int8")
_ANYWHERE = ("dispatch", "ort", "stream", "level_portable")
_WAIT = 600.0


def built_library() -> Path:
    """Return the library: the installed one where it is whole and of these sources, or one compiled from them and kept
    in the user's cache.

    Raises UnsupportedError when there is no compiler, or it fails.
    """
    if _problem(INSTALLED) is None and _stamp(INSTALLED).get("sources") == sources_digest():
        return INSTALLED
    compiler = find_compiler()
    target = _cache_folder() / f"libnomul-{_fingerprint(compiler)}.so"
    if _problem(target) is not None:
        _build_once(target, compiler)
    return target


def require_whole(library: Path) -> None:
    """Raise UnsupportedError unless a library is, byte for byte, what `build` wrote there."""
    if (problem := _problem(library)) is not None:
        raise UnsupportedError(
            "the kernel library cannot be loaded",
            where=str(library),
            why=problem,
            fix="delete it, so that it is built again, or run with --target reference",
        )


def build(target: Path, compiler: str | None = None, flags: tuple[str, ...] = ()) -> None:
    """Compile the library to `target`, with its stamp; flags: more of them, for all units, after those of CXXFLAGS.

    Raises UnsupportedError when there is no compiler, or it fails.
    """
    compiler = compiler or find_compiler()
    flags = (*_asked_flags(), *flags)
    with tempfile.TemporaryDirectory(prefix="nomul-") as scratch:
        folder = Path(scratch)
        units = _units()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: _compile(compiler, name, folder, flags), units))
        objects = [str(folder / f"{name}.o") for name in units]
        made, stamp = folder / LIBRARY, folder / "stamp"
        _run([compiler, "-shared", "-pthread", *flags, "-o", str(made), *objects])
        stamp.write_text(json.dumps({"sources": sources_digest(), "sha256": _digest_of(made)}), encoding="utf-8")
        _move(made, target)
        # Last, so that whoever finds a stamp that fits finds the whole library.
        _move(stamp, stamp_of(target))


def stamp_of(library: Path) -> Path:
    """Return where the stamp of a library lies."""
    return library.with_suffix(".json")


def sources_digest() -> str:
    """Return a digest of the sources and of how they are compiled here, whatever the compiler."""
    digest = hashlib.sha256(f"{_FLAGS}{_UNITS}{platform.machine()}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def find_compiler() -> str:
    """Return the path of a C++ compiler: CXX, or the first on the PATH; raises UnsupportedError when there is none."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "clang++", "c++"):
        if (found := shutil.which(name)) is not None:
            return found
    installed = f"{INSTALLED}: {_problem(INSTALLED) or 'it is of other sources'}"
    raise UnsupportedError(
        "there is no C++ compiler to build the kernels with",
        where=f"CXX={asked}" if asked else "PATH",
        why=f"the installed library cannot be used, {installed}"
        if INSTALLED.exists()
        else "no wheel with compiled kernels is installed",
        fix="install g++ or clang++, or use --target reference",
    )


def _build_once(target: Path, compiler: str) -> None:
    """Build `target` unless another process does, and wait for it."""
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=_WAIT):
            if _problem(target) is not None:
                build(target, compiler)
    except (OSError, Timeout) as error:
        raise UnsupportedError(
            "the kernel library cannot be kept",
            where=str(target.parent),
            why=str(error),
            fix="set XDG_CACHE_HOME to a directory that can be written, or wait for the process that builds it",
        ) from error


def _problem(library: Path) -> str | None:
    """Return why a library is not what its stamp says, or None when it is."""
    if not library.is_file():
        return "there is no such file"
    stamp = _stamp(library)
    if not stamp:
        return f"it has no stamp {stamp_of(library).name} beside it, so that it is not one that nomul built"
    return None if stamp.get("sha256") == _digest_of(library) else "it is damaged: its bytes are not those of its stamp"


def _stamp(library: Path) -> dict[str, str]:
    """Return the stamp of a library, empty where there is none that can be read."""
    try:
        found = json.loads(stamp_of(library).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _move(made: Path, target: Path) -> None:
    """Put a file under its name only when it is whole there: another process may be waiting to load it."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.copy2(made, beside)
    beside.replace(target)


def _units() -> tuple[str, ...]:
    return tuple(_UNITS) if platform.machine() in ("x86_64", "AMD64") else _ANYWHERE


def _compile(compiler: str, name: str, folder: Path, flags: tuple[str, ...]) -> None:
    unit = [*_FLAGS, *_QUIET, *_UNITS[name], *flags]
    _run([compiler, *unit, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")])


def _run(command: list[str]) -> str:
    """Return what a compiler prints; raises UnsupportedError when it cannot be started or fails."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        problem = f"{command[0]} ended with status {done.returncode}" if done.returncode else ""
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-3:]
    except OSError as error:
        problem, lines = str(error), []
    if problem:
        raise UnsupportedError(
            "the kernel library cannot be compiled",
            where=" ".join(command),
            why="; ".join(lines[:3]) or problem,
            fix="set CXX to a C++17 compiler, or use --target reference",
        )
    return done.stdout


def _asked_flags() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get("CXXFLAGS", "")))


def _fingerprint(compiler: str) -> str:
    """Return what tells one library in the cache from another."""
    version = _run([compiler, "--version"])
    return hashlib.sha256(f"{version}{_asked_flags()}{sources_digest()}".encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nomul" / "native"
