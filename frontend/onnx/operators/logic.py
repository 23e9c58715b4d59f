"""Truth values and comparisons, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frontend.onnx.call import Call
from frontend.onnx.operators.arithmetic import aligned, ordered
from frontend.onnx.registry import operator

_Two = Callable[[Tensor, Tensor], Tensor]

_TRUTHS: dict[str, _Two] = {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}
_COMPARISONS: dict[str, _Two] = {
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
}


def _enter_all() -> None:
    def truth(function: _Two) -> Any:
        return lambda call, a, b: function(a, aligned(call, a, b))

    def comparison(function: _Two) -> Any:
        return lambda call, a, b: function(ordered(a), ordered(aligned(call, a, b)))

    for name, function in _TRUTHS.items():
        operator(name)(truth(function))
    for name, function in _COMPARISONS.items():
        operator(name)(comparison(function))


_enter_all()


@operator("Not")
def _not(call: Call, x: Tensor) -> Tensor:
    return torch.logical_not(x)
