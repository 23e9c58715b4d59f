"""Tensors of an ONNX model as torch's, read when they are asked for."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from frontend.onnx.dtypes import torch_dtype
from ir.errors import UnsupportedError
from ir.types import TensorType

# Types narrower than a byte, and floats of a byte, which torch computes with as wider ones.
_WIDER = {"int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8}


def tensor_of(stored: Any) -> torch.Tensor:
    """Return an onnx_ir tensor as torch's, whole numbers of fewer than 8 bits in 8; raises UnsupportedError."""
    array = stored.numpy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array.view(np.int16), copy=True)).view(torch.bfloat16)
    wider = _WIDER.get(array.dtype.name)
    if wider is None and torch_dtype(int(stored.dtype)) is None:
        raise UnsupportedError(
            f"a constant has type {stored.dtype.name}", where=str(stored.name), why="no tensor here has that type"
        )
    # Copied: what is mapped from a file may be read-only, or not aligned.
    return torch.from_numpy(np.array(array, dtype=wider or array.dtype, copy=True))


class OnnxSource:
    """Initializers of a model by name; data in other files stays there until it is asked for."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        """Return the names of all initializers."""
        return tuple(self._tensors)

    def type_of(self, name: str) -> TensorType:
        """Return an initializer's type, from its header."""
        stored = self._tensors[name]
        dtype = torch_dtype(int(stored.dtype))
        assert dtype is not None
        return TensorType(dtype, tuple(int(d) for d in stored.shape))

    def initializer(self, name: str) -> str:
        """Return what the model calls an initializer."""
        return str(self._tensors[name].name)

    def stored_bytes(self, name: str) -> int:
        """Return the bytes an initializer takes in its file."""
        return int(self._tensors[name].nbytes)

    def load(self, name: str) -> torch.Tensor:
        """Return an initializer."""
        return tensor_of(self._tensors[name])
