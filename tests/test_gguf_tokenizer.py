"""Tokenizers rebuilt from GGUF metadata: exact round trips, splits, special tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from frontend.gguf import gguf_tokenizer, write_tokenizer
from frontend.tokenizer import load_tokenizer
from ir.errors import UnsupportedError, UsageError
from tests.gguf_files import finish, tiny_model, write_tokenizer_file

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def smollm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer_file(tmp_path_factory.mktemp("tok") / "t.gguf", tokenizer__chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def smollm(smollm_file: Path):
    return gguf_tokenizer(smollm_file)


@given(text=st.text())
def test_any_text_comes_back_exactly(smollm, text: str) -> None:
    assert smollm.decode(smollm(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize(
    "text", ["a  b , c !", " lead", "x\r\n\ty\n\n", "e\u0301 \u00e9", "<|im_end|> <think>", "12the 3"]
)
def test_spaces_accents_and_marks_are_kept(smollm, text: str) -> None:
    assert smollm.decode(smollm(text).input_ids) == text


def test_digits_stand_alone_only_where_the_file_says_so(smollm, tmp_path: Path) -> None:
    assert smollm.convert_ids_to_tokens(smollm("the 12").input_ids) == ["t", "he", "Ġ", "1", "2"]
    plain = gguf_tokenizer(write_tokenizer_file(tmp_path / "p.gguf", "gpt-2"))
    assert plain.convert_ids_to_tokens(plain("the 12 the").input_ids) == ["t", "he", "Ġ", "12", "Ġthe"]
    llama3 = gguf_tokenizer(write_tokenizer_file(tmp_path / "l.gguf", "llama-bpe"))
    assert llama3.decode(llama3("the 1234 x").input_ids) == "the 1234 x"
    assert llama3.backend_tokenizer.model.ignore_merges


def test_special_and_user_defined_tokens(smollm) -> None:
    assert (smollm.bos_token_id, smollm.eos_token_id, smollm.unk_token_id, smollm.pad_token_id) == (1, 2, 0, 2)
    assert smollm.model_max_length == 128
    ids = smollm("<|im_start|>in<think><|im_end|>").input_ids
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 4)
    assert smollm.decode(ids, skip_special_tokens=True) == "in<think>"


def test_bos_and_eos_are_put_where_the_file_says(smollm, tmp_path: Path) -> None:
    assert smollm("in").input_ids == smollm("in", add_special_tokens=False).input_ids
    flags = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    framed = gguf_tokenizer(write_tokenizer_file(tmp_path / "b.gguf", **flags))
    bare = framed("in", add_special_tokens=False).input_ids
    assert framed("in").input_ids == [1, *bare, 2]
    assert framed("in", "in").input_ids == [1, *bare, 2, 1, *bare, 2]


@given(text=st.text(max_size=40))
def test_what_is_written_reads_back_the_same(smollm, written: Path, text: str) -> None:
    again = AutoTokenizer.from_pretrained(str(written))
    assert again(text).input_ids == smollm(text).input_ids


@pytest.fixture(scope="module")
def written(smollm_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    write_tokenizer(smollm_file, out)
    # With a configuration beside it, a loader that trusts the model type over the files would pick another class.
    tiny_model("llama").config.save_pretrained(out)
    return out


def test_the_written_directory_has_the_template_and_the_same_settings(smollm, written: Path) -> None:
    again = load_tokenizer(written)
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert (again.eos_token, again.pad_token, again.model_max_length) == ("<|im_end|>", "<|im_end|>", 128)
    assert {path.name for path in written.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(written / "config.json")("in 1").input_ids == smollm("in 1").input_ids


@pytest.mark.parametrize("pre", [None, "default", "no-such-split"])
def test_unknown_splits_are_refused(tmp_path: Path, pre: str | None) -> None:
    with pytest.raises(UnsupportedError, match="splits text"):
        gguf_tokenizer(write_tokenizer_file(tmp_path / "t.gguf", pre))


def bare_file(path: Path, model: str, tokens: list[str] | None, merges: list[str]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre("smollm")
    if tokens is not None:
        writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    return finish(writer)


@pytest.mark.parametrize(
    ("model", "tokens", "merges", "reason"),
    [
        ("bert", ["a"], ["a a"], "bert"),
        ("gpt2", None, ["a a"], "no tokenizer.ggml.tokens"),
        ("gpt2", ["a", "a"], ["a a"], "twice"),
        ("gpt2", ["a", "b"], ["a b"], "not in the vocabulary"),
        ("gpt2", ["a", "b"], ["ab"], "not in the vocabulary"),
    ],
)
def test_files_without_a_usable_tokenizer_are_refused(
    tmp_path: Path, model: str, tokens: list[str] | None, merges: list[str], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        gguf_tokenizer(bare_file(tmp_path / "t.gguf", model, tokens, merges))


def test_special_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(7)
    with pytest.raises(UnsupportedError, match="eos_token_id is 7"):
        gguf_tokenizer(finish(writer))


def test_sentencepiece_vocabularies_round_trip(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 5])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    tokenizer = gguf_tokenizer(finish(writer))
    ids = tokenizer("hi hi é").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁hi", "▁hi", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi hi é"


def test_a_directory_without_a_tokenizer_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model"):
        load_tokenizer(tmp_path / "none")
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        load_tokenizer(tmp_path)
