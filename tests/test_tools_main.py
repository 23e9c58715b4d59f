"""The `nomul` dispatcher: its help is fast and complete, and every failure has its exit code."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from ir.errors import GateError, NomulError, ResourceError, UnsupportedError, UsageError
from tools.__main__ import commands, main
from tools.entry import run


def test_help_is_fast_and_imports_no_torch() -> None:
    code = "import sys; from tools.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    # The promise is 0.3 s; other work on the machine may slow any one run, so the best of three counts, with slack.
    assert min(times) < 1.0


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, summary in commands().items():
        assert name in out and summary and summary in out


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.__main__.commands", lambda: {"compile": "x", "bench": "y"})
    assert main(["compil"]) == 2
    assert "did you mean `compile`?" in capsys.readouterr().err


def test_no_arguments_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NomulError("x"), 1),
        (UsageError("x"), 2),
        (UnsupportedError("x"), 3),
        (GateError("x"), 4),
        (ResourceError("x"), 5),
        (MemoryError(), 5),
        (OSError(28, "No space left on device"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_have_their_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_: object) -> int:
        raise error

    assert run(fails, []) == code
    err = capsys.readouterr().err
    assert err and "Traceback" not in err


def test_unexpected_errors_keep_their_traceback() -> None:
    def fails(_: object) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fails, [])
