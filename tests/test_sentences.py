"""Embeddings of sentences: which are chosen, that padding does not count, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from ir.errors import UsageError
from tools.evaluate import main
from tools.load import load
from tools.sentences import embeddings, sentences, similarity
from tools.text import load_text

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, *"the a list of names is not what you think it was before this one . ,".split()]  # noqa: SIM905
TEXT = "The list of names is not what you think. You think this one was the list of names. A list. " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **shape)
    BertModel(config, add_pooling_layer=False).save_pretrained(str(path))
    (path / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast(str(path / "words.txt")).save_pretrained(str(path))
    return path


def test_sentences_are_distinct_and_of_some_length() -> None:
    assert sentences(TEXT, 2) == [part + "." for part in TEXT.split(". ")[:2]]
    with pytest.raises(UsageError, match="fewer than 3"):
        sentences(TEXT, 3)
    with pytest.raises(UsageError, match="at least 1"):
        sentences(TEXT, 0)


def test_the_builtin_text_has_two_hundred() -> None:
    found = sentences(load_text("builtin"), 200)
    assert len(set(found)) == 200 and all(6 <= len(s.split()) <= 30 for s in found)


def test_padding_does_not_count(folder: Path) -> None:
    runtime = load(folder)
    long, short = "The list of names is not what you think it was before this one.", "The list."
    together = embeddings(runtime, [short, long], lambda _: None)
    alone = embeddings(runtime, [short], lambda _: None)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
    assert similarity(together, together).least == pytest.approx(1.0, abs=1e-6)
    assert similarity(together[:1], together[1:]).mean < 0.999


def test_the_command_compares_encoders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--against", str(folder), "--text", str(text), "--sentences", "2"]
    assert main([str(folder), *options, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["sentences"] == 2 and row["least_cosine"] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(UsageError, match="--against"):
        main([str(folder), "--text", str(text)])
