"""Measuring whole models: who takes part, the models an artifact is held against, and where a step goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backends.onnxruntime import BACKEND, OnnxRuntime, SessionOptions
from backends.onnxruntime.lowering import MODEL_FILE
from ir.errors import UsageError
from ir.program import Program
from passes.base import Context
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from tests.tiny_model import tiny_program, write_artifact
from tools import generate, llama_decode
from tools.bench import main
from tools.decode_models import source_of, write_float, write_four_bits
from tools.decode_text import as_text
from tools.entry import run
from tools.node_times import breakdown
from tools.site_kernels import kernel_lines, site_kernels

OURS, FLOAT, FOUR = "artifact", "float32", "4-bit acc4, 4-bit head"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("decode") / "float", tiny_program())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in 3 bits, for ONNX Runtime, with a report that leaves the head alone."""
    program = tiny_program()
    run_pipeline(program, parse("rtn{bits=3 group=16}"), Context(), Settings("off", False, "none", None))
    folder = write_artifact(tmp_path_factory.mktemp("decode") / "three", program)
    BACKEND.lower(program, folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"target": "onnxruntime"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = {"model": "no-such-model", "pipeline": [{"left_alone": [{"site": "lm_head", "reason": "it is tied"}]}]}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="module")
def found(artifact: Path, source: Path) -> dict[str, Any]:
    """The figures of one quick run, as the command prints them."""
    with pytest.MonkeyPatch.context() as patch:
        printed: list[Any] = []
        patch.setattr("tools.console.print_json", printed.append)
        arguments = ["decode", str(artifact), "--against", str(source), "--head", "quantized", "--quick", "--json"]
        assert main(arguments) == 0
    report: dict[str, Any] = json.loads(json.dumps(printed[0]))
    return report


def test_every_model_is_measured(found: dict[str, Any]) -> None:
    for kind in ("rows", "memory", "steps"):
        assert [(row["name"], row["threads"]) for row in found[kind]] == [(OURS, 1), (FLOAT, 1), (FOUR, 1)]
    for row in found["rows"]:
        assert min(row["prefill_short"], row["prefill_long"], row["decode"], row["first_token_seconds"]) > 0
        assert row["decode_to_float32"] == pytest.approx(row["decode"] / found["rows"][1]["decode"])
    assert found["rows"][1]["prefill_short_to_float32"] == 1.0
    assert [row["name"] for row in found["sizes"]] == [OURS, FLOAT, FOUR]
    assert found["sizes"][0]["folder_bytes"] > found["sizes"][0]["model_bytes"] > 0
    assert all(row["peak_bytes"] >= row["before_bytes"] > 0 for row in found["memory"])


def test_a_step_is_told_by_operator(found: dict[str, Any]) -> None:
    ours, floats, four = found["steps"]
    nodes = [{o["op"]: o["nodes"] for o in step["operators"]} for step in (ours, floats, four)]
    assert nodes[0]["TiledLinear"] == 14 and nodes[0]["FusedMatMul"] == 1
    assert nodes[1]["FusedMatMul"] == 15 and nodes[2]["MatMulNBits"] == 15
    for step in found["steps"]:
        assert sum(step["parts"].values()) == pytest.approx(step["seconds"])
        assert min(step["parts"][part] for part in ("linears", "head", "attention")) > 0


def test_the_figures_are_readable_too(found: dict[str, Any]) -> None:
    text = as_text(found)
    assert "prefill 8" in text and "one step of artifact, 1 threads" in text and "between nodes" in text
    assert "before opening" in text and "greedy; medians of 2" in text


def test_an_artifact_for_another_backend_is_unsupported(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, ["decode", str(source), "--quick"]) == 3
    assert "--target onnxruntime" in capsys.readouterr().err
    assert run(main, ["decode", "out/no-such-artifact", "--quick"]) == 3
    assert "out/no-such-artifact" in capsys.readouterr().err


def test_the_source_is_asked_for_or_told(artifact: Path, source: Path) -> None:
    assert source_of(artifact, "asked") == "asked" and source_of(artifact, None) == "no-such-model"
    with pytest.raises(UsageError, match="which model"):
        source_of(source, None)


@pytest.mark.parametrize(("head", "count"), [(False, 14), (True, 15)])
def test_four_bits_are_near_the_float_model(head: bool, count: int, tmp_path: Path) -> None:
    program = tiny_program()
    write_float(program, tmp_path / "float")
    assert write_four_bits(program, tmp_path / "four", head) == count
    ids = torch.tensor([[5, 9, 12, 7]])
    theirs, ours = (_logits(program, tmp_path / name, ids) for name in ("float", "four"))
    # Sixteen levels on random weights, through two layers.
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.5


def _logits(program: Program, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return OnnxRuntime(program, folder, options=SessionOptions(threads=1)).forward(ids)[0]


def test_a_trace_is_summed_by_part(tmp_path: Path) -> None:
    def node(name: str, op: str, micros: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": micros, "args": {"op_name": op}}

    events = [
        {"cat": "Session", "name": "SequentialExecutor::Execute", "dur": 100},
        {"cat": "Node", "name": "a_fence_before", "dur": 50, "args": {"op_name": "MatMul"}},
        *(node("a", "TiledLinear", 20), node("logits", "MatMulNBits", 30), node("b", "Attention", 8)),
        node("c", "Mul", 2),
    ]
    (tmp_path / "trace.json").write_text(json.dumps(events))
    got = breakdown(tmp_path / "trace.json", 2)
    wanted = {"linears": 10, "head": 15, "attention": 4, "others": 1, "between nodes": 20}
    assert got["seconds"] == pytest.approx(50e-6)
    assert {part: round(seconds * 1e6) for part, seconds in got["parts"].items()} == wanted
    assert got["operators"][0]["op"] == "MatMulNBits" and got["operators"][0]["nodes"] == 0.5


def test_llama_is_measured_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(llama_decode, "find_spec", lambda name: None)
    assert llama_decode.measure(Path("a.gguf"), [1], (4, 8), 2, notes.append) == []
    monkeypatch.setattr(llama_decode, "find_spec", lambda name: name)
    assert llama_decode.measure(Path("folder"), [1], (4, 8), 2, notes.append) == []
    assert "not installed" in notes[0] and "no GGUF file" in notes[1]
    calls: list[int] = []
    llama = SimpleNamespace(reset=lambda: None, eval=lambda tokens: calls.append(len(tokens)))
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=lambda path, **options: llama))
    (row,) = llama_decode.measure(Path("a.gguf"), [2], (4, 8), 2, notes.append)
    assert row["threads"] == 2 and min(row["prefill_short"], row["prefill_long"], row["decode"]) > 0
    assert calls == [4] * 3 + [8] * 3 + [4, 1, 1] * 3


def test_kernels_of_sites_are_told_with_reasons(artifact: Path) -> None:
    kernels = site_kernels(artifact)
    assert len(kernels) == 15 and kernels[-1].site == "lm_head" and kernels[-1].reason == "it is tied"
    assert kernel_lines(kernels) == ["14 by nomul, 3 planes, 14bit", "1 by float32 MatMul: it is tied"]


def test_generation_tells_its_figures(artifact: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(artifact), "w5 w9", "-n", "3", "--stats"]) == 0
    text = capsys.readouterr().err
    assert "first token after" in text and "at most" in text and "linears   14 by nomul" in text
    assert generate.main([str(source), "w5 w9", "-n", "3", "--stats", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    assert stats["sites"] == [] and stats["kernels"] == ["all by the reference backend, mode multiply"]
    assert stats["prefill_tokens_per_second"] > 0 and (artifact / MODEL_FILE).is_file()
