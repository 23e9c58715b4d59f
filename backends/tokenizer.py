"""The tokenizer and the end tokens that lie in an artifact folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ir.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
_SETTINGS = ("generation_config.json", "config.json")


def folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an artifact folder; raises UnsupportedError when it is missing or cannot be read."""
    if not (folder / TOKENIZER_FILE).is_file():
        raise UnsupportedError(
            "the model has no tokenizer",
            where=str(folder),
            why=f"{TOKENIZER_FILE} is not there",
            fix="copy the tokenizer files of the original model there, or give token ids instead of text",
        )
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    # The tokenizers library raises bare Exception for a file that it cannot parse.
    except Exception as error:
        raise UnsupportedError(
            "the tokenizer of the model cannot be read",
            where=str(folder / TOKENIZER_FILE),
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="copy the tokenizer files of the original model there again",
        ) from error


def end_tokens(folder: Path) -> set[int]:
    """Return the end-of-text ids that the first settings file of a folder that names any gives."""
    for name in _SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UnsupportedError("a settings file is damaged", where=str(path), why=str(error)) from None
        ids = found if isinstance(found, list) else [found]
        if found is not None:
            return {int(i) for i in ids}
    return set()
