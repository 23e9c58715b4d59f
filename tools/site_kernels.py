"""Which kernel every linear of a compiled model runs by, and why it is not another one, as its files tell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.native.library import MODES
from backends.onnxruntime.emitter import DETOURS, SITES
from backends.onnxruntime.lowering import MODEL_FILE

REPORT_FILE = "report.json"
_FLOAT = ("FusedMatMul", "MatMul", "Gemm")
_IN_FLOAT = (*_FLOAT, "DenseLinear")


@dataclass(frozen=True)
class SiteKernel:
    """A linear's name, the kernel that runs it, and why: empty where it is the one for its codes."""

    site: str
    kernel: str
    reason: str


def site_kernels(folder: Path) -> list[SiteKernel]:
    """Return the linears of an artifact's `model.onnx` in order; raises what reading a damaged file raises."""
    import onnx_ir as ir

    model = ir.load(str(folder / MODEL_FILE))
    detours, left_alone = _detours(model), _left_alone(folder)
    found = []
    for node in model.graph:
        kernel = _kernel(node)
        if kernel is not None:
            for site in _sites(node):
                in_float = left_alone.get(site, "its weight is stored in float") if node.op_type in _IN_FLOAT else ""
                found.append(SiteKernel(site, kernel, detours.get(site, in_float)))
    return found


def kernel_lines(kernels: list[SiteKernel]) -> list[str]:
    """Return one line for each kernel and reason with the number of linears: `210 by nomul, 3 planes, 14bit`."""
    counted: dict[tuple[str, str], int] = {}
    for one in kernels:
        counted[one.kernel, one.reason] = counted.get((one.kernel, one.reason), 0) + 1
    return [f"{n} by {kernel}{reason and ': ' + reason}" for (kernel, reason), n in counted.items()]


def _sites(node: Any) -> list[str]:
    """Return the linears that a node stands for."""
    several = node.metadata_props.get(SITES)
    return json.loads(several) if several else [node.metadata_props.get("nomul.path") or node.name]


def _kernel(node: Any) -> str | None:
    """Return what runs a node that multiplies by a constant matrix, None for other nodes."""
    if node.op_type == "TiledLinear":
        modes = {number: name for name, number in MODES.items()}
        planes, mode = node.attributes.get_int("planes"), node.attributes.get_int("mode")
        return f"nomul, {planes} planes, {modes.get(mode, mode)}"
    if node.op_type == "MatMulNBits":
        bits, level = node.attributes.get_int("bits"), node.attributes.get_int("accuracy_level", 0)
        return f"MatMulNBits, {bits} bits, accuracy level {level}"
    if node.op_type == "DenseLinear":
        return f"nomul, {node.inputs[1].dtype.name.lower()} as stored"
    if node.op_type == "CodedLinear":
        return "standard operators"
    weight = node.inputs[1] if node.op_type in _FLOAT else None
    return "float32 MatMul" if weight is not None and weight.is_initializer() else None


def _detours(model: Any) -> dict[str, str]:
    return {one["site"]: one["reason"] for one in json.loads(model.metadata_props.get(DETOURS, "[]"))}


def _left_alone(folder: Path) -> dict[str, str]:
    """Return site -> why the last pass that could have compressed it did not, as the report tells."""
    path = folder / REPORT_FILE
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return dict(_pairs(report))


def _pairs(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for step in report.get("pipeline", []):
        for one in step.get("left_alone", []):
            yield one["site"], one["reason"]
