"""Evaluation: the metrics against plain formulas, windows and texts, stored bits counted by hand, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ir.errors import UsageError
from tests.tiny_model import GROUP, compressed_tiny, some_text, tiny_program, write_artifact
from tools.entry import run
from tools.evaluate import main
from tools.load import load
from tools.perplexity import Tally, agreement, kl_divergence, nll, window_tokens
from tools.storage import storage
from tools.text import load_text


def logits(seed: int, batch: int = 2, ctx: int = 300, vocab: int = 7) -> torch.Tensor:
    return torch.randn(batch, ctx, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_loss_is_cross_entropy_of_the_next_token() -> None:
    ids = torch.randint(0, 7, (2, 300))
    want = torch.nn.functional.cross_entropy(logits(0)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert nll(logits(0), ids).shape == (2, 299)
    torch.testing.assert_close(nll(logits(0), ids), want)
    assert nll(logits(0).bfloat16(), ids).dtype == torch.float32


def test_divergence_is_that_of_the_teacher_from_the_student() -> None:
    p, q = (logits(seed)[:, :-1].double().softmax(-1) for seed in (1, 2))
    want = (p * (p / q).log()).sum(-1).float()
    torch.testing.assert_close(kl_divergence(logits(1), logits(2)), want, rtol=1e-4, atol=1e-5)
    assert kl_divergence(logits(1), logits(1)).abs().max() == 0
    assert not torch.allclose(kl_divergence(logits(2), logits(1)), want)


def test_impossible_tokens_of_the_teacher_do_not_count() -> None:
    teacher, student = logits(1), logits(2)
    teacher[..., 0] = -math.inf
    assert torch.isfinite(kl_divergence(teacher, student)).all()
    student[..., 0] = -math.inf
    assert torch.isfinite(kl_divergence(teacher, student)).all()


def test_agreement_counts_equal_first_choices() -> None:
    teacher, student = torch.eye(4)[None], torch.eye(4)[[0, 2, 2, 0]][None]
    assert agreement(teacher, student).tolist() == [[True, False, True]]


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    assert window_tokens(range(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]  # type: ignore[arg-type]
    assert window_tokens(list(range(11)), 4, 1).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(UsageError, match=r"3 windows of 4(.|\n)*11 tokens, and 12 are needed"):
        window_tokens(list(range(11)), 4, 3)
    with pytest.raises(UsageError, match="1 window of 12"):
        window_tokens(list(range(11)), 12)
    for ctx, windows in ((1, None), (4, 0)):
        with pytest.raises(UsageError, match="at least 2 tokens"):
            window_tokens(list(range(11)), ctx, windows)


def test_perplexity_is_the_exponential_of_the_mean_over_windows() -> None:
    tally, ids = Tally(), torch.randint(0, 7, (2, 300))
    tally.add(logits(0), ids)
    assert tally.perplexity == pytest.approx(math.exp(float(nll(logits(0), ids).double().mean())), rel=1e-9)
    assert tally.kl is None and tally.top1 is None
    uniform = Tally()
    uniform.add(torch.zeros(1, 5, 64), torch.zeros(1, 5, dtype=torch.long))
    assert uniform.perplexity == pytest.approx(64)
    overflow = Tally(losses=[1e4])
    assert overflow.perplexity == math.inf and math.isnan(Tally(losses=[math.nan]).perplexity)


def test_texts(tmp_path: Path) -> None:
    assert len(load_text("builtin")) > 100_000 and load_text("builtin") == load_text("builtin")
    for name, content in (("a.txt", b"\xef\xbb\xbfone\r\ntwo"), ("a.raw", b"one\ntwo")):
        (tmp_path / name).write_bytes(content)
        assert load_text(str(tmp_path / name)) == "one\ntwo"
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one"}\n\n{"text": "two\\u2028"}\n', encoding="utf-8")
    assert load_text(str(rows)) == "one\n\ntwo\u2028"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "text is empty"),
        ("a.txt", b"ab\xff", "not UTF-8(.|\n)*byte 2 is 0xff"),
        ("a.jsonl", b'{"text": "a"}\nnonsense', "a.jsonl:2"),
        ("a.jsonl", b'{"body": "a"}', 'field "text"'),
        ("a.jsonl", b'["a"]', 'field "text"'),
        ("a.jsonl", b'{"text": 3}', "not a string"),
        ("b", None, "cannot be read"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_text(str(tmp_path / name))


def test_stored_bits_are_those_of_all_stored_tensors() -> None:
    found = storage(compressed_tiny())
    by_name = {s.name: s for s in found.sites}
    assert len(by_name) == 14 and all(s.compressed for s in found.sites)
    shift, quant = by_name["model.layers.0.mlp.up_proj"], by_name["model.layers.1.mlp.up_proj"]
    # 48 rows of 32 inputs in 2 groups: 2 planes of 4 bytes, 8 scale nibbles, 2 exponents, 4 offset nibbles a row.
    assert (shift.rows, shift.inputs, shift.planes, shift.group, shift.bits) == (48, 32, 2, GROUP, None)
    assert shift.stored_bytes == 48 * (2 * 4 + 4 + 2 + 2)
    # 32 codes of 3 bits, 2 half scales, 2 zeros of 3 bits in one byte a row.
    assert (quant.bits, quant.planes) == (3, None) and quant.stored_bytes == 48 * (12 + 4 + 1)
    weights = sum(s.rows * s.inputs for s in found.sites)
    assert found.compressed_bits == found.linear_bits == 8 * sum(s.stored_bytes for s in found.sites) / weights


def test_stored_bits_of_a_float_model_leave_the_tied_head_out() -> None:
    program = tiny_program()
    found = storage(program)
    assert found.compressed_bits is None and found.linear_bits == 32 and found.model_bits == 32
    assert not [s for s in found.sites if "head" in s.name]
    assert found.total_weights == storage(compressed_tiny()).total_weights
    assert found.total_bytes == program.params.total_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_artifact(tmp_path_factory.mktemp("evaluate") / "a", compressed_tiny()))


def test_the_command_measures_what_the_formula_says(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, plain = tmp_path / "t.txt", str(write_artifact(tmp_path / "float", tiny_program()))
    text.write_text(some_text(100), encoding="utf-8")
    options = [folder, "--text", str(text), "--ctx", "16", "--windows", "5"]
    assert main([*options, "--against", plain, "--json", "--batch", "2"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    runtime, teacher = load(folder), load(plain)
    windows = torch.tensor(runtime.tokenizer(some_text(100))["input_ids"][:80]).view(5, 16)
    ours, theirs = runtime.forward(windows)[0], teacher.forward(windows)[0]
    assert report["perplexity"] == pytest.approx(math.exp(float(nll(ours, windows).mean())), rel=1e-5)
    assert report["kl"] == pytest.approx(float(kl_divergence(theirs, ours).mean()), rel=1e-4)
    assert report["top1_agreement"] == pytest.approx(float(agreement(theirs, ours).double().mean()))
    assert report["tokens"] == 80 and report["predictions"] == 75 and report["windows"] == 5
    assert report["compressed_linears"] == 14 and report["bits_per_weight_compressed"] > 2
    assert "windows 5/5" in err
    assert main([*options, "--mode", "shift"]) == 0
    assert f"perplexity  {report['perplexity']:.0f}." in capsys.readouterr().out


def test_a_model_against_itself_differs_in_nothing(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([folder, "--ctx", "8", "--windows", "2", "--against", folder, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kl"] == 0 and report["top1_agreement"] == 1 and report["text"] == "builtin"


def test_several_models_are_measured_on_the_same_windows(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tmp_path / "float")
    write_artifact(Path(other), tiny_program())
    common = ["--ctx", "16", "--windows", "3", "--against", other]
    alone = []
    for path in (folder, other):
        assert main([path, *common, "--json"]) == 0
        alone.append(json.loads(capsys.readouterr().out))
    assert main([folder, other, *common, "--json"]) == 0
    together = json.loads(capsys.readouterr().out)["models"]
    for one, row in zip(alone, together, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in row.items() if k != "seconds"}
    assert together[1]["kl"] == 0 and together[0]["kl"] > 0
    assert main([folder, other, *common]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[-2:]] == [folder, other] and "KL" in shown[-3]


def test_wrong_usage_has_exit_code_2(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("w5 w6 w7", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    for options, message in (
        (["--text", str(short)], "3 tokens"),
        (["--text", str(empty)], "empty"),
        (["--text", str(tmp_path / "no")], "cannot be read"),
        (["--batch", "0"], "--batch"),
        (["--mode", "divide"], "no mode"),
    ):
        assert run(main, [folder, *options]) == 2
        out, err = capsys.readouterr()
        assert message in err and not out and "Traceback" not in err
