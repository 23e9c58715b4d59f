"""How the reference backend runs compressed linears: by decoded weights, by real shifts, or as stored."""

from __future__ import annotations

import torch
from torch import nn

from ir.errors import UsageError
from ir.ops.nested import nested_by_shifts
from ir.ops.shiftadd import shiftadd_by_shifts
from ir.ops.sparse import sparse_by_shifts
from ir.program import Program

MULTIPLY, SHIFT, CODES = "multiply", "shift", "codes"
DEFAULT_MODE = MULTIPLY
MODES = {
    MULTIPLY: "decode each weight once when loading, then run as fast as float (takes the memory of a float model)",
    SHIFT: "evaluate shift-add linears by additions and shifts (slow: it shows that no multiply is needed for them)",
    CODES: "decode each weight anew in every call, as the operators are defined (least memory)",
}
_BY_SHIFTS = (
    (torch.ops.nomul.shiftadd_linear, shiftadd_by_shifts),
    (torch.ops.nomul.nested_linear, nested_by_shifts),
    (torch.ops.nomul.sparse_shiftadd_linear, sparse_by_shifts),
)


def executable(program: Program, mode: str = DEFAULT_MODE) -> nn.Module:
    """Return a module that computes the program, which stays as it is.

    mode: one of `MODES`. `multiply` holds every compressed weight as a dense tensor of the activations' dtype (4 bytes
    a weight in float32, instead of the stored bits), `shift` and `codes` keep the codes. Raises UsageError for others.

    Attention stays as traced. On one CPU core with 9 query and 3 key heads of 64 over 1024 tokens `enable_gqa` takes
    0.82 of the time of repeating keys and values first (0.16 when decoding one token), and the boolean mask 1.04 of
    that of an additive one, so that there is nothing to win by rewriting it.
    """
    if mode not in MODES:
        choices = "; ".join(f"{name}: {meaning}" for name, meaning in MODES.items())
        raise UsageError(f"there is no mode {mode}", where="mode", fix=f"use one of {choices}")
    if mode == CODES:
        return program.module()
    if mode == MULTIPLY:
        return program.module(decode=True)
    copy = program.clone()
    for op, by_shifts in _BY_SHIFTS:
        for node in copy.calls(op):
            node.target = by_shifts
    return copy.module()
