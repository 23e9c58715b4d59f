"""A model, not a measurement, of the energy of a program's arithmetic: operation counts times published unit costs.

Unit costs of a 45 nm chip: ShiftAddLLM (2406.05981) for float16 and int32 arithmetic, shifts and 8-bit look-ups;
the float32 row and the price of memory are those of the energy script in its release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ir.ops.cost import Cost

SOURCE = "ShiftAddLLM (arXiv 2406.05981), unit costs of a 45 nm chip"
COUNTED = "multiplies, adds, shifts and table look-ups as if all were in the format named; a look-up replaces 8 adds"
NOT_COUNTED = "control, leakage, activations kept on chip; memory is apart: every byte once from DRAM, no cache"

# 200 pJ for 16 bits.
DRAM_PJ_PER_BYTE = 100.0


@dataclass(frozen=True)
class UnitEnergy:
    """Picojoules of one operation; a shift is priced as int32's in every format, a look-up as one 8-bit query."""

    multiply: float
    add: float
    shift: float = 0.13
    lookup: float = 0.37


UNITS: Mapping[str, UnitEnergy] = {
    "fp32": UnitEnergy(3.7, 0.9),
    "fp16": UnitEnergy(0.9, 0.4),
    "int32": UnitEnergy(3.1, 0.1),
}


def arithmetic_pj(cost: Cost, unit: UnitEnergy) -> float:
    """Return the picojoules of a cost's arithmetic; its bytes are left out, see `memory_pj`."""
    parts = (
        (cost.multiplies, unit.multiply),
        (cost.adds, unit.add),
        (cost.shifts, unit.shift),
        (cost.lookups, unit.lookup),
    )
    return sum(amount * price for amount, price in parts)


def memory_pj(cost: Cost) -> float:
    """Return the picojoules of bringing every byte of a cost from DRAM once."""
    return cost.bytes * DRAM_PJ_PER_BYTE
