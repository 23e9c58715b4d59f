"""Tiny seeded programs built by hand, for tests that need a graph but no model."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import ir.ops  # noqa: F401 - registers the nomul operators
from ir.params import MemorySource, ParamStore
from ir.program import ORIGIN, PATH, TYPE, Program
from ir.types import ScalarType, TensorType, ValueType

aten, nomul = torch.ops.aten, torch.ops.nomul
F32, I64 = torch.float32, torch.int64


def hidden(*tail: int, dtype: torch.dtype = F32) -> TensorType:
    """Return the type of an activation: [batch, seq, *tail]."""
    return TensorType(dtype, ("batch", "seq", *tail))


class Sketch:
    """A program being put together line by line, every node typed as it is made."""

    def __init__(self, seed: int = 0) -> None:
        self.graph, self.tensors = fx.Graph(), {}
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        """Return a seeded tensor N(0, 0.2)."""
        return (torch.randn(shape, generator=self._generator) * 0.2).to(dtype)

    def bytes(self, *shape: int) -> torch.Tensor:
        """Return seeded bytes."""
        return torch.randint(0, 256, shape, generator=self._generator, dtype=torch.uint8)

    def param(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Add a parameter and return its node."""
        self.tensors[name] = tensor
        node = self.graph.create_node("get_attr", name)
        node.meta = {TYPE: TensorType(tensor.dtype, tuple(tensor.shape))}
        return node

    def input(self, name: str, kind: ValueType) -> fx.Node:
        """Add an input and return its node."""
        node = self.graph.placeholder(name)
        node.meta = {TYPE: kind}
        return node

    def call(self, target: Any, *args: Any, type: ValueType, path: str = "", by: str = "", **kwargs: Any) -> fx.Node:
        """Add a call and return its node."""
        name = str(target.__name__).partition(".")[0]
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta = {TYPE: type, **({PATH: path} if path else {}), **({ORIGIN: by} if by else {})}
        return node

    def program(self, *outputs: fx.Node, ties: dict[str, str] | None = None, **fields: Any) -> Program:
        """Return the finished program that returns `outputs`."""
        self.graph.output(tuple(outputs))
        params = ParamStore()
        params.add_source(MemorySource(self.tensors))
        for alias, name in (ties or {}).items():
            params.tie(alias, name)
        return Program(self.graph, params, **{"symbols": ("batch", "seq"), **fields})


def tiny_mlp_program(
    blocks: int = 2, width: int = 16, inner: int = 32, vocab: int = 40, dtype: torch.dtype = F32, seed: int = 0
) -> Program:
    """Return embedding, `blocks` gated MLPs with norms and residuals, final norm and a head tied to the embedding.

    One input [batch, seq] of token ids below `vocab`; one output [batch, seq, vocab].
    """
    s = Sketch(seed)
    embed = s.param("model.embed_tokens.weight", s.random(vocab, width, dtype=dtype))
    weights = [_mlp_params(s, k, width, inner, dtype) for k in range(blocks)]
    final = s.param("model.norm.weight", 1 + s.random(width, dtype=dtype))
    ids = s.input("input_ids", hidden(dtype=I64))
    h = s.call(aten.embedding.default, embed, ids, type=hidden(width, dtype=dtype), path="model.embed_tokens")
    for k, (norm, gate, up, down) in enumerate(weights):
        path = f"model.layers.{k}"
        wide, narrow = hidden(inner, dtype=dtype), hidden(width, dtype=dtype)
        n = s.call(aten.rms_norm.default, h, [width], norm, 1e-06, type=narrow, path=f"{path}.norm")
        g = s.call(aten.linear.default, n, gate, type=wide, path=f"{path}.gate_proj")
        a = s.call(aten.silu.default, g, type=wide, path=f"{path}.act")
        u = s.call(aten.linear.default, n, up, type=wide, path=f"{path}.up_proj")
        m = s.call(aten.mul.Tensor, a, u, type=wide, path=path)
        d = s.call(aten.linear.default, m, down, type=narrow, path=f"{path}.down_proj")
        h = s.call(aten.add.Tensor, h, d, type=narrow, path=path)
    last = s.call(aten.rms_norm.default, h, [width], final, 1e-06, type=hidden(width, dtype=dtype), path="model.norm")
    logits = s.call(aten.linear.default, last, embed, type=hidden(vocab, dtype=dtype), path="lm_head")
    return s.program(logits, ties={"lm_head.weight": "model.embed_tokens.weight"}, name="tiny-mlp")


def _mlp_params(s: Sketch, block: int, width: int, inner: int, dtype: torch.dtype) -> tuple[fx.Node, ...]:
    stem = f"model.layers.{block}"
    return (
        s.param(f"{stem}.norm.weight", 1 + s.random(width, dtype=dtype)),
        s.param(f"{stem}.gate_proj.weight", s.random(inner, width, dtype=dtype)),
        s.param(f"{stem}.up_proj.weight", s.random(inner, width, dtype=dtype)),
        s.param(f"{stem}.down_proj.weight", s.random(width, inner, dtype=dtype)),
    )


def odd_program() -> Program:
    """Return a program with one of everything the text form knows: sizes, tuples, dtypes, devices, lists, origins.

    Inputs x [batch, seq, 8] and y [seq]; outputs of several dtypes and one size.
    """
    s = Sketch(1)
    weight = s.param("odd name.weight", s.random(8, 8))
    s.param("unread.buffer", torch.arange(4))
    x, y = s.input("x", hidden(8)), s.input("y", TensorType(F32, ("seq",)))
    size = s.call(aten.sym_size.int, x, 1, type=ScalarType("int", "seq"))
    more = s.call(
        torch.sym_max,
        s.call(operator.add, size, 1, type=ScalarType("int", "seq+1")),
        2,
        type=ScalarType("int", "Max(2, seq+1)"),
    )
    top = s.call(aten.topk.default, x, 3, type=(hidden(3), hidden(3, dtype=I64)), by="fold")
    values = s.call(operator.getitem, top, 0, type=hidden(3))
    indices = s.call(operator.getitem, top, 1, type=hidden(3, dtype=I64), path="a.0", by="fold")
    ramp = s.call(
        aten.arange.start_step, 0, size, 1, type=TensorType(I64, ("seq",)), dtype=I64, device=torch.device("cpu")
    )
    mask = s.call(aten.full.default, [size, 4], -float("inf"), type=TensorType(F32, ("seq", 4)), layout=torch.strided)
    picked = s.call(aten.index.Tensor, x, [None, ramp], type=hidden(8))
    halves = s.call(aten.split.Tensor, picked, 4, -1, type=(hidden(4), hidden(4)))
    joined = s.call(aten.cat.default, [s.call(operator.getitem, halves, 1, type=hidden(4)), values], -1, type=hidden(7))
    out = s.call(aten.linear.default, x, weight, None, type=hidden(8))
    act = s.call(aten.gelu.default, out, approximate="tanh", type=hidden(8), path='quoted "path"', by="a pass")
    half = s.call(aten._to_copy.default, act, type=hidden(8, dtype=torch.bfloat16), dtype=torch.bfloat16)
    flat = s.call(aten.clone.default, half, type=half.meta[TYPE], memory_format=torch.contiguous_format)
    return s.program(
        *(joined, indices, mask, flat, y, more),
        name="odd one",
        facts=frozenset({"canonical", "b"}),
        history=("canon", 'fold{norms=true, text="x"}'),
        attributes={"cache": {"layers": 2}, "note": "ü\n"},
    )


def compressed_program(width: int = 20, rows: int = 12, group: int = 8) -> Program:
    """Return rope, a shift-add linear with offsets (3 planes, 2 terms) and a 3-bit linear with zeros, as passes leave.

    Inputs x [batch, 2, seq, width], cos and sin [1, 1, seq, width]; output [batch, 2, seq, 8]. Group does not divide
    width, so the last group is ragged.
    """
    s, planes, terms, bits = Sketch(2), 3, 2, 3
    groups, heads = -(-width // group), ("batch", 2, "seq")
    second = -(-rows // group)
    shift = [
        s.param("q.signs", s.bytes(planes, rows, -(-width // 8))),
        s.param("q.scales", s.bytes(rows, -(-groups * planes * terms // 2))),
        s.param("q.exponents", torch.full((rows, 2), -3, dtype=torch.int8)),
        s.param("q.offsets", s.bytes(rows, -(-groups * terms // 2))),
        s.param("q.bias", s.random(rows)),
    ]
    quant = [
        s.param("o.codes", s.bytes(8, -(-rows * bits // 8))),
        s.param("o.scales", s.random(8, second, dtype=torch.float16)),
        s.param("o.zeros", s.bytes(8, -(-second * bits // 8))),
    ]
    x = s.input("x", TensorType(F32, (*heads, width)))
    cos, sin = (s.input(n, TensorType(F32, (1, 1, "seq", width))) for n in ("cos", "sin"))
    turned = s.call(nomul.rope.default, x, cos, sin, False, type=x.meta[TYPE], path="layers.0.rope", by="canon")
    wide, narrow = TensorType(F32, (*heads, rows)), TensorType(F32, (*heads, 8))
    hid = s.call(
        nomul.shiftadd_linear.default, turned, *shift, group, terms, type=wide, path="layers.0.q", by="shiftadd"
    )
    out = s.call(nomul.quant_linear.default, hid, *quant, None, bits, group, type=narrow, path="layers.0.o", by="quant")
    return s.program(out, name="compressed", level="compressed")
