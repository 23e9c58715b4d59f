"""Products of matrices: the general one with a bias, and sums of products by their letters."""

from __future__ import annotations

import torch
from torch import Tensor

from frontend.onnx.call import Call
from frontend.onnx.registry import operator

_WIDE = (torch.uint16, torch.uint32, torch.uint64)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a type; unlike a plain cast, one that has it leaves no call in the graph."""
    return x if x.dtype == dtype else x.to(dtype)


def _as_signed(x: Tensor) -> Tensor:
    """Return numbers of types that torch does not multiply as int64, whose products agree in the bits that count."""
    return x.to(torch.int64) if x.dtype in _WIDE else x


@operator("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha a b + beta c, each matrix turned or not; a linear map where it is one."""
    dtype = a.dtype
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    if not dtype.is_floating_point and not (alpha.is_integer() and beta.is_integer()):
        raise call.refuse(f"it scales whole numbers by {alpha} and {beta}")
    a, b = _as_signed(a), _as_signed(b)
    c = None if c is None or beta == 0 else _as_signed(c)
    left = a.t() if call.flag("transA") else a
    if alpha == 1 and beta == 1 and left is a:
        return as_type(_linear(a, b if call.flag("transB") else b.t(), c), dtype)
    product = _times(torch.matmul(left, b.t() if call.flag("transB") else b), alpha)
    return as_type(product if c is None else product + _times(c, beta), dtype)


def _linear(a: Tensor, weight: Tensor, c: Tensor | None) -> Tensor:
    """Return a linear map; what is added is its bias where it has an entry for each column, and no rows."""
    columns = weight.shape[0]
    if c is not None and c.ndim == 2 and c.shape[0] == 1 and c.shape[1] == columns:
        c = c.reshape(columns)
    if c is None or (c.ndim == 1 and c.shape[0] == columns):
        return torch.nn.functional.linear(a, weight, c)
    return torch.nn.functional.linear(a, weight) + c


def _times(x: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return x
    return x * (factor if x.is_floating_point() else int(factor))


@operator("Einsum")
def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return as_type(torch.einsum(call.text("equation", ""), *(_as_signed(x) for x in inputs)), inputs[0].dtype)
