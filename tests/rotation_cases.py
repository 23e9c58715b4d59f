"""Models whose weights show a wrong rotation, and how the tests of `rotate` read what it did."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from frontend.canonical import canonicalise
from frontend.hf import skeleton, trace
from ir.analysis import LinearSite, blocks, linear_sites
from ir.edit import Editor
from ir.ops.hadamard import hadamard_matrix
from ir.program import Program
from ir.verify import verify
from passes.base import Context, Log
from passes.fold import Fold
from passes.rotate import Rotate
from tests.architectures import (
    VOCAB,
    bind,
    doubled,
    ids_for,
    prefill_and_decode,
    randomise,
    relative_error,
    traced,
)

aten, nomul = torch.ops.aten, torch.ops.nomul
F64 = torch.float64


@cache
def shaped(width: int, heads: int, shared: int, inner: int) -> Program:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        num_hidden_layers=1,
        vocab_size=VOCAB,
        attention_bias=True,
        mlp_bias=True,
    )
    return bound(config, f"llama{width}")


def bound(config: Any, name: str) -> Program:
    program = trace(config, name)
    canonicalise(program)
    model = skeleton(config, program.attributes["attention"])
    randomise(model)
    bind(program, model.state_dict())
    return program


def nasty(program: Program) -> Program:
    """A float64 copy whose weights span twelve decades within every row, rows scaled back to unit norm."""
    wide, generator = doubled(program), torch.Generator().manual_seed(11)
    for name in linear_weights(wide):
        weight = wide.params.get(name)
        scales = 10.0 ** (12 * torch.rand(weight.shape, generator=generator, dtype=F64) - 6)
        Editor(wide, "test").param(name, torch.nn.functional.normalize(weight * scales, dim=-1))
    return wide


def folded(name: str, layers: int = 2) -> Program:
    """A tiny model in float64 without gains, its weights spread over twelve decades within every row."""
    program = doubled(traced(name, layers)[0])
    Fold().run(program, Context())
    return nasty(program)


def linear_weights(program: Program) -> list[str]:
    return [s.weight for s in linear_sites(program, program.graph.nodes)[0]]


def sites_of(program: Program) -> list[LinearSite]:
    return linear_sites(program, [n for b in blocks(program) for n in b.nodes])[0]


def rotated(program: Program, pass_: Rotate | None = None) -> tuple[Program, Log]:
    """A rotated copy, verified by running it on fake tensors, and what the pass said."""
    copy, log = program.clone(), Log("rotate")
    (pass_ or Rotate()).run(copy, Context(log=log))
    verify(copy, full=True)
    return copy, log


def ops(program: Program) -> list[fx.Node]:
    return list(program.calls(nomul.hadamard))


def turn_matrix(signs: Tensor, order: int) -> Tensor:
    """H D, block diagonal, in float64."""
    h = torch.block_diag(*[hadamard_matrix(order).double()] * (signs.numel() // order))
    return h * (signs.double() * 2 - 1)


def error(found: Program, wanted: Program) -> float:
    return relative_error(prefill_and_decode(found, ids_for()), prefill_and_decode(wanted, ids_for()))


def rotated_in_double(program: Program, **options: Any) -> tuple[Program, Program]:
    wide = doubled(program)
    return rotated(wide, Rotate(**options))[0], wide
