"""Texts kept under tests/golden: compared whole, rewritten by `pytest --update-golden`."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "golden"


def check_golden(name: str, text: str, request: pytest.FixtureRequest) -> None:
    """Compare a text with tests/golden/<name>, whole; under --update-golden write it there instead."""
    path = FOLDER / name
    text = text.rstrip("\n") + "\n"
    if request.config.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no tests/golden/{name}; pytest --update-golden writes it"
    assert text == path.read_text(encoding="utf-8"), f"tests/golden/{name} differs; --update-golden accepts the change"
