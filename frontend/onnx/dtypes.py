"""ONNX's element types and torch's."""

from __future__ import annotations

import onnx_ir as onnx
import torch

_T = onnx.DataType
_DTYPES = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.BOOL: torch.bool,
    _T.COMPLEX64: torch.complex64,
    _T.COMPLEX128: torch.complex128,
}


def torch_dtype(number: int) -> torch.dtype | None:
    """Return the dtype of an ONNX type's number, None where torch has none with ordinary arithmetic."""
    try:
        return _DTYPES.get(_T(number))
    except ValueError:
        return None
