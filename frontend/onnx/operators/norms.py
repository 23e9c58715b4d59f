"""Normalization over features, groups of channels, batches and neighbours."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from frontend.onnx.arguments import axis_of
from frontend.onnx.call import Call
from frontend.onnx.operators.products import as_type
from frontend.onnx.registry import operator

_HALF = (torch.float16, torch.bfloat16)
# Keeps the quotient of a constant's deviations defined in MeanVarianceNormalization, as its definition says.
_LEAST_DEVIATION = 1e-9


def _fits(x: Tensor, shape: list[Any], *given: Tensor | None) -> bool:
    """Return whether parameters have the normalized axes' shape and the input's type, as torch's operators take."""
    return all(p is None or (list(p.shape) == shape and p.dtype == x.dtype) for p in given)


@operator("LayerNormalization")
def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Over the axes from `axis` on; further results are the mean and one over the deviation."""
    axis, epsilon = axis_of(call.integer("axis", -1), x.ndim), call.real("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    if _fits(x, shape, scale, bias):
        found = functional.layer_norm(x, shape, scale, bias, epsilon)
    else:
        found = functional.layer_norm(x, shape, None, None, epsilon) * scale
        found = found if bias is None else found + bias
    if not any(call.wanted[1:]):
        return (found, None, None)[: call.outputs]
    wide = as_type(x, call.dtype("stash_type", torch.float32))
    deviation, mean = torch.var_mean(wide, list(range(axis, x.ndim)), correction=0, keepdim=True)
    return (found, mean, torch.rsqrt(deviation + epsilon))[: call.outputs]


@operator("RMSNormalization")
def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    """Over the axes from `axis` on; the result has the scale's type."""
    axis, epsilon = axis_of(call.integer("axis", -1), x.ndim), call.real("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    if _fits(x, shape, scale):
        return functional.rms_norm(x, shape, scale, epsilon)
    return as_type(functional.rms_norm(x, shape, None, epsilon), scale.dtype) * scale


@operator("BatchNormalization")
def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """With the statistics given, as in inference."""
    training = call.flag("training_mode") or any(call.wanted[1:])
    if training or (call.version < 7 and not call.flag("is_test")):
        raise call.refuse("it takes its statistics from the batch, as in training")
    if call.version < 9 and not call.flag("spatial", True) and x.ndim != 2:
        raise call.refuse("it has statistics for every place, not only for every channel")
    given = (x, scale, bias, mean, variance)
    wide = reduce(torch.promote_types, (t.dtype for t in given))
    y, weight, shift, center, spread = (as_type(t, wide) for t in given)
    found = functional.batch_norm(y, center, spread, weight, shift, False, 0.0, call.real("epsilon", 1e-5))
    return as_type(found, x.dtype)


@operator("InstanceNormalization")
def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Each channel of each sample by itself, which is a group of one channel."""
    if not isinstance(x.shape[1], int):
        raise call.refuse("it does not say how many channels it has")
    return functional.group_norm(x, x.shape[1], scale, bias, call.real("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Before version 21, scale and bias have an entry for each group; from then on, for each channel."""
    groups, channels = call.integer("num_groups", 0), x.shape[1]
    if groups < 1:
        raise call.refuse(f"it has {groups} groups")
    if call.version < 21:
        scale, bias = (p.unsqueeze(1).expand(groups, channels // groups).reshape(channels) for p in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, call.real("epsilon", 1e-5))


@operator("LpNormalization")
def _lp_norm(call: Call, x: Tensor) -> Tensor:
    """By the norm along an axis; where that is 0, so is the result."""
    norm = torch.linalg.vector_norm(x, call.integer("p", 2), call.integer("axis", -1), True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("LRN")
def _local_response_norm(call: Call, x: Tensor) -> Tensor:
    """By the squares in a window of channels; one of even size reaches further forward, where torch's reaches back."""
    size = call.integer("size", 0)
    if size < 1:
        raise call.refuse(f"its window has size {size}")
    squares = (x * x).reshape(x.shape[0], 1, x.shape[1], -1)
    padded = functional.pad(squares, [0, 0, (size - 1) // 2, size // 2])
    mean = functional.avg_pool2d(padded, (size, 1), stride=1).reshape(x.shape)
    return x / (call.real("bias", 1.0) + call.real("alpha", 1e-4) * mean) ** call.real("beta", 0.75)


@operator("MeanVarianceNormalization")
def _mean_variance_norm(call: Call, x: Tensor) -> Tensor:
    axes = call.integers("axes", [0, 2, 3]) or []
    wide = x.float() if x.dtype in _HALF else x
    variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    return as_type((wide - mean) / (torch.sqrt(variance) + _LEAST_DEVIATION), x.dtype)
