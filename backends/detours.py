"""Sites that a backend runs otherwise than by the kernels that were asked for, and how that is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Detour:
    """A site, what runs it (`standard operators`), and why nothing better does."""

    site: str
    runs_by: str
    reason: str

    def as_json(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)


def detour_lines(detours: Iterable[Detour]) -> tuple[str, ...]:
    """Return one line a reason: `12 sites run by standard operators: groups of 8 inputs are smaller than ...`."""
    counted: dict[tuple[str, str], int] = {}
    for one in detours:
        counted[one.runs_by, one.reason] = counted.get((one.runs_by, one.reason), 0) + 1
    return tuple(
        f"{number} {'site runs' if number == 1 else 'sites run'} by {runs_by}: {reason}"
        for (runs_by, reason), number in counted.items()
    )
