"""The functions that stand in for kernels: decoded weights, rotations, and whole files without the library."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from backends.native.build import built_library
from backends.native.layout import Layout, pack
from backends.onnxruntime import OnnxRuntime, SessionOptions
from backends.onnxruntime.dtypes import onnx_dtype
from backends.onnxruntime.lowering import MODEL_FILE, emit_program, node_counts, write_model
from backends.onnxruntime.twins import linear_function, rotation_function
from backends.reference.runtime import ReferenceRuntime
from ir.ops.hadamard import block_order, hadamard_factors
from ir.ops.packing import pack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes, encode, encode_uniform
from tests.architectures import ids_for, relative_error
from tests.coded_weights import exact_product, quant_codes, shift_codes
from tests.coded_weights import relative_error as error_of
from tests.test_onnx_compressed import PIPELINES, compressed


def twin_session(function: onnx_ir.Function, constants: list[Tensor], outputs: int) -> onnxruntime.InferenceSession:
    """Return a session without the library that runs one node by its function; constants: its inputs but the first."""

    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(("b", "t", None)))
    stored = [
        onnx_ir.Value(
            name=f"c{i}",
            type=onnx_ir.TensorType(onnx_dtype(t.dtype)),
            shape=onnx_ir.Shape(t.shape),
            const_value=onnx_ir.tensor(t.numpy(), name=f"c{i}"),
        )
        for i, t in enumerate(constants)
    ]
    node = onnx_ir.node(function.name, [x, *stored], domain="nomul", overload=function.overload)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", x.type, onnx_ir.Shape(("b", "t", outputs))
    graph = onnx_ir.Graph([x], [y], nodes=[node], initializers=stored, opset_imports={"": 23, "nomul": 1}, name="one")
    model = onnx_ir.serde.serialize_model(onnx_ir.Model(graph, ir_version=10, functions=[function]))
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def decoded(codes: ShiftCodes | QuantCodes) -> Tensor:
    """Return the weight as the twin decodes it: its product with the identity."""
    packed = pack(codes)
    layout = packed.layout
    stored = [packed.data.view(layout.tiles, layout.tile_bytes)]
    session = twin_session(linear_function(layout, False, 23), stored, layout.rows)
    return run(session, torch.eye(layout.inputs)[None])[0].T


def assert_decoded(codes: ShiftCodes | QuantCodes) -> None:
    """Hold a decoded weight to what the sum of its planes and offset may be rounded by in float32."""
    wanted, found = codes.dequantize(torch.float64), decoded(codes)
    largest = wanted.abs().amax(1, keepdim=True)
    assert found.shape == wanted.shape and bool(((found - wanted).abs() <= 1e-6 * largest).all())


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "inputs", "group"), [(1, 32, 32), (33, 100, 32), (40, 192, 64), (70, 150, 48), (17, 90, 4096)]
)
def test_planes_of_every_layout(rows: int, inputs: int, group: int, terms: int, offset: bool) -> None:
    planes = 1 + (rows + terms) % 8
    assert_decoded(shift_codes(rows, inputs, planes, group, terms, offset, seed=terms, spread=3))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_codes_are_exact(bits: int, zeros: bool) -> None:
    codes = quant_codes(40, 150, bits, (32, 48, 64, 4096)[bits % 4], zeros, seed=bits)
    assert torch.equal(decoded(codes), codes.dequantize())


@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4])
def test_uniform_planes_with_scales_of_powers_of_two(terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    integers = torch.randint(0, 8, (40, 100), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 8, (20, 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(20, 2, generator=generator)
    for points in (zeros, None):
        codes = encode_uniform(integers, scales, points, 3, 64, terms, row_group=2)
        assert torch.equal(decoded(codes), codes.dequantize())


@pytest.mark.parametrize("terms", [0, 2])
def test_planes_that_share_one_scale_around_an_offset(terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    signs, alpha = torch.rand(3, 70, 100, generator=generator) < 0.5, torch.rand(70, 2, 1, generator=generator)
    for z in (torch.randn(70, 2, generator=generator), None):
        assert_decoded(encode(signs, alpha, z, 64, terms, code="steps"))


def test_trits_and_rows_that_share_scales() -> None:
    generator = torch.Generator().manual_seed(1)
    digits = torch.randint(-1, 2, (2, 70, 96), generator=generator)
    alpha, z = torch.rand(9, 3, 2, generator=generator), torch.randn(9, 3, generator=generator)
    assert_decoded(encode(digits, alpha, z, 32, 3, row_group=8, code="trits"))


def test_half_precision_scales_from_the_smallest_to_the_largest() -> None:
    values = torch.cat([torch.arange(0x7C00, dtype=torch.int16).view(torch.float16), torch.zeros(1024).half()])
    scales = values.reshape(-1, 1)
    codes = QuantCodes(torch.full((len(values), 4), 0xE4, dtype=torch.uint8), scales, None, 1, 32, 32)
    assert torch.equal(decoded(codes), codes.dequantize())


def test_bias_and_batches_without_tokens() -> None:
    codes, bias = shift_codes(70, 96, 3, 32, 2, True, seed=1, spread=2), torch.arange(70).float()
    packed = pack(codes)
    layout = packed.layout
    session = twin_session(
        linear_function(layout, True, 23), [packed.data.view(layout.tiles, layout.tile_bytes), bias], 70
    )
    for batch, tokens in ((1, 1), (3, 5), (2, 0)):
        x = torch.randn(batch, tokens, 96, generator=torch.Generator().manual_seed(tokens))
        got, wanted = run(session, x), exact_product(x, codes.dequantize(torch.float64), bias)
        assert got.shape == wanted.shape and (tokens == 0 or error_of(got, wanted) < 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [2, 12, 64, 576, 1000])
def test_rotations(width: int, transposed: bool) -> None:
    order = block_order(width)
    keep = torch.rand(width, generator=torch.Generator().manual_seed(width)) < 0.5
    factors = [(f if transposed else f.T).float().contiguous() for f in hadamard_factors(order)]
    sizes = tuple(f.shape[0] for f in factors)
    session = twin_session(rotation_function(width, sizes, transposed, 23), [keep.float() * 2 - 1, *factors], width)
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    wanted = torch.ops.nomul.hadamard(x.double(), pack_bits(keep.to(torch.uint8), 1), order, transposed)
    assert error_of(run(session, x), wanted) < 1e-6
    assert run(session, x[:, :0]).shape == (2, 0, width)


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_file_runs_without_the_library(pipeline: str, opset: int, tmp_path: Path) -> None:
    program = compressed("gpt2" if pipeline == "rows" else "llama", pipeline)
    write_model(emit_program(program, opset), tmp_path)
    runtime = OnnxRuntime(program, tmp_path, options=SessionOptions(threads=1, library=None))
    reference = ReferenceRuntime(program)
    for ids in (ids_for(1, 1), ids_for(3, 17)):
        theirs, ours = reference.forward(ids), runtime.forward(ids)
        assert relative_error([ours[0], *ours[1]], [theirs[0], *theirs[1]]) <= 1e-5


def test_with_the_library_kernels_run_and_without_it_functions(tmp_path: Path) -> None:
    program = compressed("llama", "shiftadd")
    model = emit_program(program)
    write_model(model, tmp_path)
    wanted = {k.removeprefix("nomul::"): v for k, v in node_counts(model).items() if k.startswith("nomul::")}
    assert wanted["TiledLinear"] == 8 and wanted["Hadamard"] > 0
    for library, found in ((built_library(), wanted), (None, {})):
        options = SessionOptions(threads=1, library=library, profile=str(tmp_path / "trace"))
        runtime = OnnxRuntime(program, tmp_path, options=options)
        runtime.forward(ids_for(1, 2))
        events = json.loads(Path(runtime.session.end_profiling()).read_text())
        names = [e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")]
        assert {name: names.count(name) for name in ("TiledLinear", "Hadamard") if name in names} == found
        assert ("Scan" in names) == (library is None)


def test_one_function_serves_all_linears_of_a_layout(tmp_path: Path) -> None:
    program = compressed("llama", "shiftadd")
    model = emit_program(program)
    linears = [node for node in model.graph if node.op_type == "TiledLinear"]
    functions = [f for f in model.functions.values() if f.name == "TiledLinear"]
    assert {n.overload for n in linears} == {f.overload for f in functions} and len(functions) <= len(linears) / 2
    write_model(model, tmp_path)
    onnx.checker.check_model(str(tmp_path / MODEL_FILE))


def test_layouts_that_differ_have_different_functions() -> None:
    first = pack(shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2)).layout
    fields = first.attributes() | {"planes": 2}
    names = {linear_function(one, bias, 23).overload for one in (first, Layout(**fields)) for bias in (False, True)}
    assert len(names) == 4
