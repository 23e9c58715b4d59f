"""Operators of ONNX Runtime's own that language models contain: activations, norms, embeddings, products, codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import ir.ops  # noqa: F401  (registers nomul.quant_linear)
from frontend.onnx.arguments import axis_of, constant_of
from frontend.onnx.call import Call
from frontend.onnx.registry import operator
from frontend.onnx.values import as_tensor
from ir.ops.codes import group_count
from ir.ops.packing import pack_bits, packed_length, unpack_bits

_GRIDS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
_BITS = (2, 4, 8)


@operator("com.microsoft.Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x)


@operator("com.microsoft.BiasGelu")
def _bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@operator("com.microsoft.FastGelu")
def _fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("com.microsoft.QuickGelu")
def _quick_gelu(call: Call, x: Tensor) -> Tensor:
    alpha = call.real("alpha", 1.702)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("SimplifiedLayerNormalization", "com.microsoft.SimplifiedLayerNormalization")
def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> tuple[Tensor | None, ...]:
    """RMSNorm over the axes from `axis` on; the second result is one over the root of the mean square."""
    axis, epsilon = axis_of(call.integer("axis", -1), x.ndim), call.real("epsilon", 1e-5)
    found = _scaled_rms_norm(x, list(x.shape[axis:]), scale, epsilon)
    return (found, _inverse_root(x, axis, epsilon) if any(call.wanted[1:]) else None)[: call.outputs]


@operator("com.microsoft.SkipSimplifiedLayerNormalization")
def _skip_rms_norm(
    call: Call, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """RMSNorm of a sum, which is the fourth result; the third is one over the root of the mean square."""
    if (*call.wanted, False)[1]:
        raise call.refuse("it has a mean, which this norm does not compute")
    total, epsilon = _total(x, skip, bias), call.real("epsilon", 1e-12)
    inverse = _inverse_root(total, total.ndim - 1, epsilon) if any(call.wanted[2:3]) else None
    return (_scaled_rms_norm(total, [total.shape[-1]], gamma, epsilon), None, inverse, total)[: call.outputs]


@operator("com.microsoft.SkipLayerNormalization")
def _skip_layer_norm(
    call: Call, x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """LayerNorm of a sum, which is the fourth result; the second and third are its mean and inverse deviation."""
    total, epsilon = _total(x, skip, bias), call.real("epsilon", 1e-12)
    found = F.layer_norm(total, [total.shape[-1]], gamma, beta, epsilon)
    if not any(call.wanted[1:3]):
        return (found, None, None, total)[: call.outputs]
    variance, mean = torch.var_mean(total.float(), -1, correction=0, keepdim=True)
    return (found, mean, torch.rsqrt(variance + epsilon), total)[: call.outputs]


def _total(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    return x + skip if bias is None else x + skip + bias


def _scaled_rms_norm(x: Tensor, shape: list[Any], scale: Tensor, epsilon: float) -> Tensor:
    """Return RMSNorm over the last axes; a scale may have fewer of them, and a type of its own, the result's."""
    if list(scale.shape) == shape and scale.dtype == x.dtype:
        return F.rms_norm(x, shape, scale, epsilon)
    wide = F.rms_norm(x.float(), shape, None, epsilon) * scale
    return wide.to(scale.dtype)


def _inverse_root(x: Tensor, axis: int, epsilon: float) -> Tensor:
    return torch.rsqrt(x.float().square().mean(list(range(axis, x.ndim)), keepdim=True) + epsilon)


@operator("com.microsoft.EmbedLayerNormalization")
def _embed(
    call: Call,
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """LayerNorm of the sum of three embeddings; further results are the ones in each mask, and the sum."""
    if (segments is None) != (kinds is None):
        raise call.refuse("it has segments without an embedding for them, or the reverse")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    total = F.embedding(ids, words) + F.embedding(positions, places)
    if segments is not None and kinds is not None:
        total = total + F.embedding(segments, kinds)
    found = F.layer_norm(total, [total.shape[-1]], gamma, beta, call.real("epsilon", 1e-12))
    if mask is None:
        ones = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
    else:
        ones = (mask == 1).sum(1, dtype=torch.int32)
    return (found, ones, total)[: call.outputs]


@operator("com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")
def _fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """alpha a b; transBatch: the first dim is the one before the last, and the dims between move up."""
    left, right = _turned(call, a, "A"), _turned(call, b, "B")
    return _times(torch.matmul(left, right), call.real("alpha", 1.0))


def _turned(call: Call, x: Tensor, which: str) -> Tensor:
    if x.ndim < 2:
        return x
    if call.flag(f"transBatch{which}"):
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if call.flag(f"trans{which}") else x


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


# By the name of what FusedGemm applies to its result, with the parameters alpha and beta of that.
_AFTER: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "Relu": lambda x, a, b: torch.relu(x),
    "LeakyRelu": lambda x, a, b: F.leaky_relu(x, a),
    "Sigmoid": lambda x, a, b: torch.sigmoid(x),
    "Tanh": lambda x, a, b: torch.tanh(x),
    "Elu": lambda x, a, b: F.elu(x, a),
    "HardSigmoid": lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0),
    "Softplus": lambda x, a, b: F.softplus(x),
    "Softsign": lambda x, a, b: F.softsign(x),
    "ThresholdedRelu": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
}
_WITH_ALPHA, _WITH_BETA = ("LeakyRelu", "Elu", "HardSigmoid", "ThresholdedRelu"), ("HardSigmoid",)


@operator("com.microsoft.FusedGemm")
def _fused_gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """An activation of alpha a b + beta c, each matrix turned or not."""
    kind, alpha, beta = call.text("activation", ""), call.real("alpha", 1.0), call.real("beta", 1.0)
    if kind and kind not in _AFTER:
        raise call.refuse(f"its activation is {kind}")
    if (kind in _WITH_ALPHA and not call.has("activation_alpha")) or (
        kind in _WITH_BETA and not call.has("activation_beta")
    ):
        raise call.refuse(f"its activation {kind} has no parameters")
    left, weight = a.t() if call.flag("transA") else a, b if call.flag("transB") else b.t()
    found = _times(F.linear(left, weight), alpha)
    if c is not None and beta != 0:
        biased = alpha == beta == 1 and c.ndim == 1 and c.shape[0] == weight.shape[0]
        found = F.linear(left, weight, c) if biased else found + _times(c, beta)
    if not kind:
        return found
    return _AFTER[kind](found, call.real("activation_alpha", 0.0), call.real("activation_beta", 0.0))


@operator("com.microsoft.DequantizeLinear")
def _dequantise(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(x - zero) scale, with one scale and zero point for all or for each place of `axis`, which is 1 by default."""
    if x.dtype not in _GRIDS:
        raise call.refuse(f"its input has type {x.dtype}")
    # Differences of numbers of 32 bits need more digits than float32 has.
    wide = x.to(torch.int64 if x.dtype == torch.int32 else torch.int32)
    if zero is not None:
        wide = wide - _along(call, zero, x).to(wide.dtype)
    return wide.to(scale.dtype) * _along(call, scale, x)


def _along(call: Call, value: Tensor, x: Tensor) -> Tensor:
    """Return numbers so that they broadcast over x: one for all, or one for each place of an axis."""
    if value.numel() == 1:
        return value.reshape(())
    axis = axis_of(call.integer("axis", 1), x.ndim)
    if value.ndim != 1 or not 0 <= axis < x.ndim:
        raise call.refuse(f"its scale or zero point has rank {value.ndim}, its axis is {axis} of {x.ndim}")
    return value.reshape([-1 if d == axis else 1 for d in range(x.ndim)])


@operator("com.microsoft.MatMulNBits", raw=True)
def _matmul_bits(
    call: Call, x: Any, blocks: Any, scales: Any, zeros: Any = None, order: Any = None, bias: Any = None
) -> Tensor:
    """x W^T + bias, W = (code - zero) scale; as codes where float16 holds the scales exactly, else as a computed W.

    blocks: uint8 [N, G, bytes of a block], codes low bits first; scales: [N, G] or flat; zeros: uint8 as packed, or
    floats, by default 2**(bits-1). Activations are taken as they are, also where the model lets a runtime round them.
    """
    bits, block = call.integer("bits", 4), call.integer("block_size", 0)
    rows, width = call.integer("N", 0), call.integer("K", 0)
    groups = group_count(width, block) if block > 0 else 0
    _check_bits(call, bits, block, order, blocks, (rows, groups, block * bits // 8))
    stored = constant_of(blocks)
    if stored is None:
        raise call.unknown("its weight")
    with _disable_current_modes():
        codes = unpack_bits(stored.reshape(rows, -1), bits, groups * block)[:, :width].contiguous()
        packed = pack_bits(codes, bits)
    points = _zero_points(call, zeros, bits, rows, groups)
    halves = _as_halves(scales, rows, groups)
    if halves is not None and (points is None or points.dtype == torch.uint8):
        args = (as_tensor(x), packed, halves, points, as_tensor(bias), bits, block)
        found: Tensor = torch.ops.nomul.quant_linear(*args)
        return found
    weight = _dequantised(codes, as_tensor(scales).reshape(rows, groups), points, bits, block)
    return F.linear(as_tensor(x), weight, as_tensor(bias))


def _check_bits(call: Call, bits: int, block: int, order: Any, blocks: Any, expected: tuple[int, ...]) -> None:
    if bits not in _BITS:
        raise call.refuse(f"its codes have {bits} bits")
    if block < 16 or block & (block - 1):
        raise call.refuse(f"its blocks have {block} inputs, which is no power of two from 16 on")
    if order is not None:
        raise call.refuse("it has g_idx, which assigns inputs to groups in another order")
    if call.integer("weight_prepacked", 0):
        raise call.refuse("its weight is packed for one kind of processor")
    sizes = tuple(blocks.shape) if isinstance(blocks, Tensor) else ()
    if sizes != expected or blocks.dtype != torch.uint8:
        raise call.refuse(f"its weight must be uint8 {list(expected)}, and is {list(sizes)}")


def _zero_points(call: Call, zeros: Any, bits: int, rows: int, groups: int) -> Tensor | None:
    """Return zero points as a bit stream [N, bytes], or as floats [N, G] where they are such."""
    with _disable_current_modes():
        constant = constant_of(zeros)
        if constant is not None and constant.dtype == torch.uint8:
            length = packed_length(groups, bits)
            if constant.numel() != rows * length:
                raise call.refuse(f"its zero points have {constant.numel()} bytes instead of {rows * length}")
            # Packed anew so that bits past the last zero point are 0.
            return pack_bits(unpack_bits(constant.reshape(rows, length), bits, groups), bits)
        if constant is not None and _are_codes(constant, bits):
            return pack_bits(constant.reshape(rows, groups).to(torch.uint8), bits)
    if zeros is None:
        return None
    if not isinstance(zeros, Tensor) or not zeros.is_floating_point():
        raise call.unknown("its zero points")
    return zeros.reshape(rows, groups)


def _are_codes(values: Tensor, bits: int) -> bool:
    return bool(((values >= 0) & (values < 2**bits) & (values == values.round())).all())


def _as_halves(scales: Any, rows: int, groups: int) -> Tensor | None:
    """Return scales as float16 [N, G], None where that loses digits, or would lose them for all that is known."""
    constant = constant_of(scales)
    if constant is not None:
        with _disable_current_modes():
            halves = constant.reshape(rows, groups).to(torch.float16)
            return halves if torch.equal(halves.double(), constant.reshape(rows, groups).double()) else None
    return scales.reshape(rows, groups) if scales.dtype == torch.float16 else None


def _dequantised(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: int) -> Tensor:
    """Return the weight [N, K] as computed from constant codes [N, K] and scales [N, G]."""
    rows, width = codes.shape
    groups = group_count(width, block)
    with _disable_current_modes():
        filled = F.pad(codes, (0, groups * block - width)).reshape(rows, groups, block).to(torch.int16)
        if zeros is None:
            filled = filled - 2 ** (bits - 1)
        elif zeros.dtype == torch.uint8:
            filled = filled - unpack_bits(zeros, bits, groups).to(torch.int16).unsqueeze(-1)
        filled = filled.to(torch.int8) if bits < 8 else filled
    steps = filled.to(scales.dtype)
    if zeros is not None and zeros.dtype != torch.uint8:
        steps = steps - zeros.to(scales.dtype).unsqueeze(-1)
    return (steps * scales.unsqueeze(-1)).reshape(rows, groups * block)[:, :width]
