"""What a person meets who gets something wrong: one message, the right exit code, and a disk as it was."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import ir.artifact
import tools.sidefiles
from tests.gguf_files import tiny_model as gguf_model
from tests.gguf_files import write_model
from tests.hf_folder import WEIGHTS, change_weights, some_text, weights_of, write_folder, write_tokenizer
from tools.compile import main
from tools.entry import run

pytestmark = pytest.mark.usefixtures("own_cache", "quick_builtin")

ROOT = Path(__file__).resolve().parent.parent
RTN, SHIFT = "rtn{group=16}", "shiftadd{bits=1 group=16 rounds=0}"


class Outcome:
    """How a command ended: exit code, and the message it printed."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    def says(self, code: int, *words: str) -> None:
        """Check code and message: an error of a few lines, and no traceback, after at most some notes."""
        assert self.code == code, self.stderr
        message = self.stderr[self.stderr.index("error: ") :]
        for word in words:
            assert word in message, message
        assert "Traceback" not in self.stderr and message.count("error: ") == 1
        # A code of 3 and less comes before results; the message has the parts what, at, because and try at most.
        assert len(message.splitlines()) <= 7 and not self.stdout


@pytest.fixture
def attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Compile to a new directory and check that nothing of it is left on the disk."""

    def compile_(model: object, *more: str, passes: str | None = RTN, out: str = "out") -> Outcome:
        before = sorted(tmp_path.rglob("*"))
        argv = [str(model), "--out", str(tmp_path / out), "--samples", "4", "--seqlen", "32", *more]
        code = run(main, argv if passes is None else [*argv, "--passes", passes])
        assert sorted(tmp_path.rglob("*")) == before
        text = capsys.readouterr()
        return Outcome(code, text.out, text.err)

    return compile_


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory to be damaged."""
    return write_folder(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("shifadd", ("there is no pass shifadd", "did you mean `shiftadd`?")),
        ("rtn,foldd", ("there is no pass foldd", "did you mean `fold`?")),
        ("zzzz", ("there is no pass zzzz", "the passes are canon")),
        ("shiftadd{bit=3}", ("pass shiftadd has no option bit", "did you mean `bits`?")),
        ("shiftadd{bits=three}", ("option bits of pass shiftadd has a value of the wrong type", "three")),
        ("shiftadd{bits=9}", ("option bits of pass shiftadd cannot be used", "9 is outside 1..8")),
        ("rtn{symmetric=maybe}", ("option symmetric of pass rtn", "maybe")),
        ("rtn{bits=3", ("rtn{bits=3",)),
        ("rtn{bits=3 bits=4}", ("option bits is given twice",)),
        ("canon(rtn)", ("pass canon takes no pipeline in parentheses",)),
        ("@nowhere.txt", ("the recipe cannot be read", "nowhere.txt")),
    ],
)
def test_a_pipeline_that_does_not_read(
    attempt: Callable[..., Outcome], tiny_hf: Path, pipeline: str, words: tuple[str, ...]
) -> None:
    attempt(tiny_hf, passes=pipeline).says(2, *words)


def test_recipe_and_passes_at_once(attempt: Callable[..., Outcome], tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe").write_text("rtn\n")
    attempt(tiny_hf, "--recipe", str(tmp_path / "recipe")).says(2, "from --passes or from --recipe, not from both")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_an_unknown_target(attempt: Callable[..., Outcome], tiny_hf: Path, dry: tuple[str, ...]) -> None:
    attempt(tiny_hf, "--target", "abacus", *dry).says(2, "there is no target abacus", "reference")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--samples", "0", "--samples 0 is out of range"),
        ("--seqlen", "1", "--seqlen 1 is out of range"),
        ("--seed", "-1", "--seed -1 is out of range"),
        ("--seed", str(2**70), "is out of range"),
        ("--max-kl", "nan", "--max-kl nan is out of range"),
        ("--max-kl", "-1", "--max-kl -1.0 is out of range"),
        ("--seqlen", "4096", "longer than the model's context"),
    ],
)
def test_figures_out_of_range(
    attempt: Callable[..., Outcome], tiny_hf: Path, option: str, value: str, words: str
) -> None:
    attempt(tiny_hf, option, value).says(2, words)


def test_an_output_that_exists(attempt: Callable[..., Outcome], tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("kept")
    attempt(tiny_hf, out="there").says(2, "the output directory exists", str(tmp_path / "there"))
    attempt(tiny_hf, out="file").says(2, "the output directory exists")
    attempt(tiny_hf, out="file/out").says(2, "cannot be made", "it is a file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("passes", ["rtn{group=24}", "shiftadd{group=24}", "shiftadd{group=24 calib=none}"])
def test_a_group_that_does_not_divide(attempt: Callable[..., Outcome], tiny_hf: Path, passes: str) -> None:
    attempt(tiny_hf, passes=passes).says(3, "group 24", "14 of 14 sites", "has 32 inputs", "32, 16, 8")


def test_a_pass_that_does_not_fit_the_program(attempt: Callable[..., Outcome], tiny_hf: Path) -> None:
    attempt(tiny_hf, "--verify", "off", passes="rtn{group=16},rtn{group=16 bits=9}").says(2, "9 is outside 2..8")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2-135m", ("there is no model 'smolm2-135m'", "did you mean smollm2-135m?")),
        ("./nowhere/at/all", ("there is no such model", "zoo name")),
        ("model.gguf", ("there is no such model", "model.gguf")),
        ("", ("no model was given",)),
    ],
)
def test_an_unknown_model(attempt: Callable[..., Outcome], name: str, words: tuple[str, ...]) -> None:
    attempt(name).says(2, *words)
    attempt(name, "--dry-run").says(2, *words)


def test_a_file_that_is_no_model(attempt: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    attempt(tmp_path / "notes.txt").says(3, "not a model nomul can open", "its name ends in .txt")


def test_a_directory_without_a_configuration(attempt: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    attempt(tmp_path / "empty").says(3, "this directory is not a model", "config.json")


def change_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "abacus"}, ("configuration cannot be read", "abacus")),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, ("vit",)),
        ({"model_type": "t5", "architectures": ["T5Model"]}, ("t5",)),
        ({"hidden_size": "wide"}, ("configuration cannot be read", "hidden_size", "expected int")),
        ({"num_attention_heads": 5}, ("configuration cannot be read", "not a multiple")),
    ],
)
def test_a_configuration_of_something_else(
    attempt: Callable[..., Outcome], model: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    change_config(model, **settings)
    attempt(model).says(3, *words)


def test_a_configuration_that_is_not_json(attempt: Callable[..., Outcome], model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "lla')
    attempt(model).says(3, "configuration cannot be read", "config.json")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lie_about_length(path: Path) -> None:
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def not_json(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xfe{]"
    path.write_bytes(data)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


UP = "model.layers.0.mlp.up_proj.weight"


def beyond_the_end(path: Path) -> None:
    edit_header(path, lambda h: h[UP].update(data_offsets=[1 << 40, (1 << 40) + 4 * 64 * 32]))


def other_shape(path: Path) -> None:
    edit_header(path, lambda h: h[UP].update(shape=[64, 33]))


def negative(path: Path) -> None:
    edit_header(path, lambda h: h[UP].update(data_offsets=[-8192, 0]))


def strange_dtype(path: Path) -> None:
    edit_header(path, lambda h: h[UP].update(dtype="F7"))


def no_offsets(path: Path) -> None:
    edit_header(path, lambda h: h[UP].pop("data_offsets"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "truncated"),
        (cut_in_header, "the header claims"),
        (empty, "0 bytes"),
        (lie_about_length, "the header claims"),
        (not_json, "the header is not JSON"),
        (beyond_the_end, "but the file holds"),
        (other_shape, "its offsets span"),
        (negative, "negative"),
        (strange_dtype, "has dtype F7"),
        (no_offsets, "lacks dtype, shape or data_offsets"),
    ],
)
def test_a_damaged_safetensors_file(
    attempt: Callable[..., Outcome], model: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(model / WEIGHTS)
    attempt(model).says(3, "the safetensors file is damaged", WEIGHTS, words)
    attempt(model, "--dry-run").says(3, words)


def test_weights_of_other_shapes(attempt: Callable[..., Outcome], model: Path) -> None:
    change_weights(model, **{UP: torch.zeros(64, 16)})
    attempt(model).says(3, "a weight does not fit the configuration", UP, "f32[64,16]", "f32[64,32]")


def test_missing_weights(attempt: Callable[..., Outcome], model: Path) -> None:
    from safetensors.torch import save_file

    left = {name: tensor for name, tensor in weights_of(model).items() if name != UP}
    save_file(left, str(model / WEIGHTS), metadata={"format": "pt"})
    attempt(model).says(3, UP)


def test_pickled_weights_are_not_opened(attempt: Callable[..., Outcome], model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    attempt(model).says(3, "no safetensors weights", "pickle")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(attempt: Callable[..., Outcome], model: Path, name: str, bad: float) -> None:
    tensor = weights_of(model)[name].clone()
    tensor.view(-1)[3] = bad
    change_weights(model, **{name: tensor})
    outcome = attempt(model, passes=SHIFT)
    outcome.says(3, "a weight of the model is not finite", name, f"1 of its {tensor.numel()} values")
    attempt(model, passes="").says(3, name)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_model("llama"), "llama")


def wrong_magic(path: Path) -> None:
    path.write_bytes(b"GGML" + path.read_bytes()[4:])


def many_tensors(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + (1 << 60).to_bytes(8, "little") + data[16:])


def long_key(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:24] + (1 << 50).to_bytes(8, "little") + data[32:])


@pytest.mark.parametrize("damage", [truncate, cut_in_header, empty, wrong_magic, many_tensors, long_key])
def test_a_damaged_gguf_file(
    attempt: Callable[..., Outcome], gguf_file: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "tiny.gguf"
    shutil.copyfile(gguf_file, path)
    damage(path)
    attempt(path).says(3, "tiny.gguf")
    attempt(path, "--dry-run").says(3, "tiny.gguf")


def test_a_missing_tokenizer(attempt: Callable[..., Outcome], tmp_path: Path) -> None:
    model = write_folder(tmp_path / "tiny", tokenizer=False)
    attempt(model, passes=SHIFT).says(3, "the model has no tokenizer", "tokenizer.json")


def test_a_damaged_tokenizer(attempt: Callable[..., Outcome], model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    attempt(model, passes=SHIFT).says(3, "the tokenizer of the model cannot be read")


def test_a_tokenizer_of_another_model(attempt: Callable[..., Outcome], model: Path) -> None:
    path = model / "tokenizer.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["model"]["vocab"] = {token: index + 100 for token, index in facts["model"]["vocab"].items()}
    path.write_text(json.dumps(facts), encoding="utf-8")
    attempt(model, passes=SHIFT).says(3, "the tokenizer does not belong to the model", "300 tokens")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, ("the text cannot be read", "No such file")),
        (b"", ("the text is empty",)),
        (b" \n\n\t", ("the text is empty",)),
        (b"good \xff\xfe bad", ("the text is not UTF-8", "byte 5 is 0xff")),
        (b"too short", ("too short for 4 samples of 32 tokens", "hold 0 such windows", "--samples 1")),
        (some_text(200).encode(), ("too short for 4 samples", "--samples")),
    ],
)
def test_a_text_that_does_not_serve(
    attempt: Callable[..., Outcome], tiny_hf: Path, tmp_path: Path, data: bytes | None, words: tuple[str, ...]
) -> None:
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    attempt(tiny_hf, "--calib", str(path), passes=SHIFT).says(2, *words)


def test_a_directory_for_a_text(attempt: Callable[..., Outcome], tiny_hf: Path, tmp_path: Path) -> None:
    attempt(tiny_hf, "--calib", str(tmp_path)).says(2, "the text cannot be read")


def test_a_text_is_looked_at_before_the_model(attempt: Callable[..., Outcome]) -> None:
    attempt("./no-model", "--calib", "nowhere.txt").says(2, "the text cannot be read")


Usage = namedtuple("Usage", "total used free")


def test_too_little_disk(attempt: Callable[..., Outcome], tiny_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 1 << 20))
    monkeypatch.setattr("passes.rtn.Rtn.run", lambda *_: pytest.fail("work before the check"))
    attempt(tiny_hf).says(5, "the disk has too little room", "1 are free", "another disk")


def test_too_little_memory(attempt: Callable[..., Outcome], tiny_hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1 << 20

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    attempt(tiny_hf).says(5, "memory does not suffice", "lower --samples")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name"),
    [(ir.artifact, "write_program"), (tools.sidefiles, "copy_side_files"), (shutil, "copyfile")],
)
def test_a_disk_that_fills_up_while_writing(
    tiny_hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: Any,
    name: str,
) -> None:
    argv = [str(tiny_hf), "--out", str(tmp_path / "out"), "--samples", "4", "--seqlen", "32", "--passes", RTN]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        code = run(main, argv)
    text = capsys.readouterr()
    Outcome(code, text.out, text.err).says(5, "the disk is full", str(tmp_path), "--resume")
    # No artifact and nothing of one; what was computed is kept for --resume.
    assert [p.name for p in tmp_path.iterdir()] == [".out.work"]
    assert run(main, [*argv, "--resume"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fills_up_in_a_pass(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("passes.checkpoint.write_safetensors", full)
    argv = [str(tiny_hf), "--out", str(tmp_path / "out"), "--samples", "4", "--seqlen", "32", "--passes", SHIFT]
    code = run(main, argv)
    text = capsys.readouterr()
    Outcome(code, text.out, text.err).says(5, "the disk is full")
    assert not list((tmp_path / ".out.work").rglob("crash"))


def test_in_a_shell(tmp_path: Path) -> None:
    """The same through the interpreter: nothing is printed by a library, and exit codes reach the shell."""
    model = write_folder(tmp_path / "tiny", tokenizer=False)
    truncate(model / WEIGHTS)
    write_tokenizer(model)
    command = [sys.executable, "-m", "tools.compile", str(model), "--passes", RTN, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    Outcome(done.returncode, done.stdout, done.stderr).says(3, "the safetensors file is damaged", "truncated")
    assert done.stderr.startswith("error: ")
    wrong = [sys.executable, "-m", "tools.compile", str(model), "--sampels", "3"]
    done = subprocess.run(wrong, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and "usage:" in done.stderr and not done.stdout
