"""Generation: greedy equals repeated argmax, draws are seeded, text streams whole, and it stops where it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from backends.generation import Sampling, TextStream, choose
from backends.reference.runtime import ReferenceRuntime
from ir.errors import UnsupportedError, UsageError
from tests.programs import tiny_mlp_program
from tests.tiny_model import compressed_tiny, tiny_program, word_tokenizer, write_artifact
from tools.entry import run
from tools.generate import chat_prompt, main
from tools.load import load

PROMPT = (5, 9, 12)


@pytest.fixture(scope="module")
def runtime() -> ReferenceRuntime:
    return ReferenceRuntime(tiny_program(), tokenizer=word_tokenizer)


def greedy(runtime: ReferenceRuntime, count: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(runtime.forward(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(PROMPT) :]


def test_greedy_with_cache_equals_argmax_without(runtime: ReferenceRuntime) -> None:
    result = runtime.generate(PROMPT, 12)
    assert list(result.ids) == greedy(runtime, 12)[: len(result.ids)]
    assert result.prompt_ids == PROMPT and result.text == "" and result.prefill_seconds > 0


def test_programs_without_cache_generate_too() -> None:
    runtime = ReferenceRuntime(tiny_mlp_program())
    assert list(runtime.generate(PROMPT, 6).ids) == greedy(runtime, 6)


def test_draws_depend_on_the_seed_alone(runtime: ReferenceRuntime) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        torch.manual_seed(seed * 17)
        return runtime.generate(PROMPT, 10, temperature=2.0, seed=seed).ids

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    torch.set_rng_state(state)
    runtime.generate(PROMPT, 3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_limits_keep_the_likeliest_tokens() -> None:
    logits, generator = torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.Generator().manual_seed(0)

    def drawn(**settings: float) -> set[int]:
        sampling = Sampling(temperature=1.0, **settings)  # type: ignore[arg-type]
        return {choose(logits, sampling, generator) for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 2}
    # The shares are 0.64, 0.24, 0.09, 0.03: the second token is where the mass passes 0.7.
    assert drawn(top_p=0.7) == {1, 2}
    assert drawn(top_p=1e-9) == {1} == drawn(top_k=1)
    assert choose(logits, Sampling(), generator) == 1


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range_are_refused(runtime: ReferenceRuntime, settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        runtime.generate(PROMPT, 2, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="temperature"):
        Sampling(temperature=float("nan"))


def test_empty_prompts_and_no_tokens_are_refused(runtime: ReferenceRuntime) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        runtime.generate("", 2)
    with pytest.raises(UsageError, match="nothing is to be generated"):
        runtime.generate(PROMPT, 0)
    with pytest.raises(UsageError, match="no finite logits"):
        choose(torch.tensor([float("nan")]), Sampling(), torch.Generator())


def test_generation_stops_at_an_end_token(runtime: ReferenceRuntime) -> None:
    ids = runtime.generate(PROMPT, 8).ids
    stopping = ReferenceRuntime(tiny_program())
    stopping.__dict__["end_tokens"] = frozenset({ids[2]})
    result = stopping.generate(PROMPT, 8)
    assert result.stopped == "end" and result.ids == ids[: ids.index(ids[2]) + 1]
    assert runtime.generate(PROMPT, 2).stopped == "length"


def test_pieces_add_up_to_the_text(runtime: ReferenceRuntime) -> None:
    pieces: list[str] = []
    result = runtime.generate("w5 w9", 6, on_text=pieces.append)
    assert "".join(pieces) == result.text and result.prompt_ids == (5, 9)
    assert result.text == "".join(f"w{i}" for i in result.ids if i > 1)


def test_characters_split_over_tokens_come_out_whole() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    ids = tokenizer("naïve 雪")["input_ids"]
    stream = TextStream(tokenizer, ids[:2])
    pieces = [stream.add(token) for token in ids[2:]]
    assert [p for p in pieces if p] == ["ï", "v", "e", " ", "雪"] and stream.rest() == ""
    cut = TextStream(tokenizer, ids[:2])
    assert cut.add(ids[2]) == "" and cut.rest() == "\ufffd" and cut.text == "\ufffd"


def test_the_command_streams_text_and_reports_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_artifact(tmp_path / "a", compressed_tiny(), chat=True))
    assert main([folder, "w5 w9", "-n", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n") and "2 tokens read" in err and "\x1b" not in out + err
    assert main([folder, "w5 w9", "-n", "5", "--json", "--mode", "shift"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] + "\n" == out and report["prompt_ids"] == [5, 9]
    assert main([folder, "w5", "-n", "2", "--chat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_ids"] == [2, 5, 3]


def test_chat_without_a_template_is_unsupported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_artifact(tmp_path / "a", tiny_program())
    with pytest.raises(UnsupportedError, match="no chat template"):
        chat_prompt(load(folder), "w5")
    assert run(main, [str(folder), "w5", "--mode", "divide"]) == 2
    assert run(main, [str(tmp_path / "missing.gguf"), "w5"]) == 2
    assert "Traceback" not in capsys.readouterr().err
