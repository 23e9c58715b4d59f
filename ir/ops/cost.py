"""What an operation costs a machine: bytes moved and arithmetic by kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Work of one call. bytes: weights and activations read and written; the rest counts scalar operations.

    lookups: reads of a table of sums made in the call; the add that follows each of them is counted under adds.
    """

    bytes: int = 0
    multiplies: int = 0
    adds: int = 0
    shifts: int = 0
    lookups: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.multiplies + other.multiplies,
            self.adds + other.adds,
            self.shifts + other.shifts,
            self.lookups + other.lookups,
        )

    @property
    def operations(self) -> int:
        """All scalar operations, each counted as one."""
        return self.multiplies + self.adds + self.shifts + self.lookups


def linear_cost(tokens: int, rows: int, inputs: int, weight_bytes: int, element: int = 4) -> Cost:
    """Return the cost of a dense linear [rows, inputs] over `tokens` tokens with `element`-byte activations."""
    moved = weight_bytes + tokens * (rows + inputs) * element
    return Cost(moved, tokens * rows * inputs, tokens * rows * (inputs - 1))
