"""Types of the values in a program: tensors with symbolic dims, scalars, and tuples of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Dim = int | str

# Keys of `node.meta` that belong to the IR; nothing else survives a dump and parse.
TYPE, PATH, ORIGIN = "type", "path", "origin"

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
_LONG = {short: dtype for dtype, short in _SHORT.items()}


def dtype_text(dtype: torch.dtype) -> str:
    """Return the short name of a dtype (`f32`), or raise KeyError for one the IR does not use."""
    return _SHORT[dtype]


def dtype_of_text(text: str) -> torch.dtype:
    """Return the dtype of a short name (`f32`), or raise KeyError."""
    return _LONG[text]


def is_dtype_text(text: str) -> bool:
    """Return whether `text` is the short name of a dtype."""
    return text in _LONG


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype and dims; a dim is an int or the text of a symbolic expression such as `seq` or `past+seq`."""

    dtype: torch.dtype
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{dtype_text(self.dtype)}[{','.join(str(d) for d in self.dims)}]"

    @property
    def static(self) -> bool:
        """Whether every dim is an int."""
        return all(isinstance(d, int) for d in self.dims)

    @property
    def nbytes(self) -> int:
        """Size in bytes; raises ValueError if a dim is symbolic."""
        if not self.static:
            raise ValueError(f"{self} has symbolic dims and so no size in bytes")
        n = self.dtype.itemsize
        for d in self.dims:
            n *= int(d)
        return n


@dataclass(frozen=True)
class ScalarType:
    """A Python number in the graph, usually a size: `kind` is `int`, `float` or `bool`, `expr` its symbolic text."""

    kind: str
    expr: str

    def __str__(self) -> str:
        return f"{self.kind}({self.expr})"


ValueType = TensorType | ScalarType | tuple["ValueType", ...] | None


def type_text(value: ValueType) -> str:
    """Return the text of a value type: `f32[batch,seq,64]`, `int(seq)`, `(f32[2],i64[2])`, or `none`."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"({', '.join(type_text(v) for v in value)})"
    return str(value)


def tensor_type(tensor: torch.Tensor) -> TensorType:
    """Return the type of a concrete tensor."""
    return TensorType(tensor.dtype, tuple(int(d) for d in tensor.shape))
