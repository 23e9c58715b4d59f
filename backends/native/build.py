"""Building the kernel library: once for each machine, into the user's cache, unless it came with the package."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from ir.errors import UnsupportedError

SOURCES = Path(__file__).parent / "src"
# Shipped beside the sources when the package was installed with a compiler.
INSTALLED = Path(__file__).parent / "libnomul.so"
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
_ANYWHERE = ("dispatch", "ort", "stream", "level_portable")
_WAIT = 600.0


def built_library() -> Path:
    """Return the library: the installed one, or one compiled from these sources and kept in the user's cache.

    Raises UnsupportedError when there is no compiler, or it fails.
    """
    if INSTALLED.exists():
        return INSTALLED
    compiler = _compiler()
    target = _cache_folder() / f"libnomul-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=_WAIT):
            if not target.exists():
                build(target, compiler)
    except (OSError, Timeout) as error:
        raise UnsupportedError(
            "the kernel library cannot be kept",
            where=str(target.parent),
            why=str(error),
            fix="set XDG_CACHE_HOME to a directory that can be written, or wait for the process that builds it",
        ) from error
    return target


def build(target: Path, compiler: str | None = None, flags: tuple[str, ...] = ()) -> None:
    """Compile the library to `target`; flags: more of them, for all units. Raises UnsupportedError as above."""
    compiler = compiler or _compiler()
    with tempfile.TemporaryDirectory(prefix="nomul-") as scratch:
        folder = Path(scratch)
        units = _units()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: _compile(compiler, name, folder, flags), units))
        objects = [str(folder / f"{name}.o") for name in units]
        made = folder / "libnomul.so"
        _run([compiler, "-shared", "-pthread", *flags, "-o", str(made), *objects])
        # Moved under its name only when whole: another process may be waiting to load it.
        beside = target.with_suffix(f".{os.getpid()}.tmp")
        shutil.copy2(made, beside)
        beside.replace(target)


def _units() -> tuple[str, ...]:
    return tuple(_UNITS) if platform.machine() in ("x86_64", "AMD64") else _ANYWHERE


def _compile(compiler: str, name: str, folder: Path, flags: tuple[str, ...]) -> None:
    unit = [*_FLAGS, *_QUIET, *_UNITS[name], *flags]
    _run([compiler, *unit, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o")])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-3:]
        raise UnsupportedError(
            "the kernel library cannot be compiled",
            where=" ".join(command),
            why="; ".join(lines[:3]),
            fix="set CXX to a C++17 compiler, or use --target reference",
        )


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "clang++", "c++"):
        if (found := shutil.which(name)) is not None:
            return found
    raise UnsupportedError(
        "there is no C++ compiler to build the kernels with",
        where=f"CXX={asked}" if asked else "PATH",
        why="no wheel with compiled kernels is installed",
        fix="install g++ or clang++, or use --target reference",
    )


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], check=False, capture_output=True, text=True)
    digest.update(f"{version.stdout}{_FLAGS}{_UNITS}{platform.machine()}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nomul" / "native"
