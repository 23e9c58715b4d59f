"""Uniform codes for ONNX Runtime's own operator, `com.microsoft::MatMulNBits`.

Measured with ONNX Runtime 1.32 on a CPU: float activations need float32 scales; levels of accuracy other than 4 compute
in float32; 4 rounds activations to 8 bits a group, save for 2 bits in groups of 16 or 256, which stay in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from backends.onnxruntime.emitter import CONTRIB, Emitter
from ir.ops.codes import group_count
from ir.ops.packing import pack_bits, packed_length, unpack_bits
from ir.ops.quant import QuantCodes
from ir.rewrite import No

NAME = "MatMulNBits"
_BITS = (2, 4, 8)
_SMALLEST, _LARGEST_OF_TWO_BITS = 16, 256


def refuses_contrib(codes: QuantCodes) -> No | None:
    """Return why MatMulNBits cannot take codes, or None when it can."""
    if codes.bits not in _BITS:
        return No(f"{NAME} takes 2, 4 or 8 bits, and these are {codes.bits}")
    if codes.group < _SMALLEST or codes.group & (codes.group - 1):
        return No(f"{NAME} takes groups of a power of two from {_SMALLEST} on, and these are of {codes.group} inputs")
    if codes.bits == 2 and _block(codes) > _LARGEST_OF_TWO_BITS:
        return No(f"{NAME} takes 2 bits in groups of at most {_LARGEST_OF_TWO_BITS}, and these are of {codes.group}")
    return None


def _block(codes: QuantCodes) -> int:
    """Return the inputs of a block: a group, or the least power of two that holds a row with a single group."""
    return min(codes.group, max(_SMALLEST, 1 << (codes.in_features - 1).bit_length()))


def blocks(codes: QuantCodes) -> Tensor:
    """Return the codes as MatMulNBits has them: uint8 [N, blocks, bytes], the last block filled up with zeros."""
    block, rows = _block(codes), codes.codes.shape[0]
    count = group_count(codes.in_features, block)
    values = pad(unpack_bits(codes.codes, codes.bits, codes.in_features), (0, count * block - codes.in_features))
    return pack_bits(values.reshape(rows, count, block), codes.bits)


def add_contrib(e: Emitter, codes: QuantCodes, x: Any, name: str, bias: fx.Node | None) -> Any:
    """Add x W^T + bias as one MatMulNBits; name: of the codes' parameter. The codes must not be refused."""
    rows, block = codes.codes.shape[0], _block(codes)
    count = group_count(codes.in_features, block)
    shape = (rows, count, packed_length(block, codes.bits))
    inputs = [
        x,
        e.initializer(f"{name}.blocks", shape, torch.uint8, lambda: blocks(codes)),
        e.initializer(f"{name}.scales", (rows, count), torch.float32, codes.scales.float),
        None,
        None,
        None if bias is None else e.value(bias),
    ]
    if (zeros := codes.zeros) is not None:
        inputs[3] = e.initializer(f"{name}.zeros", tuple(zeros.shape), torch.uint8, lambda: zeros)
    settings: dict[str, Any] = {"bits": codes.bits, "block_size": block, "accuracy_level": e.accuracy}
    return e.add(NAME, *inputs, domain=CONTRIB, K=codes.in_features, N=rows, **settings)
