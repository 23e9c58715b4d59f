"""Names of inputs, outputs and dims in the ONNX file, of a language model as ONNX Runtime GenAI expects them."""

from __future__ import annotations

import re

from ir.analysis import predicts_tokens, result_names
from ir.program import Program

_PAST = re.compile(r"past_(key|value)_(\d+)")
_TOTAL = frozenset({"total", "past+seq", "seq+past"})


def input_name(program: Program, index: int) -> str:
    """Return the published name of input `index`: `past_key_values.0.key` for `past_key_0`, others as they are."""
    name = program.inputs[index].name
    found = _PAST.fullmatch(name) if predicts_tokens(program) else None
    return f"past_key_values.{found[2]}.{found[1]}" if found else name


def output_name(program: Program, index: int) -> str:
    """Return the published name of output `index`: `logits`, `present.0.key`, `present.0.value`, ..., or its own.

    Only programs that are no language models have names of their own.
    """
    if not predicts_tokens(program):
        return result_names(program)[index]
    if index == 0:
        return "logits"
    return f"present.{(index - 1) // 2}.{'value' if index % 2 == 0 else 'key'}"


def dim_name(expr: str) -> str:
    """Return the published name of a symbolic dim; the mask's length and past+seq are both `total`."""
    return "total" if expr in _TOTAL else expr


def same_dim(a: int | str, b: int | str) -> bool:
    """Return whether two dims are equal wherever a program runs."""
    return a == b or (a in _TOTAL and b in _TOTAL)
