"""Weights whose every value is a 16-bit float are stored as such: half the bytes, and no value differs.

Published weights mostly are bfloat16 or float16 and only held as float32. A kernel multiplies with them as they are
stored; its twin, and the look-up of embeddings, widen them first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from backends.native.library import MODES
from backends.onnxruntime.bodies import Body
from backends.onnxruntime.emitter import Emitter
from backends.onnxruntime.twins import DOMAIN, VERSION
from ir.program import tensor_type_of

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Weights below this are read so quickly that a call of a kernel takes as long.
_LEAST = 1 << 16
# Values that are looked at together, so that no copy of a whole weight is made.
_BLOCK = 1 << 22


def narrow_weight(e: Emitter, weight: fx.Node) -> Any | None:
    """Return a large float32 weight as an initializer of the 16-bit floats that it consists of, None if it does not."""
    if not e.narrow or weight.op != "get_attr" or tensor_type_of(weight).dtype != torch.float32:
        return None
    name = e.program.params.resolve(str(weight.target))
    dims = [int(d) for d in e.program.params.type_of(name).dims]
    if torch.Size(dims).numel() < _LEAST or (dtype := _dtype_of(e, name)) is None:
        return None
    return e.initializer(f"{name}.{_NAMES[dtype]}", dims, dtype, lambda: e.program.params.get(name).to(dtype))


def narrow_product(e: Emitter, value: Any, weight: fx.Node, bias: Any | None) -> Any | None:
    """Return value W^T + bias by the kernel for 16-bit floats, None where the weight is none of these."""
    if not e.fuse or len(tensor_type_of(weight).dims) != 2 or (stored := narrow_weight(e, weight)) is None:
        return None
    e.domain(DOMAIN, VERSION)
    overload = "" if bias is None else "bias"
    if not e.has_function(DOMAIN, "DenseLinear", overload):
        e.function(_function(bias is not None, e.opset))
    return e.add("DenseLinear", value, stored, bias, domain=DOMAIN, overload=overload, mode=MODES[e.mode])


def _dtype_of(e: Emitter, name: str) -> torch.dtype | None:
    """Return the 16-bit floats that every value of a weight is one of, found out once a name."""
    if name not in e.narrow_dtypes:
        weight = e.program.params.get(name).detach()
        e.narrow_dtypes[name] = next((dtype for dtype in _NAMES if _consists_of(weight, dtype)), None)
    return e.narrow_dtypes[name]


def _consists_of(weight: Tensor, dtype: torch.dtype) -> bool:
    return all(torch.equal(block.to(dtype).to(block.dtype), block) for block in _blocks(weight))


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.reshape(-1).split(_BLOCK)


def _function(bias: bool, opset: int) -> Any:
    """Return the twin of `nomul::DenseLinear`: x [..., inputs], weight [rows, inputs] of 16-bit floats, bias [rows]."""
    b = Body(opset)
    x, weight = b.input("x"), b.input("weight")
    given = b.input("bias") if bias else None
    y = b.add("MatMul", x, b.add("Transpose", b.cast(weight, torch.float32), perm=[1, 0]))
    y = y if given is None else b.add("Add", y, given)
    doc = "x W^T + bias with W of 16-bit floats, by standard operators; activations stay float in every mode."
    return b.function(DOMAIN, "DenseLinear", "bias" if bias else "", y, ("mode",), doc)
