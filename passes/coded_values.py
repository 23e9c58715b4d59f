"""Activations and caches as codes, for passes that train weights which then read them."""

from __future__ import annotations

from dataclasses import replace

from ir.program import Program
from passes.act import Act
from passes.base import Context
from passes.kv import Kv
from passes.presets import FLOAT


def code_values(program: Program, act: int, kv: int, skip: tuple[str, ...], ctx: Context) -> None:
    """Let linears and caches read codes, which training then sees, in place; bits of 16 leave them in float."""
    if act < FLOAT:
        Act(act, skip=skip).run(program, replace(ctx, log=ctx.log.of(Act.name)))
    if kv < FLOAT:
        Kv(kv).run(program, replace(ctx, log=ctx.log.of(Kv.name)))
