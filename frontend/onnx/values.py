"""What a value is while an ONNX graph is run for tracing: a tensor, whole numbers known by then, a list, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Whole numbers of so many entries at most are kept apart from tensors: shapes, axes and the like.
MOST_INTS = 64


@dataclass(frozen=True)
class Ints:
    """Whole numbers or truth values that are known when a model is imported, or are sizes of its inputs.

    ONNX computes shapes with tensors; kept as numbers, what depends on sizes stays symbolic. values: int or SymInt, one
    for rank 0; rank: 0 or 1.
    """

    values: tuple[Any, ...]
    rank: int = 1
    dtype: torch.dtype = torch.int64

    def tensor(self) -> Tensor:
        """Return the same as a tensor."""
        if all(isinstance(v, int) for v in self.values):
            # A constant made while tracing would be a call in the program, and a write into it besides.
            with _disable_current_modes():
                found = torch.tensor(list(self.values), dtype=self.dtype)
                return found[0] if self.rank == 0 else found
        found = torch.stack([torch.scalar_tensor(v, dtype=self.dtype) for v in self.values])
        return found[0] if self.rank == 0 else found


Value = Tensor | Ints | list[Any] | None


def as_tensor(value: Any) -> Any:
    """Return a value with known numbers as a tensor; sequences stay lists of tensors, what is absent stays None."""
    if isinstance(value, Ints):
        return value.tensor()
    return [as_tensor(v) for v in value] if isinstance(value, list) else value


def entries(constant: Tensor) -> list[Any]:
    """Return the entries of a constant as Python numbers, without the trace in progress seeing it."""
    with _disable_current_modes():
        found: list[Any] = constant.reshape(-1).tolist()
    return found


def known_ints(tensor: Tensor) -> Ints | None:
    """Return a constant tensor as known numbers where it is one of few whole numbers or truth values."""
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    if not whole or tensor.ndim > 1 or tensor.numel() > MOST_INTS:
        return None
    kind = bool if tensor.dtype == torch.bool else int
    return Ints(tuple(kind(v) for v in entries(tensor)), tensor.ndim, tensor.dtype)


def sizes(values: Sequence[Any]) -> Ints:
    """Return sizes as a vector."""
    return Ints(tuple(values))
