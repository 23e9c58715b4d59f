"""Linears in all the forms that exporters write, and near misses that must stay what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from frontend.onnx.opened import open_program
from ir.analysis import linear_sites
from ir.errors import UnsupportedError
from ir.program import Program

_RANDOM = np.random.default_rng(3)
INPUTS, OUTPUTS = 16, 24


@dataclass(frozen=True)
class Form:
    """Nodes from x to y as (operator, inputs, output, attributes), shapes of what is stored, and dims of x and y."""

    nodes: tuple[tuple[str, str, str, dict[str, Any]], ...]
    stored: dict[str, tuple[int, ...]]
    given: tuple[Any, ...] = ("batch", "seq", INPUTS)
    result: tuple[Any, ...] = ("batch", "seq", OUTPUTS)
    bias: bool = field(default=True)

    def write(self, path: Path) -> Path:
        """Write the model with random weights."""
        nodes = [helper.make_node(op, ins.split(), [out], **more) for op, ins, out, more in self.nodes]
        tensors = {n: _RANDOM.standard_normal(s).astype(np.float32) for n, s in self.stored.items()}
        graph = helper.make_graph(
            nodes,
            "form",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.given)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, self.result)],
            [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path


MATRIX, TURNED, ROW = (INPUTS, OUTPUTS), (OUTPUTS, INPUTS), (OUTPUTS,)
FLAT = {"given": ("batch", INPUTS), "result": ("batch", OUTPUTS)}
IMAGE = {"given": ("batch", INPUTS, "height", "width"), "result": ("batch", OUTPUTS, "height", "width")}
LINEAR = {
    "matmul": Form((("MatMul", "x w", "y", {}),), {"w": MATRIX}, bias=False),
    "matmul_add": Form((("MatMul", "x w", "z", {}), ("Add", "z c", "y", {})), {"w": MATRIX, "c": ROW}),
    "add_matmul": Form((("MatMul", "x w", "z", {}), ("Add", "c z", "y", {})), {"w": MATRIX, "c": ROW}),
    "transposed": Form(
        (("Transpose", "w", "t", {"perm": [1, 0]}), ("MatMul", "x t", "y", {})), {"w": TURNED}, bias=False
    ),
    "gemm": Form((("Gemm", "x w c", "y", {}),), {"w": MATRIX, "c": ROW}, **FLAT),
    "gemm_turned": Form((("Gemm", "x w c", "y", {"transB": 1}),), {"w": TURNED, "c": ROW}, **FLAT),
    "gemm_without_bias": Form((("Gemm", "x w", "y", {"transB": 1}),), {"w": TURNED}, bias=False, **FLAT),
    "gemm_row": Form((("Gemm", "x w c", "y", {}),), {"w": MATRIX, "c": (1, OUTPUTS)}, **FLAT),
    "conv": Form((("Conv", "x w c", "y", {}),), {"w": (*TURNED, 1, 1), "c": ROW}, **IMAGE),
    "conv_line": Form(
        (("Conv", "x w", "y", {}),),
        {"w": (*TURNED, 1)},
        given=("batch", INPUTS, "seq"),
        result=("batch", OUTPUTS, "seq"),
        bias=False,
    ),
}
HALVED = {"given": IMAGE["given"], "result": ("batch", OUTPUTS, "h", "w")}
OTHERS = {
    "conv_strides": Form((("Conv", "x w", "y", {"strides": [2, 2]}),), {"w": (*TURNED, 1, 1)}, **HALVED),
    "conv_padding": Form((("Conv", "x w", "y", {"pads": [1, 1, 1, 1]}),), {"w": (*TURNED, 1, 1)}, **HALVED),
    "conv_groups": Form((("Conv", "x w", "y", {"group": 2}),), {"w": (OUTPUTS, INPUTS // 2, 1, 1)}, **IMAGE),
    "conv_windows": Form((("Conv", "x w", "y", {}),), {"w": (*TURNED, 1, 2)}, **HALVED),
    "product_from_the_left": Form(
        (("MatMul", "w x", "y", {}),), {"w": (5, 7)}, given=("batch", 7, INPUTS), result=("batch", 5, INPUTS)
    ),
}


def same(form: Form, path: Path) -> Program:
    program, _ = open_program(form.write(path), lambda _: None, path.parent / "traces")
    sizes = [d if isinstance(d, int) else 3 + i for i, d in enumerate(form.given)]
    x = torch.from_numpy(_RANDOM.standard_normal(sizes).astype(np.float32))
    expected = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(program.module()(x)[0], torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    return program


@pytest.mark.parametrize("name", LINEAR)
def test_linears_are_found(name: str, tmp_path: Path) -> None:
    form = LINEAR[name]
    program = same(form, tmp_path / "model.onnx")
    sites, left = linear_sites(program, program.graph.nodes)
    assert [(s.rows, s.inputs, s.bias is not None) for s in sites] == [(OUTPUTS, INPUTS, form.bias)] and not left
    again, _ = open_program(tmp_path / "model.onnx", lambda _: None, tmp_path / "traces")
    assert torch.equal(again.params.get(sites[0].weight), program.params.get(sites[0].weight))


@pytest.mark.parametrize("name", OTHERS)
def test_near_misses_stay(name: str, tmp_path: Path) -> None:
    program = same(OTHERS[name], tmp_path / "model.onnx")
    assert linear_sites(program, program.graph.nodes) == ([], [])


def _signed(*shape: int) -> np.ndarray:
    return _RANDOM.integers(-128, 128, shape).astype(np.int8)


def _unsigned(*shape: int) -> np.ndarray:
    return _RANDOM.integers(0, 256, shape).astype(np.uint8)


def _scales(*shape: int) -> np.ndarray:
    return (_RANDOM.random(shape) * 0.02 + 0.001).astype(np.float32)


# Stored codes, scales and zero points with the attributes of DequantizeLinear, outputs along the last axis.
CODED = {
    "one_scale": ((_signed(*MATRIX), _scales()), {}),
    "scale_per_output": ((_signed(*MATRIX), _scales(OUTPUTS), _signed(OUTPUTS)), {"axis": 1}),
    "scale_per_input": ((_unsigned(*MATRIX), _scales(INPUTS), _unsigned(INPUTS)), {"axis": -2}),
    "blocks": ((_signed(*MATRIX), _scales(4, OUTPUTS)), {"axis": 0, "block_size": 4}),
    "ragged_blocks": ((_unsigned(*MATRIX), _scales(4, OUTPUTS), _unsigned(4, OUTPUTS)), {"axis": 0, "block_size": 5}),
}


@pytest.mark.parametrize("name", CODED)
def test_stored_codes_become_weights(name: str, tmp_path: Path) -> None:
    """Exactly those that the operator decodes, read when they are asked for, whatever a runtime rounds on the way."""
    stored, attributes = CODED[name]
    names = ["q", "scale", "zero"][: len(stored)]
    decode = helper.make_node("DequantizeLinear", names, ["w"], **attributes)
    tensors = [numpy_helper.from_array(tensor, n) for n, tensor in zip(names, stored, strict=True)]
    x, y = (_declared(n, ("batch", "seq", width)) for n, width in (("x", INPUTS), ("y", OUTPUTS)))
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = _saved(tmp_path / "model.onnx", helper.make_graph([decode, product], "coded", [x], [y], tensors))
    alone = _saved(tmp_path / "alone.onnx", helper.make_graph([decode], "w", [], [_declared("w", MATRIX)], tensors))
    weight = onnxruntime.InferenceSession(alone, providers=["CPUExecutionProvider"]).run(None, {})[0]
    program, _ = open_program(path, lambda _: None, tmp_path / "traces")
    sites, left = linear_sites(program, program.graph.nodes)
    assert len(sites) == 1 and not left
    assert torch.equal(program.params.get(sites[0].weight), torch.from_numpy(weight.T.copy()))


def test_codes_that_two_scales_share_are_two_weights(tmp_path: Path) -> None:
    codes, scales = _signed(INPUTS, INPUTS), (_scales(INPUTS), _scales(INPUTS))
    names = [("first", "x", "z"), ("second", "z", "y")]
    nodes = [
        node
        for scale, given, result in names
        for node in (
            helper.make_node("DequantizeLinear", ["q", scale], [f"{scale}_w"]),
            helper.make_node("MatMul", [given, f"{scale}_w"], [result]),
        )
    ]
    stored = {"q": codes, "first": scales[0], "second": scales[1]}
    tensors = [numpy_helper.from_array(tensor, n) for n, tensor in stored.items()]
    ends = (_declared("x", ("batch", INPUTS)), _declared("y", ("batch", INPUTS)))
    path = _saved(tmp_path / "model.onnx", helper.make_graph(nodes, "shared", ends[:1], ends[1:], tensors))
    program, _ = open_program(path, lambda _: None, tmp_path / "traces")
    x = torch.randn(3, INPUTS)
    wanted = x @ torch.from_numpy(codes * scales[0]) @ torch.from_numpy(codes * scales[1])
    torch.testing.assert_close(program.module()(x)[0], wanted, rtol=1e-5, atol=1e-5)


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    decode = helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=1)
    tensors = [numpy_helper.from_array(_signed(*MATRIX), "q"), numpy_helper.from_array(_scales(5), "scale")]
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = (_declared("x", ("batch", INPUTS)), _declared("y", ("batch", OUTPUTS)))
    graph = helper.make_graph([decode, product], "unfit", ends[:1], ends[1:], tensors)
    with pytest.raises(UnsupportedError, match="DequantizeLinear"):
        open_program(_saved(tmp_path / "model.onnx", graph), lambda _: None, tmp_path / "traces")


def _declared(name: str, dims: tuple[Any, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def _saved(path: Path, graph: onnx.GraphProto) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path
