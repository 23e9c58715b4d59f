"""Attention and what goes with it: rotary positions, attention with a state, causal convolution with a state."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from frontend.onnx.call import Call
from frontend.onnx.registry import operator

# Where Attention gives its scores, as counted among its outputs.
_SCORES = 3
# Tokens that attention with a state goes through one by one, at most.
_LONGEST = 256
_HALVES = (torch.float16, torch.bfloat16)


@operator("Attention")
def _attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Inputs are [batch, heads, tokens, width], or [batch, tokens, heads * width]; valid: keys that count, by batch."""
    if (past_key is None) != (past_value is None):
        raise call.refuse("of the past keys and the past values only one is given")
    if past_key is not None and valid is not None:
        raise call.refuse("it is given both past keys and how many keys count")
    if not q.ndim == k.ndim == v.ndim or q.ndim not in (3, 4):
        raise call.refuse(f"its inputs have ranks {q.ndim}, {k.ndim} and {v.ndim}, not all 3 or all 4")
    flat = q.ndim == 3
    if flat:
        q = _heads(call, q, "q_num_heads")
        k, v = _heads(call, k, "kv_num_heads"), _heads(call, v, "kv_num_heads")
    before: Any = 0
    if past_key is not None and past_value is not None:
        before = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    written = call.real("softcap", 0.0) > 0 or sum(call.wanted[_SCORES:]) or not _usual_precision(call, q.dtype)
    attend = _attend_written if written else _attend
    y, scores = attend(call, q, k, v, mask, before, valid)
    return y.transpose(1, 2).flatten(2) if flat else y, k, v, scores


def _heads(call: Call, x: Tensor, name: str) -> Tensor:
    """Return [batch, tokens, heads * width] as [batch, heads, tokens, width]."""
    count = call.integer(name, 0)
    if count <= 0:
        raise call.refuse(f"with inputs of rank 3 its attribute {name} must be given")
    apart: Tensor = x.unflatten(-1, (count, -1))
    return apart.transpose(1, 2)


def _usual_precision(call: Call, dtype: torch.dtype) -> bool:
    """Return whether the softmax is taken in the type of the inputs, or in float32 for halves, as torch does."""
    if not call.has("softmax_precision"):
        return True
    asked = call.dtype("softmax_precision")
    return asked == dtype or (asked == torch.float32 and dtype in _HALVES)


def _attend(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, before: Any, valid: Tensor | None
) -> tuple[Tensor, None]:
    """Return attention as one operator, whose causal mask has query 0 see key 0 as ONNX's has without a past."""
    left, right = _window(call)
    plain = right == 0 and left < 0 and mask is None and valid is None and isinstance(before, int) and before == 0
    seen = None if plain else _bias(call, mask, _allowed(call, q, k, before, valid), q, k)
    scale = call.real("scale", 0.0) if call.has("scale") else None
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=plain, scale=scale, enable_gqa=grouped), None


def _attend_written(
    call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, before: Any, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return attention step by step, and the scores of the stage that is asked for; a query without keys gives 0."""
    if q.shape[1] != k.shape[1]:
        groups, rest = divmod(q.shape[1], k.shape[1])
        if rest:
            raise call.refuse(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(call.real("scale", 0.0) if call.has("scale") else 1 / math.sqrt(q.shape[-1]))
    raw = torch.matmul(q * root, k.transpose(-1, -2) * root)
    cap = call.real("softcap", 0.0)
    capped = torch.tanh(raw / cap) * cap if cap > 0 else raw
    seen = _bias(call, mask, _allowed(call, q, k, before, valid), q, k)
    if seen is None:
        biased = capped
    else:
        biased = capped.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else capped + seen
    shares = torch.softmax(biased.to(call.dtype("softmax_precision", q.dtype)), -1)
    if seen is not None:
        blind = ~seen.any(-1, True) if seen.dtype == torch.bool else seen.amax(-1, True) == -math.inf
        shares = shares.masked_fill(blind, 0.0)
    shares = shares.to(q.dtype)
    stages, stage = (raw, capped, biased, shares), call.integer("qk_matmul_output_mode", 0)
    if not 0 <= stage < len(stages):
        raise call.refuse(f"its attribute qk_matmul_output_mode is {stage}")
    return torch.matmul(shares, v), stages[stage]


def _window(call: Call) -> tuple[int, int]:
    """Return how many keys before and after its own position a query sees, -1 for all."""
    left, right = call.integer("left_window_size", -1), call.integer("right_window_size", -1)
    if min(left, right) < -1:
        raise call.refuse("a side of its window is below -1")
    return left, 0 if call.flag("is_causal") else right


def _allowed(call: Call, q: Tensor, k: Tensor, before: Any, valid: Tensor | None) -> Tensor | None:
    """Return which keys each query may see by their positions, None for all: [tokens, keys], with a batch for `valid`.

    The first query stands at position `before`, or where its batch's valid keys end with the last query.
    """
    left, right = _window(call)
    queries, keys = q.shape[2], k.shape[2]
    place = torch.arange(keys, device=q.device)
    ends = None if valid is None else valid.reshape(-1, 1, 1, 1)
    last_only = right == 0 and left < 0 and ends is None and statically_known_true(queries == 1)
    if (left < 0 and right < 0) or (last_only and statically_known_true(keys == before + 1)):
        return None if ends is None else place < ends
    first = before if ends is None else ends - queries
    ahead = torch.arange(queries, device=q.device).unsqueeze(1) + first - place
    parts = [ahead >= -right] if right >= 0 else []
    parts += [ahead <= left] if left >= 0 else []
    parts += [place < ends] if ends is not None else []
    found = parts[0]
    for part in parts[1:]:
        found = found & part
    return found


def _bias(call: Call, mask: Tensor | None, allowed: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return a mask and the allowed keys as one mask, true where a key is seen, or added to scores."""
    if mask is None:
        return allowed
    if mask.ndim == 0:
        raise call.refuse("its mask has rank 0")
    truth = mask.dtype == torch.bool
    mask = mask if truth else mask.to(q.dtype)
    short = k.shape[2] - mask.shape[-1]
    if not statically_known_true(short == 0):
        mask = F.pad(mask, (0, short), value=False if truth else -math.inf)
    if mask.ndim in (1, 3):
        mask = mask.unsqueeze(0)
    if allowed is None:
        return mask
    return mask & allowed if truth else torch.where(allowed, mask, -math.inf)


@operator("ai.onnx.preview.FlexAttention")
def _flex_attention(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32 for shorter types, as long as no graph changes its scores or shares."""
    if call.has("score_mod") or call.has("prob_mod"):
        raise call.refuse("a graph changes its scores or its shares")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise call.refuse(f"its inputs have ranks {q.ndim}, {k.ndim} and {v.ndim}, not 4")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if call.dtype("softmax_precision", dtype) != dtype:
        raise call.refuse("its softmax is asked for in another type than float32, or float64 for float64")
    scale = call.real("scale", 0.0) if call.has("scale") else None
    y = F.scaled_dot_product_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.to(v.dtype)


@operator("RotaryEmbedding")
def _rotary(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Pairs of channels are turned by angles: (i, i + r/2) of the first r, or neighbours; the tables have r/2 columns.

    x: [batch, heads, tokens, width], or [batch, tokens, heads * width]; tables: [positions, r/2], or, without
    positions, [batch, tokens, r/2]. Source: RoFormer (2104.09864), eq. 34.
    """
    flat = x.ndim == 3
    if flat:
        x = _heads(call, x, "num_heads")
    width = call.integer("rotary_embedding_dim", 0) or x.shape[-1]
    if cos.shape[-1] * 2 != width or sin.shape[-1] * 2 != width:
        raise call.refuse(f"its tables have {cos.shape[-1]} and {sin.shape[-1]} columns for {width} channels")
    if positions is not None:
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    pairs = call.flag("interleaved")
    cos, sin = _both(cos, pairs).unsqueeze(1), _both(sin, pairs).unsqueeze(1)
    part = statically_known_true(width < x.shape[-1])
    turned = x[..., :width] if part else x
    if pairs:
        quarter = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    else:
        quarter = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    y = turned * cos + quarter * sin
    if part:
        y = torch.cat([y, x[..., width:]], -1)
    return y.transpose(1, 2).flatten(2) if flat else y


def _both(table: Tensor, pairs: bool) -> Tensor:
    """Return a table with a column for each channel; pairs: the two channels of a pair lie side by side."""
    return torch.stack([table, table], -1).flatten(-2) if pairs else torch.cat([table, table], -1)


@operator("LinearAttention")
def _linear_attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys write values into a state [batch, heads, key width, value width] that queries read, token by token.

    The state may decay before a token, and a delta rule writes beta times what a value has beyond what its key reads.
    """
    rule = call.text("update_rule", "gated_delta")
    if rule not in ("linear", "gated", "delta", "gated_delta"):
        raise call.refuse(f"its rule {rule} is not known")
    if (decay is not None) != ("gated" in rule) or (beta is not None) != ("delta" in rule):
        raise call.refuse(f"its inputs decay and beta do not go with the rule {rule}")
    count = q.shape[1]
    if not isinstance(count, int) or count > _LONGEST:
        raise call.refuse(
            f"it goes through tokens one by one, at most {_LONGEST} of a number known at import, not {count}"
        )
    dtype, kept = q.dtype, q.dtype if past is None else past.dtype
    q = _heads(call, q, "q_num_heads").float()
    k, v = _heads(call, k, "kv_num_heads").float(), _heads(call, v, "kv_num_heads").float()
    groups, rest = divmod(q.shape[1], k.shape[1])
    if rest:
        raise call.refuse(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    # With one column more for what is constant along the other widths: [batch, heads, tokens, 1 or key width].
    fade = None if decay is None else torch.exp(_heads(call, decay, "kv_num_heads").float())
    rate = None if beta is None else beta.float().transpose(1, 2).unsqueeze(-1)
    state = q.new_zeros(k.shape[0], k.shape[1], k.shape[3], v.shape[3]) if past is None else past.float()
    rows = list[Tensor]()
    for t in range(count):
        key, value = k[:, :, t].unsqueeze(-1), v[:, :, t].unsqueeze(-2)
        if fade is not None:
            state = state * fade[:, :, t].unsqueeze(-1)
        if rate is not None:
            value = rate[:, :, t].unsqueeze(-1) * (value - torch.matmul(key.transpose(-1, -2), state))
        state = state + key * value
        read = state.repeat_interleave(groups, 1) if groups > 1 else state
        rows.append(torch.matmul(q[:, :, t].unsqueeze(-2), read))
    scale = call.real("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    y = torch.cat(rows, 2) * scale
    return y.transpose(1, 2).flatten(2).to(dtype), state.to(kept)


@operator("CausalConvWithState")
def _causal_conv(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel is convolved with what came before: zeros, or the last inputs [batch, channels, taps - 1]."""
    if x.ndim != 3 or weight.ndim != 3:
        raise call.refuse(f"its input has rank {x.ndim} and its weight rank {weight.ndim}, not 3")
    form = call.text("activation", "none")
    if form not in ("none", "silu", "swish"):
        raise call.refuse(f"its activation {form} is not known")
    rows = F.pad(x, (weight.shape[2] - 1, 0)) if past is None else torch.cat([past, x], 2)
    y = F.conv1d(rows, weight, bias, groups=x.shape[1])
    return y if form == "none" else F.silu(y), rows[:, :, x.shape[2] :]
