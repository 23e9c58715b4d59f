"""What a whole program costs a machine for some new tokens: every call counted from types and arguments alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ir.analysis import site_name
from ir.cost_rules import RULES, Call, Uncounted
from ir.errors import UsageError
from ir.op_checks import site_of
from ir.ops.cost import Cost
from ir.program import TYPE, Program
from ir.propagate import evaluate
from ir.text import op_name
from ir.types import TensorType, ValueType, type_text


@dataclass(frozen=True)
class CostRow:
    """The cost of one call. site: as tables name it; unknown: why the call could not be counted, empty if it was."""

    node: str
    site: str
    op: str
    cost: Cost
    unknown: str = ""


@dataclass(frozen=True)
class ProgramCost:
    """The cost of one run at batch 1: `tokens` new tokens on a cache of `past`, one row a call in program order."""

    tokens: int
    past: int
    rows: tuple[CostRow, ...]

    @property
    def total(self) -> Cost:
        """The sum of all rows."""
        return _sum(row.cost for row in self.rows)

    @property
    def unknown(self) -> tuple[str, ...]:
        """A line for each operator and reason that kept calls from being counted; empty when the total is whole."""
        calls: dict[tuple[str, str], int] = {}
        for row in self.rows:
            if row.unknown:
                calls[row.op, row.unknown] = calls.get((row.op, row.unknown), 0) + 1
        return tuple(f"{op}: {count} calls not counted, {why}" for (op, why), count in calls.items())

    def by_site(self) -> dict[str, Cost]:
        """Return the cost of each site, in program order."""
        return {name: _sum(row.cost for row in rows) for name, rows in _grouped(self.rows, "site").items()}

    def by_operator(self) -> dict[str, tuple[int, Cost]]:
        """Return the number of calls and the cost of each operator, in order of first use."""
        groups = _grouped(self.rows, "op")
        return {name: (len(rows), _sum(row.cost for row in rows)) for name, rows in groups.items()}


def program_cost(program: Program, *, tokens: int = 1, past: int = 0) -> ProgramCost:
    """Return what running a program on `tokens` new tokens with a cache of `past` costs at batch 1; no weight is read.

    Raises UsageError for lengths out of range. A call whose operator has no rule, or whose dims these lengths do not
    settle, costs nothing here and is named in the result.
    """
    if tokens < 1 or past < 0:
        raise UsageError(
            "a cost needs a new token and a past", why=f"tokens={tokens} past={past}", fix="give tokens >= 1, past >= 0"
        )
    sizes = {"batch": 1, "seq": tokens, "past": past, "total": past + tokens}
    bound = _Bound(sizes)
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return ProgramCost(tokens, past, tuple(_row(node, bound) for node in calls))


class _Bound:
    """Types with every dim a number, each distinct dim evaluated once."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes, self._known = sizes, dict[str, int]()

    def type(self, kind: ValueType) -> Any:
        """Return a type with its dims as numbers, tuples likewise; raises Uncounted."""
        if isinstance(kind, TensorType):
            return TensorType(kind.dtype, tuple(self._dim(d, kind) for d in kind.dims))
        return tuple(map(self.type, kind)) if isinstance(kind, tuple) else kind

    def value(self, value: Any) -> Any:
        """Return an argument with each node in it replaced by its bound type; raises Uncounted."""
        if isinstance(value, fx.Node):
            return self.type(value.meta.get(TYPE))
        return [self.value(v) for v in value] if isinstance(value, (list, tuple)) else value

    def _dim(self, dim: int | str, kind: TensorType) -> int:
        if isinstance(dim, int):
            return dim
        if dim not in self._known:
            found = evaluate(dim, self._sizes)
            if found is None:
                raise Uncounted(f"the dim {dim} of {type_text(kind)} is not known")
            self._known[dim] = found
        return self._known[dim]


def _row(node: fx.Node, bound: _Bound) -> CostRow:
    op = op_name(node.target)
    rule, site = RULES.get(op), site_of(node)
    cost, why = Cost(), ""
    if rule is None:
        why = "no rule says what it costs"
    elif site is None:
        why = "its arguments do not fit its schema"
    else:
        try:
            args = {str(name): bound.value(value) for name, value in site.args.items()}
            cost = rule(Call(args, bound.type(node.meta.get(TYPE))))
        except Uncounted as error:
            why = str(error)
    return CostRow(node.name, site_name(node), op, cost, why)


def _grouped(rows: Iterable[CostRow], key: str) -> dict[str, list[CostRow]]:
    groups: dict[str, list[CostRow]] = {}
    for row in rows:
        groups.setdefault(getattr(row, key), []).append(row)
    return groups


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total += cost
    return total
