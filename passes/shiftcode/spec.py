"""The options of the layer-wise shift-add solver."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ir.errors import UsageError
from passes.shiftcode.design import Design, design_of

# A code of the solver is a byte, and 3**5 fit into one.
MOST_TRITS = 5


@dataclass(frozen=True)
class ShiftSpec:
    """Options of the solver.

    bits: planes (or trits); group: inputs per scale set; row_group: rows per scale set, 0 = all; code: planes, trits or
    trits31; terms: powers of two per scale, 0 = float16 scales; offset: store one offset a set; weighted: weigh columns
    by 1/U_jj^2 in the first fit; rounds, starts: of that fit; iterations: walks and scale solves in a group's own
    metric; polish: coordinate descents and scale solves after them; refit: solve all scales of a row together once the
    loop is through; sweeps: passes over all groups after that; damp: Hessian damping; ordered: take groups and columns
    by falling Hessian diagonal; feedback: later scales of a set make up for the rounding of earlier ones.
    """

    bits: int = 3
    group: int = 64
    row_group: int = 1
    code: str = "planes"
    terms: int = 2
    offset: bool = True
    weighted: bool = True
    rounds: int = 10
    starts: int = 4
    iterations: int = 4
    polish: int = 2
    refit: bool = False
    sweeps: int = 2
    damp: float = 0.01
    ordered: bool = True
    feedback: bool = True

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= 8 and self.group >= 1 and 0 <= self.terms <= 4 and self.row_group >= 0):
            raise UsageError(
                "the solver needs 1 to 8 bits, a positive group and at most 4 terms",
                why=f"bits={self.bits} group={self.group} row_group={self.row_group} terms={self.terms}",
            )
        if self.code != "planes" and self.bits > MOST_TRITS:
            raise UsageError(f"the solver fits at most {MOST_TRITS} trits", why=f"{self.bits} were asked for")

    def design(self) -> Design:
        """Return the code book."""
        return design_of(self.code, self.bits, self.starts)

    def clipped(self, rows: int, inputs: int) -> ShiftSpec:
        """Return the options with groups no larger than a weight [rows, inputs]."""
        return replace(self, row_group=min(self.row_group or rows, rows), group=min(self.group, inputs))
