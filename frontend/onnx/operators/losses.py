"""Losses of classes: how unlikely the right ones are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from frontend.onnx.call import Call
from frontend.onnx.operators.products import as_type
from frontend.onnx.registry import operator

# No class has this number, so that without `ignore_index` nothing is left out.
_NO_CLASS = -(2**62)


def _loss(call: Call, logs: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Return the weighted negative logs at the target's classes, which stand along axis 1, and their sum or mean."""
    reduction = call.text("reduction", "mean")
    if reduction not in ("none", "sum", "mean"):
        raise call.refuse(f"its reduction is {reduction}")
    ignored = call.integer("ignore_index", _NO_CLASS)
    return functional.nll_loss(logs, as_type(target, torch.int64), weight, ignore_index=ignored, reduction=reduction)


@operator("NegativeLogLikelihoodLoss")
def _negative_log_likelihood(call: Call, logs: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return _loss(call, logs, target, weight)


@operator("SoftmaxCrossEntropyLoss")
def _softmax_cross_entropy(
    call: Call, scores: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and the logarithms of the classes' probabilities."""
    logs = functional.log_softmax(scores, 1)
    return _loss(call, logs, target, weight), logs
