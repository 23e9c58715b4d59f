"""Looking at models: inspect, diff and passes say what is there, as text and as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import passes
from ir.artifact import write_safetensors
from ir.parse import parse
from ir.program import Program
from ir.text import dump
from ir.types import tensor_type
from passes.base import Calib, Context, Pass, Stage
from tests.tiny_model import compressed_tiny, tiny_config, tiny_program, write_artifact
from tools import diff, inspect
from tools import passes as passes_tool
from tools.entry import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("inspect") / "a", compressed_tiny())


def test_an_artifact_shows_its_history_sites_and_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "test{planes=2}" in out and "4 past keys and values" in out and "reference" in out
    assert re.search(r"model.layers.1.mlp.down_proj +nomul.quant_linear +32 +48 +3 +- +16 +832 +4.333", out)
    assert inspect.main([str(folder), "--json", "--sites", "--blocks"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["sites"]) == 14 and report["sites"][0]["op"] == "nomul.shiftadd_linear"
    assert report["level"] == "compressed" and report["manifest"]["seed"] == 7
    assert report["inputs"]["input_ids"] == "i64[batch,seq]"


def test_blocks_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_artifact(tmp_path / "a", tiny_program())
    assert inspect.main([str(folder), "--blocks", "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert [b["path"] for b in blocks] == ["model.layers.0", "model.layers.1"]
    assert inspect.main([str(folder), "--blocks"]) == 0
    assert "model.layers.1" in capsys.readouterr().out


def test_ir_prints_the_program_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(folder), "--ir"]) == 0
    out = capsys.readouterr().out
    assert out == (folder / "program.ir").read_text(encoding="utf-8") and dump(parse(out)) == out
    assert inspect.main([str(folder / "program.ir"), "--ir"]) == 0
    assert capsys.readouterr().out == out
    assert inspect.main([str(folder / "program.ir")]) == 0
    assert "compressed" in capsys.readouterr().out


def test_the_cost_of_a_run_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(folder), "--cost", "--tokens", "4", "--past", "8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"operator +calls +multiplies +adds +shifts +look-ups +bytes", out)
    # The head: 4 tokens, 96 rows of 32 inputs; weight, inputs and logits of 4 bytes each.
    assert re.search(r"\nlm_head +12\.3 k +11\.9 k +0 +0 +14\.0 KiB", out) and "energy MODEL" not in out
    assert inspect.main([str(folder), "--cost", "--tokens", "4", "--past", "8", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert (cost["tokens"], cost["past"], cost["unknown"]) == (4, 8, [])
    for key in ("multiplies", "adds", "shifts", "lookups", "bytes"):
        assert sum(r[key] for r in cost["sites"]) == sum(r[key] for r in cost["operators"]) == cost["total"][key] > 0
    sites = {row["site"]: row for row in cost["sites"]}
    assert sites["lm_head"]["multiplies"] == 4 * 96 * 32
    assert sites["model.layers.0.mlp.up_proj"]["multiplies"] == 0 < sites["model.layers.0.mlp.up_proj"]["shifts"]
    # Weights are never asked for: the text of a program alone gives the same figures.
    assert inspect.main([str(folder / "program.ir"), "--cost", "--tokens", "4", "--past", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cost"] == cost
    assert run(inspect.main, [str(folder), "--cost", "--tokens", "0"]) == 2


def test_the_energy_model_is_called_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(folder), "--energy"]) == 0
    out = capsys.readouterr().out
    assert "energy MODEL" in out and "2406.05981" in out and "nothing was measured" in out and "left out" in out
    assert inspect.main([str(folder), "--energy", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (total,), units = report["energy"]["arithmetic_pj"].values(), report["energy"]["unit_pj"]["fp16"]
    cost = report["cost"]["total"]
    priced = {"multiplies": "multiply", "adds": "add", "shifts": "shift", "lookups": "lookup"}
    assert total["fp16"] == pytest.approx(sum(cost[key] * units[price] for key, price in priced.items()))
    assert inspect.main([str(folder), "--json"]) == 0
    assert "energy" not in (plain := json.loads(capsys.readouterr().out)) and "cost" not in plain


def test_a_checkpoint_is_read_by_its_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()), encoding="utf-8")
    tensors = {"model.norm.weight": torch.ones(32), "model.embed_tokens.weight": torch.ones(96, 32)}
    write_safetensors(tmp_path / "model.safetensors", {n: tensor_type(t) for n, t in tensors.items()}, tensors.get)  # type: ignore[arg-type]
    assert inspect.main([str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model_type"] == "llama" and report["weights"] == 97 * 32 and report["stored_bytes"] == 97 * 128
    assert {t["tensor"] for t in report["tensors"]} == set(tensors)
    assert inspect.main([str(tmp_path)]) == 0
    assert "f32[96,32]" in capsys.readouterr().out


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = tmp_path / "a.bin"
    strange.write_bytes(b"x")
    assert run(inspect.main, [str(strange)]) == 3
    assert run(inspect.main, [str(tmp_path)]) == 3
    assert run(inspect.main, [str(tmp_path / "a.ir")]) == 2
    damaged = tmp_path / "b.ir"
    damaged.write_bytes(b"\xff")
    assert run(inspect.main, [str(damaged)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_equal_programs_have_no_difference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff.main([str(folder), str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.split("\n\n") == ["the programs are the same", "the weights are the same\n"] and "\x1b" not in err
    assert diff.main([str(folder), str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


def test_differences_of_programs_and_weights_are_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_artifact(tmp_path / "float", tiny_program())
    assert diff.main([str(plain), str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    changes = {row["name"]: row["change"] for row in report["weights"]}
    assert not report["equal"] and "nomul.shiftadd_linear" in report["ir"]
    assert changes["model.layers.0.mlp.up_proj.weight"] == "only in A"
    assert changes["model.layers.0.mlp.up_proj.signs"] == "only in B"
    assert diff.main([str(plain / "program.ir"), str(folder / "program.ir")]) == 0
    out = capsys.readouterr().out
    assert "nomul.quant_linear" in out and "weights are the same" not in out
    assert diff.main([str(plain), str(folder), "--ir-only"]) == 0
    assert "only in A" not in capsys.readouterr().out


def test_changed_values_are_measured() -> None:
    a, b = tiny_program(), tiny_program()
    name = "model.norm.weight"
    tensor = b.params.get(name).clone()
    tensor[3] += 0.5
    b.params.put(name, tensor, "test")
    found = diff.weight_changes(a, b)
    assert [(c.name, c.change, c.entries) for c in found] == [(name, "values", 1)]
    assert found[0].max_abs == pytest.approx(0.5)
    assert not diff.weight_changes(a, tiny_program())


@dataclass(frozen=True)
class Sample(Pass):
    """Do nothing, for a test."""

    name: ClassVar[str] = "sample"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    gives: ClassVar[frozenset[str]] = frozenset({"sampled"})
    data: ClassVar[Calib | None] = Calib("both")
    exact: ClassVar[bool] = False

    bits: int = field(metadata={"help": "how many"})
    skip: tuple[str, ...] = ()

    def run(self, program: Program, ctx: Context) -> None:
        """Do nothing."""


def test_passes_are_listed_and_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"sample": f"{__name__}:Sample", "gone": "no_such_module:Gone"}
    monkeypatch.setattr(passes, "_BUILT_IN", rows)
    assert passes_tool.main([]) == 0
    out = capsys.readouterr().out
    assert "Do nothing, for a test." in out and "quantize" in out and "cannot be loaded" in out
    assert passes_tool.main(["sample"]) == 0
    out = capsys.readouterr().out
    assert "model to compressed" in out and "how many" in out and "required" in out and "list of str" in out
    assert passes_tool.main(["sample", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gives"] == ["sampled"] and report["calibration"] == "both"
    assert report["options"][1] == {"name": "skip", "type": "list of str", "default": "[]", "help": ""}
    assert passes_tool.main(["--json"]) == 0
    assert [p["name"] for p in json.loads(capsys.readouterr().out)["passes"]] == ["sample", "gone"]
    assert run(passes_tool.main, ["sampel"]) == 2
    assert "did you mean `sample`" in capsys.readouterr().err
