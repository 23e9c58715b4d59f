"""A program's work as people read it: counts in words, the change a pipeline made, and the energy model's table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

from tools.console import size_text, table

if TYPE_CHECKING:
    from ir.cost_model import ProgramCost
    from ir.ops.cost import Cost
    from ir.program import Program

INPUT = "input"
CAVEAT = "a model, nothing was measured"
_COLUMNS = ("multiplies", "adds", "shifts", "look-ups", "bytes")


@dataclass(frozen=True)
class CostStep:
    """What a program cost at one point of a pipeline. after: the pass's text, or `INPUT`; unknown: what is missing."""

    after: str
    cost: Cost
    unknown: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the step as JSON-able data."""
        return {"after": self.after, **asdict(self.cost), "unknown": list(self.unknown)}


def cost_step(after: str, program: Program) -> CostStep:
    """Return what one new token on an empty cache costs a program now; no weight is read."""
    from ir.cost_model import program_cost

    found = program_cost(program)
    return CostStep(after, found.total, found.unknown)


def count_text(count: int) -> str:
    """Return a count in three significant digits: `532`, `12.3 k`, `135 M`, `4.21 G`."""
    value, unit = float(count), ""
    for larger in ("k", "M", "G", "T"):
        # 999.6 thousand reads as 1 million, not as 1e+03 thousand.
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}".rstrip()


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """Return the cells of a cost in tables: multiplies, adds, shifts, look-ups, bytes."""
    counts = (cost.multiplies, cost.adds, cost.shifts, cost.lookups)
    return (*map(count_text, counts), size_text(cost.bytes))


def cost_table(head: Sequence[str], rows: Sequence[tuple[Sequence[object], Cost]]) -> str:
    """Return a table of costs; head: the columns before them, rows: their cells and the cost."""
    return table((*head, *_COLUMNS), [(*cells, *cost_cells(cost)) for cells, cost in rows])


def steps_table(steps: Sequence[CostStep]) -> str:
    """Return the cost of one token before and after every pass."""
    return cost_table(("work a token, after",), [((step.after,), step.cost) for step in steps])


def change_line(steps: Sequence[CostStep]) -> str:
    """Return the line that says what a pipeline made of the work of one token."""
    first, last = cost_cells(steps[0].cost), cost_cells(steps[-1].cost)
    parts = [f"{name} {a} -> {b}" for name, a, b in zip(_COLUMNS, first, last, strict=True)]
    return f"work      per token: {', '.join(parts)} (batch 1, empty cache)"


def unknown_lines(unknown: Sequence[str]) -> list[str]:
    """Return the lines that name what no figure contains."""
    return [f"          {line}" for line in unknown]


def cost_json(found: ProgramCost) -> dict[str, Any]:
    """Return the cost of a run as JSON-able data: its total, and the same by operator and by site."""
    return {
        "batch": 1,
        "tokens": found.tokens,
        "past": found.past,
        "total": asdict(found.total),
        "operators": [{"op": op, "calls": calls, **asdict(cost)} for op, (calls, cost) in found.by_operator().items()],
        "sites": [{"site": site, **asdict(cost)} for site, cost in found.by_site().items()],
        "unknown": list(found.unknown),
    }


def cost_text(found: ProgramCost) -> str:
    """Return the cost of a run as two tables, by operator with the most work first, and by site in program order.

    What costs nothing (views, sizes) has no row.
    """
    operators = [((op, calls), cost) for op, (calls, cost) in found.by_operator().items() if any(astuple(cost))]
    operators.sort(key=lambda row: (row[1].operations, row[1].bytes), reverse=True)
    sites = [((site,), cost) for site, cost in found.by_site().items() if any(astuple(cost))]
    head = f"work      batch 1, new tokens: {found.tokens}, tokens in the cache: {found.past}"
    calls = sum(calls for (_, calls), _ in operators)
    return "\n\n".join(
        [
            "\n".join([head, *unknown_lines(found.unknown)]),
            cost_table(("operator", "calls"), [*operators, (("total", calls), found.total)]),
            cost_table(("site",), sites),
        ]
    )


def energy_json(costs: dict[str, Cost]) -> dict[str, Any]:
    """Return the modelled picojoules of some costs by name, with what they are made of."""
    from ir.energy import COUNTED, DRAM_PJ_PER_BYTE, NOT_COUNTED, SOURCE, UNITS, arithmetic_pj, memory_pj

    return {
        "note": CAVEAT,
        "source": SOURCE,
        "counted": COUNTED,
        "not_counted": NOT_COUNTED,
        "unit_pj": {name: asdict(unit) for name, unit in UNITS.items()},
        "dram_pj_per_byte": DRAM_PJ_PER_BYTE,
        "arithmetic_pj": {k: {n: arithmetic_pj(c, unit) for n, unit in UNITS.items()} for k, c in costs.items()},
        "memory_pj": {k: memory_pj(c) for k, c in costs.items()},
    }


def energy_text(costs: dict[str, Cost], unknown: Sequence[str] = ()) -> str:
    """Return the energy model's table of some costs, a row a number format, with its source and its limits.

    costs: by column; unknown: lines that name what they do not contain.
    """
    from ir.energy import COUNTED, DRAM_PJ_PER_BYTE, NOT_COUNTED, SOURCE, UNITS, arithmetic_pj, memory_pj

    rows: list[tuple[object, ...]] = [
        (name, *astuple(unit), *[_energy(arithmetic_pj(cost, unit)) for cost in costs.values()])
        for name, unit in UNITS.items()
    ]
    memory = [_energy(memory_pj(cost)) for cost in costs.values()]
    rows.append((f"DRAM, {DRAM_PJ_PER_BYTE:g} pJ a byte", *[None] * 4, *memory))
    head = ("energy MODEL", "pJ multiply", "add", "shift", "look-up", *costs)
    lines = [table(head, rows), f"source    {SOURCE}; {CAVEAT}", f"counted   {COUNTED}", f"left out  {NOT_COUNTED}"]
    return "\n".join([*lines, *unknown_lines(unknown)])


def _energy(picojoules: float) -> str:
    """Return an energy in nJ, uJ or mJ, three significant digits."""
    value, unit = picojoules / 1e3, "nJ"
    for larger in ("uJ", "mJ", "J"):
        if value < 999.5:
            break
        value, unit = value / 1e3, larger
    return f"{value:.3g} {unit}"
