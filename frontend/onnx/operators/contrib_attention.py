"""Attention and rotary positions as ONNX Runtime's own operators have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

import ir.ops  # noqa: F401  (registers nomul.rope)
from frontend.onnx.caches import SLOTS
from frontend.onnx.call import Call
from frontend.onnx.registry import operator
from frontend.onnx.values import Ints, as_tensor

# What GroupQueryAttention takes after its mandatory inputs, in order.
_GROUPED = (
    "cos_cache",
    "sin_cache",
    "position_ids",
    "attention_bias",
    "head_sink",
    "k_scale",
    "v_scale",
    "q_norm_weight",
    "k_norm_weight",
    "query_seqlens",
)


@operator("com.microsoft.RotaryEmbedding")
def _rotary(call: Call, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels turned by angles; positions: [batch, tokens], or [1] for that of the first token.

    x: [batch, heads, tokens, width], or [batch, tokens, heads * width]; tables: [positions, r/2], r <= width.
    """
    if call.real("scale", 1.0) != 1.0:
        raise call.refuse("it has a scale, which ONNX Runtime leaves unused")
    if call.flag("is_packed_batching"):
        raise call.refuse("its batch is packed into one row")
    width, flat = 2 * cos.shape[1], x.ndim == 3
    if flat:
        partial = call.integer("rotary_embedding_dim", 0) > 0
        heads = call.integer("num_heads", 0) if partial else x.shape[2] // width
        if heads < 1:
            raise call.refuse("it rotates a part of each head, and does not say how many heads there are")
        x = x.unflatten(2, (heads, -1)).transpose(1, 2)
    if positions.ndim < 2:
        positions = positions.reshape(()) + torch.arange(x.shape[2], device=x.device)
    turned = _turned(x, positions, cos, sin, call.flag("interleaved"))
    return turned.transpose(1, 2).flatten(2) if flat else turned


def _turned(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """Return x [batch, heads, tokens, width] turned by the angles of positions [batch, tokens] or [tokens]."""
    tables = [F.embedding(positions, table) for table in (cos, sin)]
    wide = [t.repeat_interleave(2, -1) if pairs else torch.cat([t, t], -1) for t in tables]
    # Four dims, as programs traced from torch models have them: what fuses rotations looks for these.
    angles = [t.unsqueeze(1) if t.ndim == 3 else t.unsqueeze(0).unsqueeze(0) for t in wide]
    found: Tensor = torch.ops.nomul.rope(x, *angles, pairs)
    return found


@operator("com.microsoft.GroupQueryAttention", raw=True)
def _grouped(
    call: Call,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    lengths: Any,
    total: Any,
    *more: Any,
) -> tuple[Tensor, ...]:
    """Causal attention of new tokens to those of a cache, which fill it, and to themselves; all rows as long.

    The cache comes out longer by the new tokens. Without key, query holds the three side by side.
    """
    given = dict(zip(_GROUPED, map(as_tensor, more), strict=False))
    _check_grouped(call, given)
    query, key, value = as_tensor(query), as_tensor(key), as_tensor(value)
    heads, shared = call.integer("num_heads", 0), call.integer("kv_num_heads", 0)
    if key is None or value is None:
        width = query.shape[2] // (heads + 2 * shared)
        query, key, value = query.split([heads * width, shared * width, shared * width], 2)
    q, k, v = _heads(query, heads), _heads(key, shared), _heads(value, shared)
    if k.shape[2] != q.shape[2] or v.shape[2] != q.shape[2]:
        raise call.refuse("it has new keys for other tokens than queries")
    rows = _rows(call, past_key, q, lengths, total)
    q, k = _normed(call, q, given, "q"), _normed(call, k, given, "k")
    if call.flag("do_rotary"):
        positions = _positions(given.get("position_ids"), past_key, q, rows)
        tables, pairs = (given.get("cos_cache"), given.get("sin_cache")), call.flag("rotary_interleaved")
        if tables[0] is None or tables[1] is None:
            raise call.refuse("it has no tables of cosines and sines")
        q, k = (_turned(x, positions, tables[0], tables[1], pairs) for x in (q, k))
    k, v = _kept(past_key, k, rows.before), _kept(past_value, v, rows.before)
    sink = given.get("head_sink")
    if sink is None and call.integer("smooth_softmax", -1) == 1:
        sink = torch.zeros(heads, dtype=q.dtype, device=q.device)
    found = _attended(
        (q, k, v),
        call.real("scale", 0.0),
        call.flag("causal", True),
        given.get("attention_bias"),
        window=call.integer("local_window_size", -1),
        cap=call.real("softcap", 0.0),
        sink=sink,
        rows=rows,
    )
    return (_flat(found), k, v)


def _check_grouped(call: Call, given: dict[str, Any]) -> None:
    refused = {
        "sliding_window_cache": "its cache drops old tokens",
        "qk_output": "it gives its scores as well",
    }
    for name, why in refused.items():
        if call.flag(name):
            raise call.refuse(why)
    if any(call.wanted[3:]):
        raise call.refuse("it gives its scores as well")
    coded = any(call.text(name, "NONE") != "NONE" for name in ("k_quant_type", "v_quant_type"))
    if coded or given.get("k_scale") is not None or given.get("v_scale") is not None:
        raise call.refuse("its cache holds codes")
    if given.get("query_seqlens") is not None:
        raise call.refuse("its rows differ in length")
    window = call.integer("local_window_size", -1)
    if window == 0 or (window > 0 and not call.flag("causal", True)):
        raise call.refuse(f"it attends to a window of {window} tokens")


@dataclass(frozen=True)
class _Rows:
    """How the rows of a batch fill their cache: all alike, unless one of these is given.

    before: how many tokens each has in it, [batch], the rest being room; mask: which slots count, [batch, keys].
    """

    before: Tensor | None = None
    mask: Tensor | None = None


def _rows(call: Call, past_key: Tensor | None, q: Tensor, lengths: Any, total: Any) -> _Rows:
    """Return how rows fill their cache; refuses one with room in it whose length would depend on data."""
    if call.flag(SLOTS):
        return _Rows(mask=as_tensor(lengths))
    past = 0 if past_key is None else past_key.shape[2]
    length = past + q.shape[2]
    known = [v for given, extra in ((lengths, 1), (total, 0)) for v in _known(given, extra)]
    if isinstance(length, int) and any(v != length for v in known):
        raise call.refuse(f"its cache and new tokens are {length}, of which it takes {known}")
    if isinstance(past, int) and past > 0 and not (isinstance(length, int) and known):
        raise call.refuse(f"its cache has room for {past} tokens, and data tells how many it has")
    if past_key is None or isinstance(lengths, Ints):
        return _Rows()
    if not call.flag("causal", True):
        raise call.refuse("its rows may differ in length, and it is not causal")
    return _Rows(before=(as_tensor(lengths).reshape(-1) + 1 - q.shape[2]).clamp(min=0))


def _kept(past: Tensor | None, new: Tensor, before: Tensor | None) -> Tensor:
    """Return a cache [batch, heads, keys, width] with new tokens at its end, or where each row's own end is."""
    if past is None or before is None:
        return _joined(past, new)
    room = F.pad(past, (0, 0, 0, new.shape[2]))
    places = before.unsqueeze(1) + torch.arange(new.shape[2], device=new.device)
    return room.scatter(2, places[:, None, :, None].expand_as(new), new)


def _known(given: Any, extra: int) -> list[int]:
    return [v + extra for v in given.values if isinstance(v, int)] if isinstance(given, Ints) else []


def _normed(call: Call, x: Tensor, given: dict[str, Any], which: str) -> Tensor:
    """Return heads after RMSNorm of each, where queries or keys have a gain for it."""
    gain = given.get(f"{which}_norm_weight")
    if gain is None:
        return x
    epsilon = call.real(f"{which}_norm_epsilon", call.real("qk_norm_epsilon", 1e-6))
    return F.rms_norm(x, [x.shape[-1]], gain, epsilon)


def _positions(given: Tensor | None, past_key: Tensor | None, q: Tensor, rows: _Rows) -> Tensor:
    """Return the positions of new tokens; without a cache, all count from the one that is given first."""
    steps = torch.arange(q.shape[2], device=q.device)
    if past_key is None:
        return steps if given is None else given.reshape(-1)[:1] + steps
    if given is not None:
        return given
    return steps + (past_key.shape[2] if rows.before is None else rows.before.unsqueeze(1))


@operator("com.microsoft.MultiHeadAttention")
def _multi_head(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_length: Tensor | None = None,
    beams: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Attention of [batch, tokens, heads * width]; keys of four dims are a whole cache, those of five hold values too.

    mask: numbers above 0 for keys that count, or how many of the first do; others have `mask_filter_value` added.
    """
    if past_length is not None or beams is not None:
        raise call.refuse("its cache is not full, or shared by beams")
    if any(call.wanted[3:]):
        raise call.refuse("it gives its scores as well")
    count = call.integer("num_heads", 0)
    q, k, v = _three(call, query, key, value)
    if bias is not None:
        widths = [q.shape[2], *(x.shape[2] if x.ndim == 3 else x.shape[1] * x.shape[3] for x in (k, v))]
        parts = bias.split(widths)
        q, k, v = (x + b if x.ndim == 3 else x for x, b in zip((q, k, v), parts, strict=True))
    cached = k.ndim == 4
    q, k, v = (x if x.ndim == 4 else _heads(x, count) for x in (q, k, v))
    if call.flag("unidirectional") and (cached or k.shape[2] != q.shape[2]):
        raise call.refuse("it is causal, and has new keys for other tokens than queries")
    k, v = _joined(past_key, k), _joined(past_value, v)
    scores = _added(call, mask, added, q, k)
    found = _attended((q, k, v), call.real("scale", 0.0), call.flag("unidirectional"), scores)
    return (_flat(found), k, v)


def _three(call: Call, query: Tensor, key: Tensor | None, value: Tensor | None) -> Sequence[Tensor]:
    """Return queries, keys and values taken apart: [batch, tokens, heads, 2 or 3, width] holds several."""
    if query.ndim == 5 and key is None:
        return [x.flatten(2) for x in query.unbind(3)]
    if key is not None and key.ndim == 5 and value is None:
        return [query, *(x.flatten(2) for x in key.unbind(3))]
    if query.ndim != 3 or key is None or value is None or key.ndim not in (3, 4) or value.ndim != key.ndim:
        raise call.refuse("its queries, keys and values are not laid out in a way that is known")
    return query, key, value


@operator("com.microsoft.Attention")
def _packed(
    call: Call,
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    added: Tensor | None = None,
    past_length: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Self-attention with its first projection; weights: [inputs, queries | keys | values], past: [2, batch, ...]."""
    if call.flag("do_rotary"):
        raise call.refuse("it turns queries and keys by angles that it does not have")
    if past_length is not None or call.flag("past_present_share_buffer"):
        raise call.refuse("its cache is not full")
    count, widths = call.integer("num_heads", 0), call.integers("qkv_hidden_sizes") or [weights.shape[1] // 3] * 3
    projected = F.linear(x, weights.t(), bias)
    q, k, v = (_heads(part, count) for part in projected.split(widths, 2))
    if past is not None:
        before = past.unbind(0)
        k, v = _joined(before[0], k), _joined(before[1], v)
    scores = _added(call, mask, added, q, k)
    found = _flat(_attended((q, k, v), call.real("scale", 0.0), call.flag("unidirectional"), scores))
    return (found, torch.stack([k, v])) if any(call.wanted[1:]) else (found,)


def _added(call: Call, mask: Tensor | None, added: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to scores [batch, heads, tokens, keys] for a mask and a bias."""
    if mask is None:
        return added
    if mask.ndim == 1:
        if mask.shape[0] != q.shape[0]:
            raise call.refuse("its mask tells where rows begin, or is that of a packed batch")
        counts: Tensor = torch.arange(k.shape[2], device=q.device) < mask.unsqueeze(1)
    elif mask.ndim in (2, 3):
        counts = mask > 0
    else:
        raise call.refuse(f"its mask has rank {mask.ndim}")
    counts = counts[:, None] if counts.ndim == 3 else counts[:, None, None]
    least = call.real("mask_filter_value", -10000.0)
    masked = torch.where(counts, 0.0, least).to(q.dtype)
    return masked if added is None else masked + added


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return [batch, tokens, heads * width] as [batch, heads, tokens, width]."""
    found: Tensor = x.unflatten(2, (heads, -1))
    return found.transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _joined(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], 2)


def _attended(
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    causal: bool,
    added: Tensor | None,
    *,
    window: int = -1,
    cap: float = 0.0,
    sink: Tensor | None = None,
    rows: _Rows | None = None,
) -> Tensor:
    """Return attention of the last tokens of a sequence to all of it; heads of queries may share keys.

    scale: 0 for 1/sqrt(width); window: how many tokens each sees, itself included; cap: scores become
    cap tanh(scores / cap) before anything is added; sink: a further score for each head, without a value.
    """
    q, k, v = qkv
    shared, factor = k.shape[1] != q.shape[1], scale or None
    rows = rows or _Rows()
    alike = rows.before is None and rows.mask is None
    whole = causal and alike and window < 0 and statically_known_true(q.shape[2] == k.shape[2])
    if whole and added is None and not cap and sink is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=factor, enable_gqa=shared)
    seen = _counted(_seen(q, k, window, rows.before) if causal else None, rows.mask)
    if not cap and sink is None:
        mask = _masked(added, seen)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=factor, enable_gqa=shared)
    if shared:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = torch.tanh(scores / cap) * cap if cap else scores
    scores = scores if added is None else scores + added
    scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
    if sink is None:
        return torch.matmul(torch.softmax(scores, -1), v)
    column = sink.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.matmul(torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1], v)


def _seen(q: Tensor, k: Tensor, window: int, before: Tensor | None = None) -> Tensor:
    """Return whether tokens see keys, [tokens, keys]: their own and those before, in a window if there is one.

    before: where rows differ, how many keys each has before these tokens; the result is then [batch, 1, tokens, keys].
    """
    keys = torch.arange(k.shape[2], device=q.device)
    steps = torch.arange(q.shape[2], device=q.device).unsqueeze(1)
    own = steps + (k.shape[2] - q.shape[2]) if before is None else steps + before[:, None, None, None]
    earlier = keys <= own
    return earlier if window < 0 else earlier & (keys > own - window)


def _counted(seen: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Return which keys tokens see, [batch, 1, tokens or 1, keys], after those whose slot a mask does not count."""
    if mask is None:
        return seen
    counts = (mask != 0)[:, None, None]
    return counts if seen is None else seen & counts


def _masked(added: Tensor | None, seen: Tensor | None) -> Tensor | None:
    if added is None or seen is None:
        return seen if added is None else added
    return added.masked_fill(~seen, -math.inf)
