"""Activation functions, normalised exponentials, and dropout as it is where nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frontend.onnx.arguments import axis_of, constant_of, number_of
from frontend.onnx.call import Call
from frontend.onnx.operators.arithmetic import wrapping
from frontend.onnx.registry import operator
from frontend.onnx.values import as_tensor

_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Softsign": F.softsign,
}
# Constants of Selu as ONNX has them, in 32 bits, since version 6.
_SELU = (1.67326319217681884765625, 1.05070102214813232421875)


def _enter_all() -> None:
    def one(function: Callable[[Tensor], Tensor]) -> Any:
        return lambda call, x: function(x)

    for name, function in _ONE.items():
        operator(name)(one(function))


_enter_all()


@operator("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.real("alpha", 0.01))


@operator("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.real("alpha", 1.0))


@operator("Celu")
def _celu(call: Call, x: Tensor) -> Tensor:
    return F.celu(x, call.real("alpha", 1.0))


@operator("Selu")
def _selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = _SELU if call.version >= 6 else (1.6732, 1.0507)
    alpha, gamma = call.real("alpha", alpha), call.real("gamma", gamma)
    if (alpha, gamma) == _SELU and x.dtype != torch.float64:
        return torch.selu(x)
    return torch.mul(F.elu(x, alpha), gamma)


@operator("PRelu")
def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    """The slope broadcasts to the input; before version 7 it is one number, or one for each entry of axis 1."""
    if call.version < 7 and slope.ndim == 1 and slope.shape[0] != 1:
        slope = slope.reshape([-1, *[1] * (x.ndim - 2)])
    if x.is_floating_point() and _per_channel(x, slope):
        return F.prelu(x, slope.reshape(-1))
    if not x.dtype.is_signed:
        return x
    return torch.where(x < 0, wrapping(torch.mul, x, slope), x)


def _per_channel(x: Tensor, slope: Tensor) -> bool:
    """Return whether a slope has one entry for each of axis 1; sizes that are not known are not asked."""
    if slope.ndim == 0 or slope.ndim != x.ndim - 1 or not all(isinstance(d, int) for d in (*slope.shape, x.shape[1])):
        return False
    return slope.shape[0] == x.shape[1] and all(d == 1 for d in slope.shape[1:])


@operator("ThresholdedRelu")
def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.real("alpha", 1.0), x, 0.0)


@operator("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(x * call.real("alpha", 0.2) + call.real("beta", 0.5), 0.0, 1.0)


@operator("Softplus")
def _softplus(call: Call, x: Tensor) -> Tensor:
    """Where torch returns its input as it is, the difference is below what the type can tell."""
    return F.softplus(x, threshold=40.0) if x.dtype == torch.float64 else F.softplus(x)


@operator("Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.text("approximate", "none"))


@operator("Swish")
def _swish(call: Call, x: Tensor) -> Tensor:
    return _gate(x, call.real("alpha", 1.0))


@operator("SwiGLU")
def _swi_glu(call: Call, gate: Tensor, x: Tensor) -> Tensor:
    return torch.mul(_gate(gate, call.real("alpha", 1.0)), x)


def _gate(x: Tensor, alpha: float) -> Tensor:
    return F.silu(x) if alpha == 1.0 else torch.mul(x, torch.sigmoid(torch.mul(x, alpha)))


@operator("Shrink")
def _shrink(call: Call, x: Tensor) -> Tensor:
    """What is within the limit becomes 0, the rest moves towards 0 by the bias; integers by way of 64-bit floats."""
    limit, bias = call.real("lambd", 0.5), call.real("bias", 0.0)
    wide = x if x.is_floating_point() else x.double()
    inner = torch.where(wide > limit, wide - bias, 0.0)
    return torch.where(wide < -limit, wide + bias, inner).to(x.dtype)


@operator("Softmax")
def _softmax(call: Call, x: Tensor) -> Tensor:
    return _along(call, x, torch.softmax)


@operator("LogSoftmax")
def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return _along(call, x, torch.log_softmax)


@operator("Hardmax")
def _hardmax(call: Call, x: Tensor) -> Tensor:
    """One where the first of the largest entries is, zero elsewhere."""
    return _along(call, x, lambda rows, axis: torch.zeros_like(rows).scatter(axis, rows.argmax(axis, keepdim=True), 1))


def _along(call: Call, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply a function along an axis; before version 13, to rows that hold that axis and all after it."""
    if call.version >= 13:
        return function(x, call.integer("axis", -1))
    axis = axis_of(call.integer("axis", 1), x.ndim)
    if axis == x.ndim - 1:
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)


@operator("Dropout", raw=True)
def _dropout(call: Call, x: Any, ratio: Any = None, training: Any = None) -> Any:
    """Outside of training nothing is dropped, and the mask is true everywhere."""
    if call.version < 7 and not call.flag("is_test"):
        raise call.refuse("it is used for training, as is_test is not set")
    if training is not None and number_of(call, training, "training_mode") and not _is_zero(call, ratio):
        raise call.refuse("it is used for training")
    if len(call.wanted) < 2 or not call.wanted[1]:
        return x
    if call.version < 12:
        raise call.refuse("before version 12 its mask is not defined outside of training")
    return x, torch.ones_like(as_tensor(x), dtype=torch.bool)


def _is_zero(call: Call, ratio: Any) -> bool:
    return ratio is not None and constant_of(ratio) is not None and number_of(call, ratio, "its ratio") == 0
