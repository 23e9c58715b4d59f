"""What an artifact is held against: the float32 model as ONNX, and the same with 4-bit `MatMulNBits`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backends.onnxruntime.lowering import emit_program, write_model
from ir.errors import UsageError
from ir.ops.codes import group_count
from ir.program import Program
from tools.bench_models import CONTRIB, block_of

BITS, LEVEL = 4, 4
REPORT_FILE = "report.json"
_HEAD = "logits"


def source_of(artifact: Path, asked: str | None) -> str:
    """Return the MODEL that an artifact was made from: the one asked for, or the one its report names.

    Raises UsageError when there is neither.
    """
    if asked is not None:
        return asked
    report = artifact / REPORT_FILE
    found = json.loads(report.read_text(encoding="utf-8")).get("model") if report.is_file() else None
    if isinstance(found, str):
        return found
    raise UsageError(
        "it is not known which model the artifact was made from",
        where=str(artifact),
        why=f"it has no {REPORT_FILE} that names it",
        fix="give the model with --against",
    )


def write_float(program: Program, folder: Path) -> None:
    """Write the float model into a new folder."""
    folder.mkdir(parents=True)
    write_model(emit_program(program, narrow=False), folder)


def write_four_bits(program: Program, folder: Path, head: bool) -> int:
    """Write the model with its linears rounded to 4 bits into a new folder, and return how many they are.

    head: the last linear too, which makes the logits.
    """
    model = emit_program(program, narrow=False)
    found = [node for node in model.graph if _weight(node) is not None and (head or not _makes_logits(node))]
    for node in found:
        _replace(model.graph, node)
    folder.mkdir(parents=True)
    write_model(model, folder)
    return len(found)


def _makes_logits(node: Any) -> bool:
    return any(out.name == _HEAD for out in node.outputs)


def _weight(node: Any) -> Any | None:
    """Return the weight [rows, inputs] or [inputs, rows] of a linear on one, None for other nodes."""
    turned = node.op_type == "FusedMatMul" and node.attributes.get_int("transB", 0) == 1
    if not (turned or (node.op_type == "MatMul" and node.domain == "")):
        return None
    weight = node.inputs[1]
    fits = weight is not None and weight.const_value is not None and len(weight.shape) == 2
    return weight if fits else None


def _replace(graph: Any, node: Any) -> None:
    import onnx_ir as ir

    weight, turned = node.inputs[1], node.op_type == "FusedMatMul"
    rows, inputs = (int(d) for d in (weight.shape if turned else reversed(list(weight.shape))))
    block = block_of(inputs)
    blocks = group_count(inputs, block)
    read = partial(_codes, weight.const_value, turned, block)
    codes = _lazy(f"{weight.name}.codes", lambda: read()[0], ir.DataType.UINT8, (rows, blocks, block // 2))
    scales = _lazy(f"{weight.name}.scales", lambda: read()[1], ir.DataType.FLOAT, (rows * blocks,))
    for value in (codes, scales):
        graph.register_initializer(value)
    attributes = {"K": inputs, "N": rows, "bits": BITS, "block_size": block, "accuracy_level": LEVEL}
    new = ir.node("MatMulNBits", [node.inputs[0], codes, scales], attributes=attributes, domain=CONTRIB, name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], list(node.outputs), list(new.outputs))
    if not weight.uses():
        del graph.initializers[weight.name]


def _lazy(name: str, read: Any, kind: Any, dims: tuple[int, ...]) -> Any:
    import onnx_ir as ir

    shape = ir.Shape(dims)
    tensor = ir.LazyTensor(lambda: ir.tensor(read(), name=name), kind, shape, name=name)
    return ir.Value(name=name, type=ir.TensorType(kind), shape=shape, const_value=tensor)


def _codes(tensor: Any, turned: bool, block: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return codes uint8 [rows, blocks, block / 2], the lower half first, and scales float32 [rows * blocks]."""
    weight = torch.from_numpy(np.ascontiguousarray(tensor.numpy() if turned else tensor.numpy().T))
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    scales = (groups.abs().amax(-1) / 7).clamp(min=1e-10)
    codes = (groups / scales[..., None] + 8).round().clamp(0, 15).to(torch.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return packed.contiguous().numpy(), scales.flatten().numpy()
