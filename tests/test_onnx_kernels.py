"""nomul's operators inside ONNX Runtime against the operators as they are defined."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from backends.native.build import built_library
from backends.native.layout import Packed, layout_of, pack
from ir.ops.hadamard import block_order, hadamard_factors
from ir.ops.packing import pack_bits
from tests.coded_weights import exact_product, quant_codes, relative_error, shift_codes


def session_of(nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray], threads: int = 1):
    """Return a session of a small model whose constants are given by name."""
    for name, array in constants.items():
        value = next(v for node in nodes for v in node.inputs if v is not None and v.name == name)
        value.const_value = onnx_ir.tensor(array, name=name)
    initializers = [v for node in nodes for v in node.inputs if v is not None and v.const_value is not None]
    opsets = {"": 21, "nomul": 1}
    graph = onnx_ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="one")
    model = onnx_ir.serde.serialize_model(onnx_ir.Model(graph, ir_version=10)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(built_library()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def value(name: str, kind: onnx_ir.DataType = onnx_ir.DataType.FLOAT, dims: tuple = ("b", "t", "k")) -> onnx_ir.Value:
    """Return a value of a type with named dims."""
    return onnx_ir.Value(name=name, type=onnx_ir.TensorType(kind), shape=onnx_ir.Shape(dims))


def linear_session(packed: Packed, bias: Tensor | None, threads: int = 1, **changes: int | list[int]):
    """Return a session that runs one TiledLinear; changes: attributes that are to be wrong."""
    layout = packed.layout
    x, weight = value("x"), value("w", onnx_ir.DataType.UINT8, (packed.data.numel(),))
    given, constants = [x, weight], {"w": packed.data.numpy()}
    if bias is not None:
        given.append(value("b", dims=(layout.rows,)))
        constants["b"] = bias.numpy()
    attributes = {**layout.attributes(), "mode": 1, **changes}
    node = onnx_ir.node("TiledLinear", given, attributes=attributes, domain="nomul")
    node.outputs[0].name, node.outputs[0].type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    node.outputs[0].shape = onnx_ir.Shape(("b", "t", layout.rows))
    return session_of([node], [x], [node.outputs[0]], constants, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(17, 33, 32), (576, 576, 64), (1000, 160, 4096)])
def test_a_linear_in_a_session_is_within_its_bound(shape: tuple[int, int, int], threads: int) -> None:
    rows, inputs, group = shape
    codes = shift_codes(rows, inputs, 3, group, 2, True, seed=1, spread=2)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    session = linear_session(pack(codes), bias, threads)
    for batch, tokens in ((1, 1), (3, 1), (1, 40), (2, 0)):
        x = torch.randn(batch, tokens, inputs, generator=torch.Generator().manual_seed(tokens))
        got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        assert got.shape == (batch, tokens, rows)
        if tokens:
            assert relative_error(got, exact_product(x, codes.dequantize(torch.float64), bias)) < 5e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_codes_run_by_the_same_kernel(bits: int) -> None:
    codes = quant_codes(100, 192, bits, 64, True, seed=bits)
    x = torch.randn(1, 3, 192, generator=torch.Generator().manual_seed(1))
    got = torch.from_numpy(linear_session(pack(codes), None).run(None, {"x": x.numpy()})[0])
    assert relative_error(got, exact_product(x, codes.dequantize(torch.float64), None)) < 5e-4


def test_sessions_and_threads_at_the_same_time_give_the_same() -> None:
    packed = pack(shift_codes(700, 320, 3, 64, 2, True, seed=3, spread=2))
    sessions = [linear_session(packed, None, threads) for threads in (1, 2)]
    x = torch.randn(2, 5, 320, generator=torch.Generator().manual_seed(2)).numpy()
    first = sessions[0].run(None, {"x": x})[0]
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(sessions[i % 2].run, None, {"x": x}) for i in range(64)]
    assert all(np.array_equal(run.result()[0], first) for run in runs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("most", [2, 16, 64])
@pytest.mark.parametrize("width", [2, 12, 64, 576, 1536, 1000])
def test_a_rotation_in_a_session_is_the_operator(width: int, most: int, transposed: bool) -> None:
    order = block_order(width)
    keep = torch.rand(width, generator=torch.Generator().manual_seed(width)) < 0.5
    factors = [(f if transposed else f.T).float().contiguous() for f in hadamard_factors(order, most)]
    inputs = [value("x"), value("s", dims=(width,))]
    constants = {"s": (keep.float() * 2 - 1).numpy()}
    for i, factor in enumerate(factors):
        inputs.append(value(f"f{i}", dims=tuple(factor.shape)))
        constants[f"f{i}"] = factor.numpy()
    node = onnx_ir.node("Hadamard", inputs, attributes={"transposed": int(transposed)}, domain="nomul")
    node.outputs[0].name, node.outputs[0].type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    node.outputs[0].shape = onnx_ir.Shape(("b", "t", width))
    session = session_of([node], inputs[:1], [node.outputs[0]], constants)
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    signs = pack_bits(keep.to(torch.uint8), 1)
    wanted = torch.ops.nomul.hadamard(x.double(), signs, order, transposed)
    assert relative_error(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), wanted) < 1e-6


def test_what_does_not_fit_is_an_exception_that_says_why() -> None:
    packed = pack(shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2))
    with pytest.raises(Exception, match="layout version 2, this library reads 1"):
        linear_session(packed, None, version=2)
    with pytest.raises(Exception, match="its layout needs"):
        linear_session(packed, None, rows=41 + 32)
    with pytest.raises(Exception, match="1 to 8 planes, not 9"):
        linear_session(packed, None, planes=9)
    with pytest.raises(Exception, match="there is no mode 7"):
        linear_session(packed, None, mode=7)
    for parts in ([40, 40], [20, 20], [32, 0, 8], [32], [64], [32, -32, 40]):
        with pytest.raises(Exception, match="the parts must be the rows of the weight"):
            linear_session(packed, None, parts=parts)
    with pytest.raises(Exception, match="the node has no output 1"):
        linear_session(packed, None, parts=[32, 8]).run(None, {"x": np.zeros((1, 1, 96), np.float32)})
    with pytest.raises(Exception, match="the bias must have 40 values"):
        linear_session(packed, torch.zeros(41)).run(None, {"x": np.zeros((1, 1, 96), np.float32)})
    with pytest.raises(Exception, match="last dim of the activations must be 96"):
        linear_session(packed, None).run(None, {"x": np.zeros((1, 1, 95), np.float32)})


def test_layouts_are_known_without_packing() -> None:
    for codes in (shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2), quant_codes(9, 70, 3, 64, False, seed=1)):
        assert pack(codes).layout == layout_of(codes)


def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.so").write_bytes(b"not a library")
    with pytest.raises(Exception, match=r"other\.so"):
        onnxruntime.SessionOptions().register_custom_ops_library(str(tmp_path / "other.so"))
