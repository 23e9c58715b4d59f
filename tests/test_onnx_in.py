"""Language models that `torch.onnx.export` wrote come back as programs that compute what ONNX Runtime does."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from backends import load_backend
from frontend.onnx.opened import open_program
from frontend.open import Model, open_model
from ir.analysis import blocks
from ir.program import Program, tensor_type_of
from ir.text import dump
from ir.verify import verify
from passes.equiv.discover import discover
from tests.architectures import CONFIGS, VOCAB
from tests.onnx_exports import export_causal
from tools.compile import main
from tools.entry import run

NAMES = ("llama", "gpt2")
# Groups of scales that an architecture has none of.
_ABSENT = {"llama": set[str](), "gpt2": {"v->o", "q<->k"}}


@cache
def model_of(name: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    config = CONFIGS[name](2)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval(), config


@pytest.fixture(scope="module", params=NAMES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Model]:
    folder = tmp_path_factory.mktemp("onnx")
    path = export_causal(model_of(request.param)[0], folder / f"{request.param}.onnx")
    return request.param, path, open_model(str(path))


def feeds(program: Program, batch: int, seq: int, past: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq)
    values = [torch.randint(VOCAB, (batch, seq), generator=generator), torch.ones(batch, seq + past, dtype=torch.long)]
    for node in program.inputs[2:]:
        _, heads, _, width = tensor_type_of(node).dims
        values.append(torch.randn(batch, int(heads), past, int(width), generator=generator))
    return values


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 1, 0), (2, 6, 0), (3, 1, 4), (2, 5, 3)])
def test_programs_compute_what_the_runtime_does(
    opened: tuple[str, Path, Model], batch: int, seq: int, past: int
) -> None:
    _, path, model = opened
    program = model.program
    given = feeds(program, batch, seq, past)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    expected = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
    with torch.no_grad():
        found = program.module()(*given)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-3, atol=1e-4)


def test_programs_are_sound_and_their_blocks_found(opened: tuple[str, Path, Model]) -> None:
    name, _, model = opened
    verify(model.program, full=True)
    assert model.kind == "onnx" and "canonical" in model.program.facts
    assert str(model.program.attributes["producer"]).startswith("pytorch")
    assert [n.name for n in model.program.inputs[:3]] == ["input_ids", "attention_mask", "past_key_0"]
    assert [str(d) for d in tensor_type_of(model.program.inputs[0]).dims] == ["batch", "seq"]
    assert {g.kind for g in discover(model.program).groups} >= {"norm->linears", "v->o", "q<->k"} - _ABSENT[name]
    found = blocks(model.program)
    assert len(found) == 2 and len(found[0].nodes) == len(found[1].nodes), name


def test_operators_are_whole_again(opened: tuple[str, Path, Model]) -> None:
    name, _, model = opened
    calls = [str(n.target) for n in model.program.graph.nodes if n.op == "call_function"]
    assert sum("scaled_dot_product_attention" in c for c in calls) == 2
    assert sum("aten.linear" in c for c in calls) == {"llama": 15, "gpt2": 9}[name]
    assert sum("norm" in c for c in calls) == 5 and not any("matmul" in c or "softmax" in c for c in calls)


def test_compile_takes_them(opened: tuple[str, Path, Model], tmp_path: Path) -> None:
    _, path, _ = opened
    passes = "fold,shiftadd{bits=3 group=16 starts=1 rounds=2 iterations=0 polish=0 sweeps=0}"
    command = [str(path), "--passes", passes, "--calib", "self", "--samples", "4", "--seqlen", "24", "--no-gate"]
    assert run(main, [*command, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["totals"]["compressed_linears"] >= 8 and 4 < report["totals"]["bits_per_weight_compressed"] < 7
    assert report["pipeline"][0]["probe_relative_error"] < 1e-5


def test_a_second_opening_reads_the_kept_trace(opened: tuple[str, Path, Model], tmp_path: Path) -> None:
    _, path, model = opened
    said = list[str]()
    first, digest = open_program(path, said.append, tmp_path)
    assert len(said) == 2 and "tracing" in said[1]
    again, same = open_program(path, said.append, tmp_path)
    assert len(said) == 3 and same == digest
    assert dump(again) == dump(first) == dump(model.program)
    for name in first.params:
        assert torch.equal(first.params.get(name), again.params.get(name)), name


def test_another_graph_has_another_trace(opened: tuple[str, Path, Model], tmp_path: Path) -> None:
    """Values beside the file decide the trace too, where they are no weights."""
    _, path, _ = opened
    said = list[str]()
    open_program(path, said.append, tmp_path)
    changed = path.with_name("changed.onnx")
    model = onnx_ir.load(path)
    model.graph.name = "another"
    onnx_ir.save(model, changed)
    open_program(changed, said.append, tmp_path)
    assert sum("tracing" in line for line in said) == 2


def test_attention_is_one_operator_again_in_onnx_out(opened: tuple[str, Path, Model], tmp_path: Path) -> None:
    """What comes in taken apart goes out whole, with rotations of queries and keys as operators of their own."""
    name, _, model = opened
    load_backend("onnxruntime").lower(model.program.clone(), tmp_path)
    found = Counter(node.op_type for node in onnx_ir.load(tmp_path / "model.onnx").graph)
    assert found["Attention"] == 2 and not found["Softmax"]
    assert found["RotaryEmbedding"] == (4 if name == "llama" else 0)
