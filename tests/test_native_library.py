"""Libraries that are damaged, foreign, stale or cannot be built: an exception that says so, never a crash."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from backends.native import build as building
from backends.native.build import built_library, find_compiler, stamp_of
from backends.native.library import load
from ir.errors import UnsupportedError
from tests.native_runs import ROOT, lines_of


def stamped(path: Path) -> Path:
    """Return a file after giving it a stamp that vouches for it."""
    found = {"sources": "0", "sha256": sha256(path.read_bytes()).hexdigest()}
    stamp_of(path).write_text(json.dumps(found), encoding="utf-8")
    return path


def compiled(path: Path, code: str) -> Path:
    """Return a shared library of C++ code, stamped."""
    source = path.with_suffix(".cpp")
    source.write_text(code, encoding="utf-8")
    subprocess.run([find_compiler(), "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return stamped(path)


OPEN = """
from backends.onnxruntime.session import SessionOptions, open_session
from ir.errors import UnsupportedError
(Path(sys.argv[1]) / "model.onnx").touch()
for name in sys.argv[2:]:
    told(lambda: load(Path(name)), UnsupportedError)
    told(lambda: open_session(Path(sys.argv[1]), SessionOptions(library=Path(name))), UnsupportedError)
"""


def test_a_library_that_was_cut_short_is_not_loaded(tmp_path: Path) -> None:
    whole, stamp = built_library().read_bytes(), stamp_of(built_library()).read_bytes()
    names = []
    for size in (0, 63, 4096, len(whole) // 2, len(whole) - 1):
        names.append(tmp_path / f"{size}.so")
        names[-1].write_bytes(whole[:size])
        stamp_of(names[-1]).write_bytes(stamp)
    changed = bytearray(whole)
    changed[len(whole) // 3] ^= 1
    names.append(tmp_path / "changed.so")
    names[-1].write_bytes(changed)
    stamp_of(names[-1]).write_bytes(stamp)
    lines = lines_of(OPEN, tmp_path, *names)
    assert len(lines) == 2 * len(names)
    for line, name in zip(lines, [n for n in names for _ in "ab"], strict=True):
        assert "the kernel library cannot be loaded" in line and "it is damaged" in line and str(name) in line


def test_a_file_that_is_no_library_of_nomul_is_not_loaded(tmp_path: Path) -> None:
    bare, text = tmp_path / "bare.so", tmp_path / "text.so"
    shutil.copy2(built_library(), bare)
    text.write_text("not a library", encoding="utf-8")
    other = compiled(tmp_path / "other.so", 'extern "C" int nomul_version() { return 1; }')
    broken = tmp_path / "broken.so"
    shutil.copy2(built_library(), broken)
    stamp_of(broken).write_text("[1", encoding="utf-8")
    lines = lines_of(OPEN, tmp_path, bare, stamped(text), other, broken, tmp_path / "missing.so")
    assert "it has no stamp bare.json" in lines[0] and "it has no stamp bare.json" in lines[1]
    assert "text.so" in lines[2] and "text.so" in lines[3]
    assert "undefined symbol" in lines[4] and "RegisterCustomOps" in lines[5]
    assert "it has no stamp broken.json" in lines[6] and "there is no such file" in lines[8]


def test_a_library_of_another_layout_version_is_not_used(tmp_path: Path) -> None:
    from backends.native.library import _SIGNATURES

    names = [n for n in _SIGNATURES if n != "nomul_version"]
    code = "\n".join(f'extern "C" void {n}() {{}}' for n in names) + 'extern "C" int nomul_version() { return 2; }'
    with pytest.raises(UnsupportedError, match="weight layout 2, this is 1"):
        load(compiled(tmp_path / "later.so", code))


@pytest.fixture
def copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a compiler that copies the library it is to link; the log of what it linked."""
    script, log = tmp_path / "compiler", tmp_path / "log"
    log.touch()
    script.write_text(
        f"""#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in
    --version) echo copying 1 ;;
    -shared) linking=1 ;;
    -o) out=$2 ;;
  esac
  shift
done
[ -z "$out" ] || : > "$out"
[ -z "$linking" ] || {{ sleep 0.5; cp '{built_library()}' "$out"; echo linked >> '{log}'; }}
""",
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script))
    return log


def test_a_damaged_library_in_the_cache_is_built_again(copying: Path) -> None:
    library = built_library()
    assert library == built_library() and copying.read_text() == "linked\n"
    library.write_bytes(library.read_bytes()[:5000])
    assert library == built_library() and load(library).levels
    stamp_of(library).unlink()
    assert library == built_library() and copying.read_text() == "linked\n" * 3
    assert not list(library.parent.glob("*.tmp"))


def test_processes_that_start_together_build_once(copying: Path) -> None:
    code = "from backends.native.build import built_library; print(built_library())"
    command = [sys.executable, "-c", code]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(6)]
    found = {run.communicate(timeout=120)[0] for run in runs}
    assert [run.returncode for run in runs] == [0] * 6 and len(found) == 1
    assert copying.read_text() == "linked\n"


def test_flags_of_the_environment_make_another_library(copying: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = built_library()
    monkeypatch.setenv("CXXFLAGS", "-O1 -DX='a b'")
    assert built_library() != plain and building._asked_flags() == ("-O1", "-DX=a b")


def failing(path: Path, text: str) -> str:
    """Return a compiler that has a version and compiles nothing."""
    path.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\n{text}\nexit 3\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_fails_or_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match="CXX=no-such-compiler"):
        built_library()
    monkeypatch.setenv("CXX", failing(tmp_path / "loud", "echo 'x.cpp:1: error: no such thing' >&2"))
    with pytest.raises(UnsupportedError, match=r"cannot be compiled[\s\S]*no such thing[\s\S]*set CXX"):
        built_library()
    monkeypatch.setenv("CXX", failing(tmp_path / "silent", ""))
    with pytest.raises(UnsupportedError, match="ended with status 3"):
        built_library()
    monkeypatch.setenv("CXX", failing(tmp_path / "none", ""))
    (tmp_path / "none").write_text("no program", encoding="utf-8")
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        built_library()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_told(copying: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(copying))
    with pytest.raises(UnsupportedError, match=r"cannot be kept[\s\S]*XDG_CACHE_HOME"):
        built_library()


def test_the_stamp_vouches_for_the_library_that_is_loaded() -> None:
    found = json.loads(stamp_of(built_library()).read_text())
    assert found["sha256"] == sha256(built_library().read_bytes()).hexdigest()
    assert found["sources"] == building.sources_digest()
    assert ctypes.CDLL(str(built_library())).nomul_version() == 1
