"""Language models that the builder of ONNX Runtime GenAI wrote come back as programs that compute what it wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from backends import load_backend
from frontend.onnx.trace import trace
from frontend.open import Model, open_model
from ir.analysis import blocks, linear_sites
from ir.program import Program, tensor_type_of
from ir.verify import verify
from passes.equiv.discover import discover
from tests.architectures import VOCAB
from tests.genai_models import built, computed

# Gains on heads, tied and scaled embeddings, and codes of 4 bits whose scales are floats.
CASES = (("llama", "fp32"), ("qwen3", "fp32"), ("gemma", "fp32"), ("llama", "int4"))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    path = built(request.param[0], tmp_path_factory.mktemp("builder"), request.param[1])
    return path, open_model(str(path))


def feeds(program: Program, batch: int, seq: int, past: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq)
    values = [torch.randint(VOCAB, (batch, seq), generator=generator), torch.ones(batch, seq + past, dtype=torch.long)]
    for node in program.inputs[2:]:
        _, heads, _, width = tensor_type_of(node).dims
        values.append(torch.randn(batch, int(heads), past, int(width), generator=generator))
    return values


def compare(program: Program, path: Path, given: list[Tensor]) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        found = program.module()(*given)
    for ours, theirs in zip(found, computed(session, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("batch", "seq", "past"), [(1, 1, 0), (2, 6, 0), (1, 5, 3), (3, 1, 4)])
def test_programs_compute_what_the_runtime_does(opened: tuple[Path, Model], batch: int, seq: int, past: int) -> None:
    path, model = opened
    compare(model.program, path, feeds(model.program, batch, seq, past))


def test_rows_padded_on_the_right_compute_what_the_runtime_does(opened: tuple[Path, Model]) -> None:
    path, model = opened
    given = feeds(model.program, 2, 6, 0)
    given[1][1, 4:] = 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        found = model.program.module()(*given)[0]
    torch.testing.assert_close(found[1, :4], computed(session, given)[0][1, :4], rtol=1e-4, atol=2e-4)


def test_padding_on_the_left_is_not_seen(opened: tuple[Path, Model]) -> None:
    """The runtime counts a row's tokens from its left; in programs the mask says which slots count."""
    _, model = opened
    given = feeds(model.program, 1, 6, 0)
    given[1][0, :2] = 0
    other = [given[0].clone(), *given[1:]]
    other[0][0, :2] = (other[0][0, :2] + 1) % VOCAB
    run = model.program.module()
    with torch.no_grad():
        torch.testing.assert_close(run(*given)[0][:, 2:], run(*other)[0][:, 2:], rtol=0, atol=0)
        assert not torch.equal(run(*given)[0][:, 2:], run(given[0], torch.ones_like(given[1]), *given[2:])[0][:, 2:])


def test_blocks_and_groups_are_found(opened: tuple[Path, Model]) -> None:
    _, model = opened
    program = model.program
    verify(program, full=True)
    assert [n.name for n in program.inputs[:3]] == ["input_ids", "attention_mask", "past_key_0"]
    found = blocks(program)
    assert len(found) == 2 and len(found[0].nodes) == len(found[1].nodes)
    assert [len(linear_sites(program, block.nodes)[0]) for block in found] == [7, 7]
    kinds = Counter(g.kind for g in discover(program).groups)
    assert {k: kinds[k] for k in ("norm->linears", "q<->k", "v->o", "up->down")} == {
        "norm->linears": 4,
        "q<->k": 2,
        "v->o": 2,
        "up->down": 2,
    }


def test_attention_stays_one_operator_in_onnx_out(opened: tuple[Path, Model], tmp_path: Path) -> None:
    load_backend("onnxruntime").lower(opened[1].program.clone(), tmp_path)
    found = Counter(node.op_type for node in onnx_ir.load(tmp_path / "model.onnx").graph)
    assert (found["Attention"], found["RotaryEmbedding"], found["Softmax"]) == (2, 4, 0)


def test_sites_and_weights_have_the_names_of_the_model(opened: tuple[Path, Model]) -> None:
    _, model = opened
    sites, _ = linear_sites(model.program, blocks(model.program)[1].nodes)
    assert sites[-1].name.startswith("model.layers.1.mlp.down_proj.MatMul")
    assert sites[-1].weight.startswith("model.layers.1.mlp.down_proj.MatMul.weight")
    names = [f"model.layers.1.attn.qkv_proj.MatMul.{part}" for part in "qkv"]
    assert [site.name.replace("_Q4", "") for site in sites[:3]] == names


def test_positions_follow_from_the_cache(opened: tuple[Path, Model], tmp_path: Path) -> None:
    """A graph that is given positions computes the same from those that programs count themselves."""
    path, model = opened
    given = feeds(model.program, 1, 5, 3)
    with torch.no_grad():
        expected = model.program.module()(*given)[0]
        found = trace(_with_positions(path), "model").module()(*given)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _with_positions(path: Path) -> onnx_ir.Model:
    """Return a model whose attentions read positions that are an input, instead of counting them."""
    model = onnx_ir.load(path)
    dims = onnx_ir.Shape(["batch_size", "sequence_length"])
    positions = onnx_ir.Value(name="position_ids", shape=dims, type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
    model.graph.inputs.insert(1, positions)
    changed = [node for node in model.graph if node.op_type == "GroupQueryAttention" and len(node.inputs) > 9]
    assert changed
    for node in changed:
        node.replace_input_with(9, positions)
    return model


def test_codes_with_half_scales_stay_codes(tmp_path: Path) -> None:
    """Where float16 holds the scales, products in codes become ours, and look-ups in the same codes floats."""
    path = built("llama", tmp_path, "int4")
    model = onnx_ir.load(path)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            scales = node.inputs[2]
            halves = scales.const_value.numpy().astype(np.float16).astype(np.float32)
            scales.const_value = onnx_ir.tensor(halves, name=scales.name)
    onnx_ir.save(model, path.with_name("halves.onnx"), external_data="halves.data")
    program = open_model(str(path.with_name("halves.onnx"))).program
    verify(program, full=True)
    assert program.level == "compressed"
    assert sum("quant_linear" in str(n.target) for n in program.graph.nodes) == 2 * 5 + 1
    compare(program, path.with_name("halves.onnx"), feeds(program, 2, 6, 0))
