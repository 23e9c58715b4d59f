"""Whole models in ONNX Runtime: logits and cache of the reference backend, fused and written out; names; files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import pytest
import torch
from torch import Tensor

from backends.onnxruntime import BACKEND, OnnxRuntime, OnnxRuntimeBackend, SessionOptions
from backends.onnxruntime.lowering import DATA_FILE, MODEL_FILE, emit_program, node_counts, write_model
from backends.reference.runtime import ReferenceRuntime
from ir.errors import UnsupportedError
from ir.params import Entry, MemorySource
from ir.program import Program
from ir.types import TensorType
from tests.architectures import CONFIGS, ids_for, traced
from tests.programs import Sketch, hidden, tiny_mlp_program
from tests.tiny_model import tiny_program

CORE = ("llama", "gpt2", "opt", "qwen3")
ARCHITECTURES = [n if n in CORE else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
LIMIT = 2e-4


def opened(program: Program, folder: Path, fuse: bool = True, opset: int = 23) -> OnnxRuntime:
    write_model(emit_program(program, opset, fuse), folder)
    return OnnxRuntime(program, folder, options=SessionOptions(threads=1))


def assert_equal(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], seen: Tensor | None) -> None:
    """Compare logits and cache where `seen` [batch, tokens] is not padding."""
    keep = slice(None) if seen is None else seen.bool()
    assert float((ours[0] - theirs[0])[keep].abs().max()) <= LIMIT
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.shape == b.shape
        assert float((a - b).transpose(1, 2)[keep].abs().max()) <= LIMIT


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_cache_are_those_of_the_reference(name: str, fuse: bool, tmp_path: Path) -> None:
    program, _ = traced(name)
    reference, runtime = ReferenceRuntime(program), opened(program, tmp_path, fuse)
    for batch, seq in ((1, 1), (1, 2), (3, 17)):
        ids = ids_for(batch, seq)
        theirs = reference.forward(ids)
        assert_equal(runtime.forward(ids), theirs, None)
        for new in (1, 3):
            more = ids_for(batch, new, seed=2)
            past = theirs[1]
            assert_equal(runtime.forward(more, None, past), reference.forward(more, None, past), None)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", ["llama", "qwen3", pytest.param("bloom", marks=pytest.mark.slow)])
def test_padding_on_the_left_is_not_seen(name: str, fuse: bool, tmp_path: Path) -> None:
    program, _ = traced(name)
    reference, runtime = ReferenceRuntime(program), opened(program, tmp_path, fuse)
    ids, mask = ids_for(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[2, :1] = 0, 0
    theirs = reference.forward(ids, mask)
    ours = runtime.forward(ids, mask)
    assert_equal(ours, theirs, mask)
    assert all(bool(torch.isfinite(t).all()) for t in (ours[0], *ours[1]))
    more, longer = ids_for(3, 1, seed=2), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    found, wanted = runtime.forward(more, longer, ours[1])[0], reference.forward(more, longer, theirs[1])[0]
    assert float((found - wanted).abs().max()) <= LIMIT


@pytest.mark.parametrize("opset", [21, 22])
def test_older_opsets_run_too(opset: int, tmp_path: Path) -> None:
    program = tiny_program()
    ids = ids_for(2, 5)
    assert_equal(opened(program, tmp_path, True, opset).forward(ids), ReferenceRuntime(program).forward(ids), None)


def test_an_unknown_opset_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="opset 12"):
        emit_program(tiny_program(), 12)


def test_a_decode_step_is_few_nodes_and_one_mask() -> None:
    shallow, deep = (node_counts(emit_program(traced("llama", layers)[0])) for layers in (1, 2))
    grown = {op: count - shallow.get(op, 0) for op, count in deep.items() if count != shallow.get(op, 0)}
    assert grown == {
        "com.microsoft::FusedMatMul": 7,
        "RotaryEmbedding": 2,
        "com.microsoft::SkipSimplifiedLayerNormalization": 2,
        "Attention": 1,
        "com.microsoft::QuickGelu": 1,
        "Mul": 1,
    }


def test_plain_models_call_standard_operators_alone() -> None:
    assert not [op for op in node_counts(emit_program(tiny_program(), fuse=False)) if "::" in op]


def test_inputs_outputs_and_dims_have_their_published_names() -> None:
    model = emit_program(tiny_program())
    shapes = {v.name: [str(d) for d in v.shape] for v in (*model.graph.inputs, *model.graph.outputs)}
    assert list(shapes)[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert list(shapes)[6:9] == ["logits", "present.0.key", "present.0.value"]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["past_key_values.1.value"] == ["batch", "2", "past", "8"]
    assert shapes["present.1.value"] == ["batch", "2", "total", "8"]


def test_nodes_say_where_they_come_from() -> None:
    nodes = {node.name: node for node in emit_program(tiny_program()).graph}
    found = nodes["layers_0_mlp_gate_proj"]
    assert found.op_type == "FusedMatMul"
    assert found.metadata_props["nomul.path"] == "model.layers.0.mlp.gate_proj"
    assert len(nodes) == len({id(n) for n in nodes.values()}) and "" not in nodes


def test_weights_lie_in_the_data_file_and_a_tied_one_once(tmp_path: Path) -> None:
    program = tiny_program()
    BACKEND.lower(program, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {MODEL_FILE, DATA_FILE}
    model = onnx_ir.load(tmp_path / MODEL_FILE)
    stored = {n: v.const_value for n, v in model.graph.initializers.items()}
    weights = [n for n in program.params if program.params.nbytes(n) > 256]
    assert all(type(stored[n]).__name__ == "ExternalTensor" for n in weights)
    assert (tmp_path / DATA_FILE).stat().st_size <= program.params.total_bytes()


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        BACKEND.lower(tiny_program(), tmp_path / name)
    for file in (MODEL_FILE, DATA_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_are_read_one_after_the_other_while_writing(tmp_path: Path) -> None:
    program, alive = tiny_program(), []

    class Counting(MemorySource):
        def load(self, name: str) -> Tensor:
            alive.append(name)
            return super().load(name).clone()

    for name in list(program.params):
        kind = program.params.type_of(name)
        program.params.enter(name, Entry(Counting({name: program.params.get(name)}), name, kind))
    model = emit_program(program)
    assert not [n for n in alive if program.params.nbytes(n) > 256]
    write_model(model, tmp_path)
    large = [n for n in alive if program.params.nbytes(n) > 256]
    assert len(large) == len(set(large)) > 10


def test_a_program_that_cannot_be_emitted_writes_nothing(tmp_path: Path) -> None:
    s = Sketch()
    x = s.input("input_ids", hidden(8))
    program = s.program(s.call(torch.ops.aten.linalg_vector_norm.default, x, type=TensorType(torch.float32, ())))
    with pytest.raises(UnsupportedError) as caught:
        BACKEND.lower(program, tmp_path)
    assert "linalg_vector_norm" in str(caught.value) and not list(tmp_path.iterdir())


def test_every_operator_of_the_test_models_passes_the_check_before_any_work() -> None:
    for node in tiny_program().graph.nodes:
        assert node.op != "call_function" or BACKEND.refuses(node) is None


def test_programs_without_a_cache_run(tmp_path: Path) -> None:
    program = tiny_mlp_program()
    OnnxRuntimeBackend(fuse=False).lower(program, tmp_path)
    ids = ids_for(2, 3) % 40
    found, cache = OnnxRuntime(program, tmp_path).forward(ids)
    assert cache == [] and float((found - ReferenceRuntime(program).forward(ids)[0]).abs().max()) <= LIMIT


def test_onnx_accepts_the_file(tmp_path: Path) -> None:
    import onnx

    for fuse in (True, False):
        write_model(emit_program(traced("llama")[0], fuse=fuse), tmp_path)
        onnx.checker.check_model(str(tmp_path / MODEL_FILE))
