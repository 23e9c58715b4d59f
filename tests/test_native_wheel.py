"""Wheels with and without compiled kernels, and an installation that runs the ones it came with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
NO_COMPILER = "no-such-compiler"

# Prints where the library lies and how far its product is from the decoded weight, in a process of its own.
PRODUCT = """
import torch
from backends.native.build import built_library
from backends.native.layout import pack
from backends.native.library import load
from ir.ops.shiftcode import encode
generator = torch.Generator().manual_seed(1)
signs = torch.rand(3, 70, 96, generator=generator) < 0.5
alpha = torch.randn(70, 3, 3, generator=generator).abs().double()
codes, x = encode(signs, alpha, None, 32, 2), torch.randn(4, 96, generator=generator)
wanted = x.double() @ codes.dequantize(torch.float64).T
got = load().linear(x, pack(codes), None, "exact").double()
print(built_library(), float((got - wanted).norm() / wanted.norm()))
"""


def sources(folder: Path) -> Path:
    """Return a copy of the checkout as far as a build reads it, so that nothing is built into the checkout."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "nomul.py"):
        shutil.copy2(ROOT / name, folder / name)
    for name in ("ir", "passes", "frontend", "backends", "tools"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Return the wheel that a compiler and flags of the environment make, and what the build says."""
    made = folder / "wheels"
    command = [*("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"), "-w", str(made), str(folder)]
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    (found,) = made.glob("*.whl")
    return found, done.stdout + done.stderr


def run_installed(folder: Path, cache: Path, code: str = PRODUCT, **environment: str) -> subprocess.CompletedProcess:
    """Run code on an unpacked wheel, with a cache of its own."""
    own = {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(cache), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=cache.parent,
        env={**os.environ, **own, **environment},
        timeout=580,
    )


def test_a_wheel_built_with_a_compiler_runs_without_one_and_never_runs_stale_kernels(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    # Unoptimised: the compiler takes a quarter of the time, and what is computed is the same.
    path, log = wheel(sources(tmp_path / "sources"), CXXFLAGS="-O0")
    assert "compiled kernels into" in log
    python, interface, platform = path.stem.split("-")[2:]
    assert (python, interface) == ("py3", "none") and platform != "any"
    installed = tmp_path / "installed"
    with zipfile.ZipFile(path) as file:
        file.extractall(installed)
        assert "Root-Is-Purelib: false" in file.read("nomul-0.1.0.dist-info/WHEEL").decode()
    library = installed / "backends" / "native" / "libnomul.so"
    done = run_installed(installed, tmp_path / "cache", CXX=NO_COMPILER)
    assert done.returncode == 0, done.stderr
    where, error = done.stdout.split()
    assert Path(where) == library and float(error) < 1e-6 and not (tmp_path / "cache").exists()

    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    done = run_installed(installed, tmp_path / "cache", CXX=NO_COMPILER)
    assert done.returncode == 1 and "it is damaged" in done.stderr and "install g++ or clang++" in done.stderr

    library.write_bytes(whole)
    source = installed / "backends" / "native" / "src" / "nomul.h"
    source.write_text(source.read_text() + "// newer\n")
    done = run_installed(installed, tmp_path / "cache", CXX=NO_COMPILER)
    assert done.returncode == 1 and "it is of other sources" in done.stderr
    done = run_installed(installed, tmp_path / "cache", CXXFLAGS="-O0")
    assert done.returncode == 0, done.stderr
    where, error = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path / "cache") and float(error) < 1e-6


def test_a_wheel_built_without_a_compiler_is_pure_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    path, log = wheel(sources(tmp_path / "sources"), CXX=NO_COMPILER)
    assert path.name.endswith("-py3-none-any.whl")
    assert "the wheel has no compiled kernels" in log and f"CXX={NO_COMPILER}" in log
    names = zipfile.ZipFile(path).namelist()
    assert not [n for n in names if n.endswith((".so", "libnomul.json"))]
    assert {"backends/native/src/dispatch.cpp", "backends/native/src/layout.h"} <= set(names)


def test_the_build_module_imports_nothing_heavy() -> None:
    code = "import sys; import backends.native.build; print(sorted({'torch', 'numpy', 'filelock'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
