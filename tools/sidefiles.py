"""Everything of a model that is not weights: copied byte for byte, or written from a GGUF header."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ir.artifact import MANIFEST_FILE, PROGRAM_FILE
from ir.errors import UnsupportedError

if TYPE_CHECKING:
    from frontend.open import Model

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".data"}
_OURS = {PROGRAM_FILE, MANIFEST_FILE, "report.json", "report.html"}
_CODE = {".py", ".pkl", ".pickle", ".so"}
# Configuration, tokenizer and chat template, as Hugging Face names them.
_KNOWN = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)


def copy_side_files(model: Model, folder: Path) -> list[str]:
    """Bring configuration, tokenizer and chat template into an artifact folder; return notes for the user."""
    if model.kind == "gguf":
        return _from_gguf(model, folder)
    if model.kind == "onnx":
        return _beside(model.path.parent, folder)
    for path in sorted(model.path.iterdir()):
        skipped = path.suffix in _WEIGHTS | _CODE or path.name in _OURS or path.name.endswith(".index.json")
        if path.is_file() and not skipped and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    return []


def _beside(source: Path, folder: Path) -> list[str]:
    """Copy what belongs to a model among the files that happen to lie beside it."""
    for name in _KNOWN:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return []


def _from_gguf(model: Model, folder: Path) -> list[str]:
    from frontend.gguf_tokenizer import gguf_tokenizer, write_tokenizer

    (folder / "config.json").write_text(model.config.to_json_string(use_diff=True), encoding="utf-8")
    try:
        write_tokenizer(model.path, folder)
        tokenizer = gguf_tokenizer(model.path)
    except UnsupportedError as error:
        return [f"the artifact has no tokenizer: {error.why or error.what}"]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = json.dumps({k: v for k, v in special.items() if v is not None}, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return []
