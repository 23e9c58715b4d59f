"""Texts for calibration and evaluation: a file, or the text that every Python installation carries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ir.errors import UsageError

BUILTIN = "builtin"


@dataclass(frozen=True)
class Piece:
    """A part of a text; counted: whether training is to predict it or only reads it; ends: whether a text ends here."""

    text: str
    counted: bool = True
    ends: bool = False


def load_text(spec: str) -> str:
    """Return a text: `builtin`, or the file of that name (.jsonl: the texts of its lines, one after another).

    `builtin` is the help text of the running Python (`pydoc_data.topics`), which differs a little between versions.
    Raises UsageError for a file that is missing, empty, not UTF-8 or not JSON lines with a text.
    """
    return "".join(piece.text for piece in load_pieces(spec))


def load_pieces(spec: str) -> list[Piece]:
    """Return a text in pieces: one, but for .jsonl files with a `prompt` and a `response` a line, which are apart.

    Other lines have a `text`; a file has the one kind or the other. Raises UsageError as `load_text`.
    """
    pieces = [Piece(_builtin())] if spec == BUILTIN else _read(Path(spec).expanduser())
    if not any(piece.text.strip() and piece.counted for piece in pieces):
        raise UsageError("the text is empty", where=spec, fix=f"give a file with text, or {BUILTIN}")
    return pieces


def _builtin() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read(path: Path) -> list[Piece]:
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
    return _json_lines(path, text) if path.suffix.lower() == ".jsonl" else [Piece(text)]


def _json_lines(path: Path, text: str) -> list[Piece]:
    texts, pairs = list[str](), list[Piece]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            found = json.loads(line)
            parts = [found["prompt"], found["response"]] if "text" not in found else [found["text"]]
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise UsageError(
                'a line is no object with a field "text", or with "prompt" and "response"', where=where, why=why
            ) from None
        for part in parts:
            if not isinstance(part, str):
                raise UsageError("a text is not a string", where=where, why=f"it is {part!r:.60}")
        if len(parts) == 2:
            pairs += [Piece(parts[0], counted=False), Piece(parts[1], ends=True)]
        else:
            texts += parts
        if texts and pairs:
            why = "a text is learned from its start, a response after its prompt"
            raise UsageError("a file has texts or prompts with responses, not both", where=where, why=why)
    return pairs or [Piece("\n\n".join(texts))]
