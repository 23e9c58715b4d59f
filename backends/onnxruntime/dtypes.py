"""Element types: what torch, numpy and ONNX call the same thing."""

from __future__ import annotations

from typing import Any

import torch

from backends.onnxruntime.packages import package

# torch dtype -> name of the member of onnx_ir.DataType
_ONNX = {
    torch.float64: "DOUBLE",
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int16: "INT16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
}
# torch dtype -> numpy's name, for those that numpy has
_NUMPY = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


def onnx_dtype(dtype: torch.dtype) -> Any:
    """Return the `onnx_ir.DataType` of a torch dtype; raises KeyError for one that ONNX does not have."""
    return getattr(package("onnx_ir").DataType, _ONNX[dtype])


def numpy_name(dtype: torch.dtype) -> str:
    """Return numpy's name of a torch dtype; raises KeyError for one that numpy lacks, such as bfloat16."""
    return _NUMPY[dtype]
