"""The table of ONNX operators: from an operator's name to the torch code that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """How an operator is computed; raw: it takes known numbers as they are, not as tensors."""

    run: Rule
    raw: bool


# By operator, with the domain before it unless that is ONNX's own: what computes it from tensors, and what computes it
# from known numbers alone, tried first where all inputs are such, and allowed to decline with NotImplemented.
TENSOR_RULES: dict[str, Entry] = {}
NUMBER_RULES: dict[str, Rule] = {}


def operator(*names: str, raw: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators: (Call, *inputs) -> a value, or a tuple of values where there are several.

    Inputs that are left out, at the end or between others, are None. raw: inputs may be `Ints` as well as tensors.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            assert name not in TENSOR_RULES, f"two rules for {name}"
            TENSOR_RULES[name] = Entry(rule, raw)
        return rule

    return register


def numbers(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators whose inputs are all `Ints` or None; it returns NotImplemented to decline."""

    def register(rule: Rule) -> Rule:
        for name in names:
            assert name not in NUMBER_RULES, f"two rules for {name}"
            NUMBER_RULES[name] = rule
        return rule

    return register
