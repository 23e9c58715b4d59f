"""Runs a program on fake tensors of sample sizes and compares every value with its recorded type."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ir.checks import TYPE_FIX, Diagnostic, about
from ir.errors import NomulError
from ir.program import TYPE, Program
from ir.types import Dim, ScalarType, TensorType, ValueType, type_text

# Distinct primes, so that two symbols taken for each other show.
SIZES = (3, 5, 7, 11, 13, 17, 19, 23)


def _power(base: int, exponent: int) -> int:
    # A text may come from anywhere, and a tower of powers would take forever.
    if not 0 <= exponent <= 8:
        raise ArithmeticError(f"no size is a power of {exponent}")
    return int(base**exponent)


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"Max": max, "Min": min, "FloorDiv": operator.floordiv, "Mod": operator.mod}
_MISSING = object()


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """Return the value of a dim such as `past + seq`, or None when it names an unknown symbol or function."""
    if isinstance(dim, int):
        return dim
    try:
        value = _evaluate(ast.parse(dim.strip(), mode="eval").body, sizes)
    except (SyntaxError, KeyError, ArithmeticError):
        return None
    return value if isinstance(value, int) else None


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluate(node.left, sizes), _evaluate(node.right, sizes))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_evaluate(node.operand, sizes))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](*(_evaluate(a, sizes) for a in node.args))
    raise KeyError(type(node).__name__)


def check_runs(program: Program, sizes: Mapping[str, int] | None = None) -> list[Diagnostic]:
    """Report calls that fail on fake tensors, or whose result is not of the recorded type.

    sizes: symbol -> size (default: primes in the order of `program.symbols`). Values that depend on data, and all that
    is computed from them, are not compared.
    """
    sizes = sizes or dict(zip(program.symbols, SIZES, strict=False))
    values: dict[fx.Node, Any] = {}
    found: list[Diagnostic] = []
    with FakeTensorMode(), torch.no_grad():
        for node in program.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                values[node] = _sample(node.meta.get(TYPE), sizes)
            elif node.op == "call_function":
                problem = _run(node, values, sizes)
                found += [about(node, "runs", problem, TYPE_FIX)] if problem else []
    return found


def _sample(kind: ValueType, sizes: Mapping[str, int]) -> Any:
    if isinstance(kind, ScalarType):
        value = evaluate(kind.expr, sizes)
        return _MISSING if value is None else value
    if not isinstance(kind, TensorType):
        return _MISSING
    dims = [evaluate(d, sizes) for d in kind.dims]
    return _MISSING if None in dims else torch.empty([d or 0 for d in dims], dtype=kind.dtype)


def _run(node: fx.Node, values: dict[fx.Node, Any], sizes: Mapping[str, int]) -> str:
    values[node] = _MISSING
    if any(values.get(source, _MISSING) is _MISSING for source in node.all_input_nodes):
        return ""
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    try:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    except (DataDependentOutputException, DynamicOutputShapeException):
        return ""
    except (NomulError, RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        # What follows is run on a value of the recorded type, so that one mistake is reported once.
        values[node] = _sample(node.meta.get(TYPE), sizes)
        return f"the call fails at {shown or 'any size'}: {str(error).strip().splitlines()[0]}"
    values[node] = value
    if _fits(value, node.meta.get(TYPE), sizes):
        return ""
    return f"at {dict(sizes)} the result is {_describe(value)}, not {type_text(node.meta.get(TYPE))}"


def _fits(value: Any, kind: ValueType, sizes: Mapping[str, int]) -> bool:
    if isinstance(kind, tuple):
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(kind)
            and all(map(_fits, value, kind, [sizes] * len(kind)))
        )
    if isinstance(kind, ScalarType):
        expected = evaluate(kind.expr, sizes)
        return expected is None or value == expected
    if not isinstance(kind, TensorType) or not isinstance(value, torch.Tensor):
        return False
    dims = [evaluate(d, sizes) for d in kind.dims]
    same = len(dims) == value.dim() and all(d is None or d == n for d, n in zip(dims, value.shape, strict=True))
    return same and value.dtype == kind.dtype


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_describe, value))})"
    return repr(value)
