"""Weights in codes that programs have no place for, as the floats they stand for, decoded when they are asked for.

A program's codes have scales of float16. Codes with scales of more digits stay exact as a float weight, which every
pass takes like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as onnx
import torch
from torch import Tensor

from frontend.onnx.tensors import tensor_of
from ir.ops.packing import unpack_bits

_BITS = (2, 4, 8)
_KINDS = onnx.DataType
_WHOLE = (_KINDS.INT8, _KINDS.UINT8, _KINDS.INT4, _KINDS.UINT4, _KINDS.INT16, _KINDS.UINT16)
_CODED = re.compile(r"(_Q\d+|_quantized|_quant)$")


@dataclass(frozen=True)
class Codes:
    """A matrix [rows, inputs] in codes: initializers of packed codes, scales [rows, groups] and perhaps zero points."""

    codes: onnx.Value
    scales: onnx.Value
    zeros: onnx.Value | None
    bits: int
    block: int
    rows: int
    inputs: int

    def decode(self) -> Tensor:
        """Return the matrix in the type of its scales."""
        groups = -(-self.inputs // self.block)
        scales = _stored(self.scales).reshape(self.rows, groups, 1)
        codes = unpack_bits(_stored(self.codes).reshape(self.rows, -1), self.bits, groups * self.block)
        steps = codes.reshape(self.rows, groups, self.block).to(scales.dtype) - self._points(groups, scales.dtype)
        found: Tensor = (steps * scales).reshape(self.rows, -1)[:, : self.inputs].contiguous()
        return found

    def _points(self, groups: int, dtype: torch.dtype) -> Tensor | float:
        if self.zeros is None:
            return float(2 ** (self.bits - 1))
        zeros = _stored(self.zeros)
        if zeros.dtype == torch.uint8:
            zeros = unpack_bits(zeros.reshape(self.rows, -1), self.bits, groups)
        return zeros.reshape(self.rows, groups, 1).to(dtype)


@dataclass(frozen=True)
class Steps:
    """A weight that DequantizeLinear decodes: initializers of whole numbers, scales and perhaps zero points.

    axis: that of the scales, where there are several; block: how many entries along it share one, 0 for one each.
    """

    codes: onnx.Value
    scales: onnx.Value
    zeros: onnx.Value | None
    axis: int
    block: int

    def decode(self) -> Tensor:
        """Return the weight in the type of its scales."""
        codes, scales = _stored(self.codes), _stored(self.scales)
        steps = codes.to(scales.dtype)
        if self.zeros is not None:
            # Computed as whole numbers: a difference of two bytes is no byte.
            steps = (codes.to(torch.int32) - self._spread(_stored(self.zeros).to(torch.int32), codes)).to(scales.dtype)
        return steps * self._spread(scales, codes)

    def _spread(self, given: Tensor, codes: Tensor) -> Tensor:
        if given.numel() == 1:
            return given.reshape(())
        if self.block:
            return given.repeat_interleave(self.block, self.axis).narrow(self.axis, 0, codes.shape[self.axis])
        shape = [1] * codes.ndim
        shape[self.axis] = -1
        return given.reshape(shape)


def decode_weights(graph: onnx.Graph) -> None:
    """Replace products with such codes by products with a matrix, and look-ups in codes by look-ups, in place.

    What DequantizeLinear makes of stored codes becomes a stored weight.
    """
    made = dict[tuple[str, str], onnx.Value]()
    for node in list(graph):
        steps = _steps_of(node)
        if steps is not None:
            weight = _enter(graph, steps, list(steps.codes.const_value.shape))
            onnx.convenience.replace_all_uses_with(node.outputs, [weight], replace_graph_outputs=False)
            continue
        found = _codes_of(node)
        if found is None:
            continue
        key = str(found.codes.name), str(found.scales.name)
        if key not in made:
            made[key] = _enter(graph, found, [found.rows, found.inputs])
        new = _lookup(node, made[key]) if node.op_type == "GatherBlockQuantized" else _product(node, made[key])
        for old, value in zip(node.outputs, new[-1].outputs, strict=True):
            value.name, value.shape, value.type = old.name, old.shape, old.type
        graph.insert_before(node, new)
        onnx.convenience.replace_all_uses_with(node.outputs, new[-1].outputs, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _codes_of(node: onnx.Node) -> Codes | None:
    """Return the codes that a node reads, None where it reads none, or some that a program can have."""
    sizes = node.attributes.get_int
    bits, block = sizes("bits", 4), sizes("block_size", 128 if node.op_type == "GatherBlockQuantized" else 0)
    if node.op_type == "MatMulNBits":
        codes, scales, zeros = (_constant(node, place) for place in (1, 2, 3))
        rows, inputs = sizes("N", 0), sizes("K", 0)
        plain = not any(_given(node, place) for place in (4,)) and not sizes("weight_prepacked", 0)
        kept = scales is not None and _are_halves(scales)
    elif node.op_type == "GatherBlockQuantized" and sizes("gather_axis", 0) == 0:
        codes, scales, zeros = (_constant(node, place) for place in (0, 2, 3))
        shape = None if node.inputs[0] is None else _shape(node.inputs[0], codes)
        rows, inputs = (shape[0], shape[1] * 8 // bits) if shape is not None and len(shape) == 2 else (0, 0)
        plain, kept = sizes("quantize_axis", 1) in (1, -1), False
    else:
        return None
    packed = codes is not None and codes.dtype == onnx.DataType.UINT8 and bits in _BITS
    if not packed or not plain or kept or codes is None or scales is None or block < 16 or not rows * inputs:
        return None
    found = Codes(codes, scales, zeros, bits, block, rows, inputs)
    return found if _fits(found) and not (zeros is None and _given(node, 3)) else None


def _fits(found: Codes) -> bool:
    """Return whether there are as many codes, scales and zero points as a matrix takes."""
    groups = -(-found.inputs // found.block)
    points = [found.rows * groups, found.rows * -(-groups * found.bits // 8)]
    packed = found.zeros is not None and found.zeros.dtype == onnx.DataType.UINT8
    return (
        _count(found.codes) == found.rows * groups * (found.block * found.bits // 8)
        and _count(found.scales) == found.rows * groups
        and (found.zeros is None or _count(found.zeros) == points[packed])
    )


def _count(value: onnx.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.size)


def _steps_of(node: onnx.Node) -> Steps | None:
    """Return the stored weight that a node decodes, None for another node, or codes that data or bytes are not."""
    if node.op_type != "DequantizeLinear" or node.domain not in ("", "com.microsoft"):
        return None
    if any(value.is_graph_output() for value in node.outputs):
        return None
    codes, scales, zeros = (_initializer(node, place) for place in range(3))
    if codes is None or scales is None or (zeros is None and _given(node, 2)) or "output_dtype" in node.attributes:
        return None
    stored, factor = codes.const_value, scales.const_value
    assert stored is not None and factor is not None
    sizes, axis, block = (
        list(stored.shape),
        node.attributes.get_int("axis", 1),
        node.attributes.get_int("block_size", 0),
    )
    if len(sizes) < 2 or not -len(sizes) <= axis < len(sizes) or block < 0:
        return None
    shared = list(sizes) if block else [sizes[axis]]
    if block:
        shared[axis] = -(-sizes[axis] // block)
    alike = factor.size == 1 if not factor.shape or list(factor.shape) == [1] else list(factor.shape) == shared
    points = None if zeros is None else zeros.const_value
    same = points is None or list(points.shape) == list(factor.shape) or points.size == factor.size == 1
    whole = stored.dtype in _WHOLE and factor.dtype == onnx.DataType.FLOAT
    return Steps(codes, scales, zeros, axis % len(sizes), block) if whole and alike and same else None


def _initializer(node: onnx.Node, place: int) -> onnx.Value | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    return value if value is not None and value.const_value is not None and value.producer() is None else None


def _enter(graph: onnx.Graph, codes: Codes | Steps, sizes: list[int]) -> onnx.Value:
    """Return a new initializer of a graph that is decoded when it is read."""
    name = _CODED.sub("", str(codes.codes.name))
    serial = 1
    while name in graph.initializers:
        name = f"{codes.codes.name}_decoded" + (f"_{serial}" if serial > 1 else "")
        serial += 1
    dtype, shape = codes.scales.dtype or onnx.DataType.FLOAT, onnx.Shape(sizes)

    def load() -> onnx.TensorProtocol:
        return onnx.tensor(codes.decode().numpy(), name=name)

    value = onnx.Value(name=name, shape=shape, type=onnx.TensorType(dtype))
    value.const_value = onnx.LazyTensor(load, dtype=dtype, shape=shape, name=name)
    graph.initializers[name] = value
    return value


def _product(node: onnx.Node, weight: onnx.Value) -> list[onnx.Node]:
    turned = onnx.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{node.name}_turned")
    turned.outputs[0].name = f"{node.outputs[0].name}/turned"
    product = onnx.node("MatMul", [node.inputs[0], turned.outputs[0]], name=node.name)
    if not _given(node, 5):
        return [turned, product]
    product.outputs[0].name = f"{node.outputs[0].name}/product"
    return [turned, product, onnx.node("Add", [product.outputs[0], node.inputs[5]], name=f"{node.name}_bias")]


def _lookup(node: onnx.Node, weight: onnx.Value) -> list[onnx.Node]:
    return [onnx.node("Gather", [weight, node.inputs[1]], {"axis": 0}, name=node.name)]


def _given(node: onnx.Node, place: int) -> bool:
    return place < len(node.inputs) and node.inputs[place] is not None


def _constant(node: onnx.Node, place: int) -> onnx.Value | None:
    """Return the initializer behind an input, through changes of its shape."""
    value = node.inputs[place] if place < len(node.inputs) else None
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Reshape":
        value = producer.inputs[0]
    return value if value is not None and value.const_value is not None else None


def _shape(value: onnx.Value, codes: onnx.Value | None) -> list[int] | None:
    """Return the shape that packed codes are read in."""
    producer = value.producer()
    if producer is None or codes is value:
        return None if value.shape is None else [int(d) for d in value.shape if isinstance(d, int)]
    asked = producer.inputs[1]
    const = None if asked is None else onnx.convenience.get_const_tensor(asked)
    return None if const is None else [int(d) for d in np.asarray(const.numpy())]


def _are_halves(scales: onnx.Value) -> bool:
    values = _stored(scales)
    return bool((values.to(torch.float16).double() == values.double()).all())


def _stored(value: onnx.Value) -> Tensor:
    assert value.const_value is not None
    return tensor_of(value.const_value)
