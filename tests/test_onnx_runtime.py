"""The ONNX Runtime runtime: bound tensors, generation, the commands, and what it says when something is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from backends import backend_names, load_backend
from backends.onnxruntime import BACKEND, OnnxRuntime, SessionOptions
from backends.onnxruntime.lowering import DATA_FILE, MODEL_FILE, emit_program
from backends.onnxruntime.packages import package
from backends.reference.runtime import ReferenceRuntime
from ir.errors import UnsupportedError, UsageError
from ir.program import Program
from tests.architectures import ids_for
from tests.tiny_model import some_text, tiny_program, word_tokenizer, write_artifact
from tools import compile, evaluate, generate
from tools.entry import run
from tools.load import load

ONE = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program()


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_artifact(tmp_path_factory.mktemp("onnx") / "artifact", program)
    BACKEND.lower(program, made)
    return made


@pytest.fixture(scope="module")
def runtime(folder: Path) -> OnnxRuntime:
    return BACKEND.load(folder, ONE)


def test_it_is_a_target() -> None:
    assert "onnxruntime" in backend_names() and load_backend("onnxruntime") is BACKEND


def test_generation_writes_what_the_reference_writes(runtime: OnnxRuntime, program: Program) -> None:
    reference = ReferenceRuntime(program, tokenizer=word_tokenizer)
    assert runtime.generate((5, 9, 12), 12).ids == reference.generate((5, 9, 12), 12).ids
    assert (
        runtime.generate("w5 w9", 8, temperature=1.5, seed=3).text
        == reference.generate("w5 w9", 8, temperature=1.5, seed=3).text
    )


def test_inputs_stay_as_they_are_and_outputs_are_new_tensors(runtime: OnnxRuntime) -> None:
    ids = ids_for(2, 4)
    _, past = runtime.forward(ids)
    kept = [p.clone() for p in past]
    first, one = runtime.forward(ids[:, :1], None, past)
    copy = first.clone()
    second, _ = runtime.forward(ids[:, 1:2], None, past)
    assert torch.equal(first, copy) and not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(past, kept, strict=True))
    assert [tuple(p.shape) for p in one] == [(2, 2, 5, 8)] * 4


def test_views_of_a_cache_are_read_right(runtime: OnnxRuntime) -> None:
    ids = ids_for(2, 4)
    _, past = runtime.forward(ids)
    strided = [torch.cat([p, p], 2)[:, :, :4] for p in past]
    assert not strided[0].is_contiguous()
    assert torch.equal(runtime.forward(ids[:, :1], None, strided)[0], runtime.forward(ids[:, :1], None, past)[0])


def test_outputs_have_the_sizes_that_follow_from_the_inputs(runtime: OnnxRuntime) -> None:
    made = runtime._outputs({"batch": 2, "seq": 3, "past": 4})
    assert [tuple(t.shape) for t in made if t is not None] == [(2, 3, 96), *[(2, 2, 7, 8)] * 4]


@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [
        (torch.zeros(2, 0, dtype=torch.long), None, "input_ids"),
        (torch.tensor([[500]]), None, "vocabulary"),
        (torch.tensor([[5, 6]]), torch.ones(1, 3, dtype=torch.long), "attention_mask"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    runtime: OnnxRuntime, ids: torch.Tensor, mask: torch.Tensor | None, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        runtime.forward(ids, mask)


def test_what_the_runtime_itself_refuses_is_a_usage_error(runtime: OnnxRuntime) -> None:
    values = runtime.interface.bind(ids_for(1, 2), None, None)
    values[2] = torch.zeros(1, 2, 0, 7)
    with pytest.raises(UsageError, match="could not run"):
        runtime.execute(values)
    values[2] = torch.zeros(2, 2, 0, 8)
    with pytest.raises(UsageError, match="could not run"):
        runtime.execute(values)


def test_a_folder_without_the_files_says_how_to_get_them(folder: Path, program: Program, tmp_path: Path) -> None:
    plain = write_artifact(tmp_path / "plain", program)
    with pytest.raises(UnsupportedError, match="--target onnxruntime"):
        BACKEND.load(plain)
    (plain / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes())
    with pytest.raises(UnsupportedError, match=r"not there|No such file|weights"):
        BACKEND.load(plain)
    (plain / DATA_FILE).write_bytes((folder / DATA_FILE).read_bytes()[:100])
    with pytest.raises(UnsupportedError, match="cannot open"):
        BACKEND.load(plain)
    (plain / MODEL_FILE).write_bytes(b"no model")
    with pytest.raises(UnsupportedError, match="cannot open"):
        BACKEND.load(plain)


def test_a_model_of_another_program_is_not_run(folder: Path, tmp_path: Path) -> None:
    from tests.programs import tiny_mlp_program

    other = tiny_mlp_program()
    BACKEND.lower(other, tmp_path)
    with pytest.raises(UnsupportedError, match="not of this program"):
        OnnxRuntime(tiny_program(), tmp_path, options=ONE)


def test_a_library_that_is_none_is_refused(folder: Path, program: Program, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"text")
    with pytest.raises(UnsupportedError, match=r"library\.so"):
        OnnxRuntime(program, folder, options=SessionOptions(threads=1, library=library))


@pytest.mark.parametrize(("name", "value"), [("threads", -1), ("optimise", "most")])
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SessionOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["onnx_ir", "onnxruntime"])
def test_a_missing_package_names_the_extra(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=r"nomul\[onnx\]"):
        package(name)
    with pytest.raises(UnsupportedError, match=name):
        BACKEND.load(folder) if name == "onnxruntime" else emit_program(tiny_program())


@pytest.mark.usefixtures("own_cache", "quick_builtin")
def test_the_commands_compile_evaluate_and_generate(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(some_text(200), encoding="utf-8")
    command = [
        str(tiny_hf),
        "--passes",
        "fold",
        "--target",
        "onnxruntime",
        "--out",
        str(out),
        "--seqlen",
        "16",
        "--json",
    ]
    assert run(compile.main, command) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["target"] == "onnxruntime" and {MODEL_FILE, DATA_FILE} <= set(manifest["files"])
    assert isinstance(load(out), OnnxRuntime)
    capsys.readouterr()
    losses = {}
    for target in ("onnxruntime", "reference"):
        options = ["--text", str(text), "--ctx", "16", "--windows", "3", "--target", target, "--json"]
        assert run(evaluate.main, [str(out), *options]) == 0
        losses[target] = json.loads(capsys.readouterr().out)["perplexity"]
    assert losses["onnxruntime"] == pytest.approx(losses["reference"], rel=1e-4)
    assert run(generate.main, [str(out), "w5 w6", "-n", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) <= 4
    assert run(generate.main, [str(out), "w5", "--mode", "shift"]) == 2
