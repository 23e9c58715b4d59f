"""Matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from backends.onnxruntime.elementwise import operand
from backends.onnxruntime.emitter import CONTRIB, Emitter, Entry, Refused, Result
from backends.onnxruntime.narrow import narrow_product
from backends.onnxruntime.shapes import rank_of
from ir.program import tensor_type_of

aten = torch.ops.aten


def _linear(e: Emitter, node: fx.Node) -> Result:
    x, weight, bias = e.args(node)
    return product(e, e.value(x), x, weight, None if bias is None else e.value(bias))


def product(e: Emitter, value: Any, x: fx.Node, weight: fx.Node, bias: Any | None) -> Any:
    """Return value W^T + bias for a weight stored outputs-first, which stays as it is stored.

    value: what stands for x, of its rank and dtype.
    """
    if tensor_type_of(x).dtype == torch.float32 and (found := narrow_product(e, value, weight, bias)) is not None:
        return found
    if rank_of(x) == 2:
        return e.add("Gemm", value, e.value(weight), bias, transB=1)
    if e.fuse and tensor_type_of(weight).dtype == torch.float32:
        # A tied weight serves as embedding and as head, without a turned copy.
        found = e.add("FusedMatMul", value, e.value(weight), domain=CONTRIB, transB=1)
    else:
        found = e.add("MatMul", value, _turned(e, weight))
    return found if bias is None else e.add("Add", found, bias)


def _turned(e: Emitter, weight: fx.Node) -> Any:
    """Return a weight inputs-first: a parameter is turned when the file is written."""
    if weight.op != "get_attr":
        return e.add("Transpose", e.value(weight), perm=[1, 0])
    name = e.program.params.resolve(str(weight.target))
    kind = e.program.params.type_of(name)
    rows, inputs = (int(d) for d in kind.dims)
    return e.initializer(f"{name}.T", (inputs, rows), kind.dtype, lambda: e.program.params.get(name).T)


def _matmul(e: Emitter, node: fx.Node) -> Result:
    a, b = e.args(node)
    return e.add("MatMul", e.value(a), e.value(b))


def _bias_product(e: Emitter, node: fx.Node) -> Result:
    """Emit beta c + alpha a b."""
    c, a, b, beta, alpha = e.args(node)
    found = e.add("MatMul", e.value(a), e.value(b))
    dtype = tensor_type_of(node).dtype
    if alpha != 1:
        found = e.add("Mul", found, e.scalar(alpha, dtype))
    if beta == 0:
        return found
    bias = operand(e, c, dtype)
    return e.add("Add", found, bias if beta == 1 else e.add("Mul", bias, e.scalar(beta, dtype)))


def _einsum(e: Emitter, node: fx.Node) -> Result:
    equation, parts, path = e.args(node)
    if path is not None:
        raise Refused("a path of contractions cannot be given to ONNX")
    return e.add("Einsum", *[e.value(p) for p in parts], equation=equation)


TABLE: dict[Any, Entry] = {
    aten.linear.default: _linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _bias_product),
    aten.einsum.default: _einsum,
}
