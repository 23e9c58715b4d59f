"""Rules that raise decomposed structure to the operators passes know: linears, norms, activations, rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from frontend.decomposed import decomposed
from frontend.transposed import transposed
from ir import ops as _ops  # noqa: F401  (registers the nomul operators the rules emit)
from ir.builder import Builder
from ir.program import Program
from ir.rewrite import No, RewriteLog, Rules

aten, nomul = torch.ops.aten, torch.ops.nomul
linears, norms, activations = Rules("linears"), Rules("norms"), Rules("activations")
rotary, attention, experts = Rules("rotary"), Rules("attention"), Rules("experts")


def raise_structure(program: Program) -> RewriteLog:
    """Apply all raising rules to a program without no-ops; returns what fired and what declined."""
    _register_experts()
    logs = [
        rules.apply(program, "canonical")
        for rules in (decomposed, linears, norms, activations, rotary, attention, experts)
    ]
    return RewriteLog(sum((log.hits for log in logs), ()), sum((log.refusals for log in logs), ()))


@linears(
    lambda x, w, bias, inner, outer: aten.view(aten.addmm(bias, aten.view(x, inner), w), outer),
    params="w bias",
)
def conv1d_to_linear(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node, inner: Any, outer: Any) -> fx.Node | No:
    """reshape(reshape(x) W + b) is a linear over the last dim when only leading dims were merged (GPT-2's Conv1D)."""
    source, result = b.type(x), b.type(b.root)
    if source.dims[:-1] != result.dims[:-1]:
        return No("the reshapes around the product do not cancel")
    turned = transposed(b, w)
    return turned if isinstance(turned, No) else b.call(aten.linear, x, turned, bias, like=b.root)


@linears(lambda x, w, bias: aten.addmm(bias, x, w), params="w bias")
def addmm_to_linear(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node) -> fx.Node | No:
    """b + x W is a linear with the weight turned."""
    turned = transposed(b, w)
    return turned if isinstance(turned, No) else b.call(aten.linear, x, turned, bias, like=b.root)


@linears(
    lambda x, w: aten.matmul(x, aten.numpy_T(w)),
    lambda x, w: aten.matmul(x, aten.t(w)),
    lambda x, w: aten.matmul(x, aten.transpose(w, 0, 1)),
    lambda x, w: aten.matmul(x, aten.permute(w, [1, 0])),
    params="w",
)
def product_with_transpose(b: Builder, x: fx.Node, w: fx.Node) -> fx.Node:
    """x W^T written out is a linear (Falcon)."""
    return b.call(aten.linear, x, w, like=b.root)


@linears(lambda x, w, bias: aten.add(aten.linear(x, w), bias), params="w bias", sole=True)
def bias_into_linear(b: Builder, x: fx.Node, w: fx.Node, bias: fx.Node) -> fx.Node | No:
    """A vector added to a linear's result is its bias."""
    if b.type(bias).dims != b.type(w).dims[:1]:
        return No("the sum is not with one value per output", bias)
    return b.call(aten.linear, x, w, bias, like=b.root)


@norms(
    lambda x, eps: aten.mul(x, aten.rsqrt(aten.add(aten.mean(aten.pow(x, 2), [-1], True), eps))),
    lambda x, eps: aten.mul(x, aten.pow(aten.add(aten.mean(aten.pow(x, 2), [-1], True), eps), -0.5)),
    lambda x, eps: aten.div(x, aten.sqrt(aten.add(aten.mean(aten.pow(x, 2), [-1], True), eps))),
    consts="eps",
)
def plain_rms_norm(b: Builder, x: fx.Node, eps: float) -> fx.Node | No:
    """x / sqrt(mean(x^2) + eps) is RMSNorm without a gain (1910.07467, eq. 4)."""
    width = b.type(x).dims[-1]
    if not isinstance(width, int):
        return No("the normalised dim is dynamic", x)
    return b.call(aten.rms_norm, x, [width], None, float(eps), like=b.root)


@norms(lambda x, gain, shape, eps: aten.mul(aten.rms_norm(x, shape, None, eps), gain), consts="eps")
def rms_norm_with_gain(b: Builder, x: fx.Node, gain: fx.Node, shape: Any, eps: float) -> fx.Node | No:
    """A per-channel product after a plain RMSNorm is its gain, stored or computed as in 1 + w."""
    if not isinstance(gain, fx.Node) or b.type(gain).dims != tuple(shape):
        return No("the factor is not one value per normalised channel")
    return b.call(aten.rms_norm, x, list(shape), gain, eps, like=b.root)


@norms(lambda x, gain, shape, eps: aten.rms_norm(aten.sub(x, aten.mean(x, [-1], True)), shape, gain, eps))
def centred_rms_norm(b: Builder, x: fx.Node, gain: Any, shape: Any, eps: Any) -> fx.Node | No:
    """RMSNorm of x - mean(x) is LayerNorm without a shift (1607.06450, eq. 4), as Cohere spells it."""
    if len(shape) != 1:
        return No("the mean is over one dim, the norm over several", x)
    return b.call(aten.layer_norm, x, list(shape), gain, None, eps, like=b.root)


@norms(lambda x, gain, shape, eps: aten.mul(aten.layer_norm(x, shape, None, None, eps), gain), consts="eps")
def layer_norm_with_gain(b: Builder, x: fx.Node, gain: fx.Node, shape: Any, eps: float) -> fx.Node | No:
    """A per-channel product after a plain LayerNorm is its gain."""
    if not isinstance(gain, fx.Node) or b.type(gain).dims != tuple(shape):
        return No("the factor is not one value per normalised channel")
    return b.call(aten.layer_norm, x, list(shape), gain, None, eps, like=b.root)


@activations(
    lambda x: aten.mul(
        aten.mul(x, 0.5),
        aten.add(aten.tanh(aten.mul(aten.add(x, aten.mul(aten.pow(x, 3.0), 0.044715)), 0.7978845608028654)), 1.0),
    ),
)
def tanh_gelu(b: Builder, x: fx.Node) -> fx.Node:
    """The tanh form of GELU written out (1606.08415, section 2)."""
    return b.call(aten.gelu, x, approximate="tanh", like=b.root)


@rotary(
    lambda x, cos, sin, lo, hi, mid, end: aten.add(
        aten.mul(x, cos),
        aten.mul(aten.cat([aten.neg(aten.slice(x, 3, mid, end)), aten.slice(x, 3, lo, hi)], -1), sin),
    ),
    consts="lo hi mid end",
)
def rope_halves(
    b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, lo: int, hi: int, mid: int, end: int
) -> fx.Node | No:
    """x cos + [-x2, x1] sin is rotary embedding with pairs (i, i + d/2) (2104.09864, eq. 34, in GPT-NeoX's order)."""
    width = b.type(x).dims[-1]
    if not (isinstance(width, int) and lo == 0 and hi == mid == width // 2 and end >= width):
        return No("the halves do not pair channel i with i + d/2", x)
    return _rope(b, x, cos, sin, False)


@rotary(
    lambda x, cos, sin, shape, end0, end1: aten.add(
        aten.mul(x, cos),
        aten.mul(
            aten.view(aten.stack([aten.neg(aten.slice(x, 3, 1, end1, 2)), aten.slice(x, 3, 0, end0, 2)], -1), shape),
            sin,
        ),
    ),
    lambda x, cos, sin, shape, end0, end1: aten.add(
        aten.mul(x, cos),
        aten.mul(
            aten.flatten(aten.stack([aten.neg(aten.slice(x, 3, 1, end1, 2)), aten.slice(x, 3, 0, end0, 2)], -1), shape),
            sin,
        ),
    ),
)
def rope_neighbours(
    b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, shape: Any, end0: int, end1: int
) -> fx.Node | No:
    """The same with pairs (2i, 2i + 1): RoFormer's own order, as in GPT-J, Cohere and GLM."""
    width = b.type(x).dims[-1]
    if not isinstance(width, int) or min(end0, end1) < width:
        return No("the slices do not run over all channels", x)
    return _rope(b, x, cos, sin, True)


def _rope(b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool) -> fx.Node | No:
    width = b.type(x).dims[-1]
    if b.type(cos).dims[-1] != width or b.type(sin).dims[-1] != width or len(b.type(x).dims) != 4:
        return No("cosine and sine do not cover the channels", cos)
    return b.call(nomul.rope, x, cos, sin, interleaved, like=b.root)


@rotary(
    lambda x, cos, sin, order, start, width, end: aten.cat(
        [nomul.rope(aten.slice(x, 3, 0, width), cos, sin, order), aten.slice(x, 3, start, end)], -1
    ),
    consts="width start end order",
)
def partial_rope(
    b: Builder, x: fx.Node, cos: fx.Node, sin: fx.Node, order: bool, start: int, width: int, end: int
) -> fx.Node | No:
    """Rotating the first r channels and appending the rest is one partial rotation."""
    if start != width or end < b.type(x).dims[-1]:  # type: ignore[operator]
        return No("the tail is not all of the channels that were not rotated", x)
    return b.call(nomul.rope, x, cos, sin, order, like=b.root)


@attention(
    lambda q, k, v, mask, p, causal, scale, ks, kr, vs, vr: aten.scaled_dot_product_attention(
        q,
        aten.reshape(aten.expand(aten.unsqueeze(k, 2), ks), kr),
        aten.reshape(aten.expand(aten.unsqueeze(v, 2), vs), vr),
        mask,
        p,
        causal,
        scale=scale,
    ),
)
def grouped_query_attention(
    b: Builder, q: Any, k: Any, v: Any, mask: Any, p: Any, causal: Any, scale: Any, ks: Any, kr: Any, vs: Any, vr: Any
) -> fx.Node | No:
    """Attention over keys and values repeated per query group is grouped-query attention (2305.13245)."""
    heads, shared = b.type(q).dims[1], b.type(k).dims[1]
    if not (isinstance(heads, int) and isinstance(shared, int) and heads % shared == 0):
        return No("query heads are no multiple of key heads", k)
    if b.type(v).dims[1] != shared or any(_repeats(s) != heads // shared for s in (ks, vs)):
        return No("keys and values are not repeated alike", v)
    return b.call(
        aten.scaled_dot_product_attention, q, k, v, mask, p, causal, scale=scale, enable_gqa=True, like=b.root
    )


def _repeats(shape: Any) -> Any:
    return shape[2] if isinstance(shape, (list, tuple)) and len(shape) == 5 else None


def _register_experts() -> None:
    """Enter the rule for transformers' expert product, whose operator exists once transformers is imported."""
    foreign = getattr(getattr(torch.ops, "transformers", None), "grouped_mm_fallback", None)
    if foreign is None or experts.rules:
        return

    @experts(lambda x, w, ends: foreign(x, aten.transpose(w, -2, -1), ends), params="w")
    def grouped_product(b: Builder, x: fx.Node, w: fx.Node, ends: fx.Node) -> fx.Node:
        """A product per span of rows that belong to one expert, weights stored outputs-first."""
        return b.call(nomul.grouped_linear, x, w, ends, like=b.root)
