"""Texts for calibration and evaluation: a file, or the text that every Python installation carries."""

from __future__ import annotations

import json
from pathlib import Path

from ir.errors import UsageError

BUILTIN = "builtin"


def load_text(spec: str) -> str:
    """Return a text: `builtin`, or the file of that name (.jsonl: the fields `text`, one object a line).

    `builtin` is the help text of the running Python (`pydoc_data.topics`), which differs a little between versions.
    Raises UsageError for a file that is missing, empty, not UTF-8 or not JSON lines with a text.
    """
    text = _builtin() if spec == BUILTIN else _read(Path(spec).expanduser())
    if not text.strip():
        raise UsageError("the text is empty", where=spec, fix=f"give a file with text, or {BUILTIN}")
    return text


def _builtin() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(
            "the text cannot be read", where=str(path), why=why, fix=f"give a file, or {BUILTIN}"
        ) from None
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is {error.object[error.start]:#04x}: {error.reason}"
        raise UsageError("the text is not UTF-8", where=str(path), why=why, fix="convert it to UTF-8") from None
    # As Python reads text files: figures must not depend on which line ends a copy of the text came with.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _json_lines(path, text) if path.suffix.lower() == ".jsonl" else text


def _json_lines(path: Path, text: str) -> str:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UsageError('a line is no object with a field "text"', where=f"{path}:{number}", why=why) from None
        if not isinstance(found, str):
            raise UsageError("a text is not a string", where=f"{path}:{number}", why=f"it is {found!r:.60}")
        texts.append(found)
    return "\n\n".join(texts)
