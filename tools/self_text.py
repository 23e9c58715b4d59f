"""Calibration on what the model writes by itself, for models that come without text of their own (LLM-QAT)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tools.calibration import HELD_OUT_LENGTH, HELD_OUT_WINDOWS, TokenData, in_batches

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ir.program import Program

SELF = "self"
# Tokens after the first that are the likeliest ones, and windows that are written side by side.
_GREEDY, _ROWS = 4, 32


def self_data(program: Program, samples: int, seqlen: int, seed: int) -> TokenData:
    """Return windows that a program of a language model wrote: calibration, and others of their own for judging.

    Each begins with a token drawn from all, goes on with the likeliest few and then as the model's probabilities have
    it (LLM-QAT, 2305.17888, section 2.1). The same seed gives the same windows where products are summed in the same
    order. Raises UsageError for a model that gives no finite logits, UnsupportedError for one without a cache.
    """
    import torch

    from backends.reference.execute import executable
    from ir.analysis import predicts_tokens
    from ir.errors import UnsupportedError
    from tools.console import progress

    if not predicts_tokens(program) or len(program.inputs) < 3 or len(program.outputs) < 2:
        raise UnsupportedError(
            "the model writes no text",
            where=program.name,
            why=f"it takes {', '.join(n.name for n in program.inputs)}, and has no cache",
            fix="give calibration data: --calib FILE with text, or FILE.npz with arrays",
        )
    module = executable(program)
    generator = torch.Generator().manual_seed(seed)
    length = min(HELD_OUT_LENGTH, seqlen)
    counts = [(n, seqlen) for n in _parts(samples)] + [(HELD_OUT_WINDOWS, length)]
    with progress("write text", sum(tokens for _, tokens in counts)) as step:
        *rows, held_out = [_written(program, module, n, tokens, generator, step) for n, tokens in counts]
    windows = torch.cat(rows)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return TokenData(in_batches(windows), held_out, digest)


def _parts(samples: int) -> Iterator[int]:
    for start in range(0, samples, _ROWS):
        yield min(_ROWS, samples - start)


def _written(
    program: Program,
    module: nn.Module,
    rows: int,
    tokens: int,
    generator: torch.Generator,
    step: Callable[[str], None],
) -> torch.Tensor:
    """Return i64[rows, tokens] that a program wrote; module: what computes it."""
    import torch

    from ir.errors import UsageError
    from ir.execute import empty_inputs, next_inputs

    vocabulary = int(program.outputs[0].meta["type"].dims[-1])
    ids = torch.randint(vocabulary, (rows, 1), generator=generator)
    inputs, found = empty_inputs(program, ids), [ids]
    step("")
    while len(found) < tokens:
        with torch.no_grad():
            outputs = module(*inputs.values())
        logits = outputs[0][:, -1].double()
        if not bool(torch.isfinite(logits).all()):
            raise UsageError("the model gave no finite logits", where=program.name, fix="give a text with --calib")
        if len(found) <= _GREEDY:
            ids = logits.argmax(-1, keepdim=True)
        else:
            ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        found.append(ids)
        inputs = next_inputs(program, ids, outputs)
        step("")
    return torch.cat(found, 1)
