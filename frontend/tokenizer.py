"""Loading the tokenizer that belongs to a model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from frontend.gguf_tokenizer import gguf_tokenizer
from ir.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without one of these transformers would make up an empty tokenizer from the configuration.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a GGUF file, of a Hugging Face directory or artifact, or of the directory of a file.

    Code that comes with a model is never run. Raises UsageError when there is no such path, UnsupportedError when it
    brings no tokenizer or one that cannot be read.
    """
    if not model.exists():
        raise UsageError("there is no such model", where=str(model), fix="check the path")
    if model.is_file() and model.suffix.lower() == ".gguf":
        return gguf_tokenizer(model)
    folder = model if model.is_dir() else model.parent
    if not any((folder / name).is_file() for name in _FILES):
        raise UnsupportedError(
            "the model has no tokenizer",
            where=str(folder),
            why=f"none of {', '.join(_FILES)} is there",
            fix="put the tokenizer files of the original model beside its weights",
        )
    return _from_directory(folder)


def _from_directory(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # The tokenizers library raises bare Exception for a file that it cannot parse.
    except Exception as error:
        raise UnsupportedError(
            "the tokenizer of the model cannot be read",
            where=str(folder),
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="fetch the tokenizer files again",
        ) from error
