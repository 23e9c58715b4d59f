"""Equivalence groups: weights between which a scale per channel can move exactly, and the scales that passes leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ir.errors import InvariantError
from ir.program import HELD, Program

Kind = Literal["norm->linears", "norm->head", "v->o", "q<->k", "up->down", "fc1->fc2"]
Axis = Literal["rows", "cols", "gain"]

NORMS: tuple[Kind, ...] = ("norm->linears", "norm->head")
RECORDS = "equiv"


@dataclass(frozen=True, eq=False)
class TieMap:
    """Which free parameter each channel of a weight follows.

    index: i64[channels], -1 for a channel that the group leaves alone.
    """

    index: Tensor

    @property
    def channels(self) -> int:
        """Number of channels, touched or not."""
        return int(self.index.numel())


@dataclass(frozen=True, eq=False)
class Slot:
    """One place where a group's scale enters a weight.

    node: name of the linear or norm; weight, bias: its parameters (empty: none, or computed).
    axis: `rows` of a linear weight with its bias, its `cols`, or the `gain` of a norm with its offset.
    power: -1 where the weight is divided by the scale, +1 where it is multiplied.
    """

    node: str
    weight: str
    bias: str
    axis: Axis
    power: int
    tie: TieMap


@dataclass(frozen=True, eq=False)
class EquivGroup:
    """Weights whose joint rescaling leaves the program's function as it is, for any scale that `supports` allows.

    site: a node name that no other group has: the norm, the linear that consumes the scaled values, or the attention.
    size: number of free parameters; tied channels (rotary pairs, heads of a group, experts) share one.
    supports: `scale` (positive), `sign` (negative too), `shift` (an offset per channel is exact as well; through
    attention where every query sees a key).
    """

    kind: Kind
    site: str
    sources: tuple[Slot, ...]
    sinks: tuple[Slot, ...]
    size: int
    supports: frozenset[str]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Sources, then sinks."""
        return (*self.sources, *self.sinks)


@dataclass(frozen=True)
class Absence:
    """A place that looks like a group and is none, with the reason."""

    kind: Kind
    site: str
    reason: str


@dataclass(frozen=True, eq=False)
class Discovery:
    """All groups of a program, in graph order, and the places that are none."""

    groups: tuple[EquivGroup, ...]
    absences: tuple[Absence, ...]

    def of(self, *kinds: str) -> tuple[EquivGroup, ...]:
        """Return the groups of these kinds."""
        return tuple(g for g in self.groups if g.kind in kinds)

    def find(self, kind: str, site: str) -> EquivGroup:
        """Return one group; raises InvariantError with the reason on record when it is absent."""
        for group in self.groups:
            if (group.kind, group.site) == (kind, site):
                return group
        why = next((a.reason for a in self.absences if (a.kind, a.site) == (kind, site)), "nothing there looks like it")
        raise InvariantError(f"there is no {kind} group", where=site, why=why, fix="fold scales before other changes")


def annotate(program: Program, group: EquivGroup, s: Tensor, by: str, shift: Tensor | None = None) -> None:
    """Leave scales, and a shift, on a group for `fold`; what is already there is replaced.

    s, shift: [size], finite; s nonzero, positive unless the group supports signs; a shift only where it is supported.
    The value between sources and sinks becomes (x - shift) / s. Raises InvariantError otherwise.
    """
    check_scales(group, s, by)
    tensors = {"param": s}
    if shift is not None:
        check_shift(group, shift, by)
        tensors["shift"] = shift
    record = {"kind": group.kind, "site": group.site}
    old = [r for r in program.attributes.get(RECORDS, []) if r["site"] == group.site]
    held = set(program.attributes.get(HELD, [])) - {r[key] for r in old for key in ("param", "shift") if key in r}
    for key, tensor in tensors.items():
        record[key] = f"{'scales' if key == 'param' else 'shifts'}.{group.site}"
        program.params.put(record[key], tensor, by)
    others = [r for r in program.attributes.get(RECORDS, []) if r["site"] != group.site]
    program.attributes[RECORDS] = [*others, record]
    program.attributes[HELD] = sorted({*held, *(record[key] for key in tensors)})
    program.version += 1


def check_scales(group: EquivGroup, s: Tensor, by: str) -> None:
    """Raise InvariantError for scales under which a group is not exact."""
    if tuple(s.shape) != (group.size,):
        raise InvariantError(f"{by} gave scales {tuple(s.shape)} to a group of {group.size}", where=group.site)
    if not bool(torch.isfinite(s).all()) or bool((s == 0).any()):
        raise InvariantError(f"{by} gave scales that are zero, infinite or NaN", where=group.site)
    if "sign" not in group.supports and bool((s < 0).any()):
        raise InvariantError(f"{by} gave negative scales to a group that is exact for positive ones", where=group.site)


def check_shift(group: EquivGroup, shift: Tensor, by: str) -> None:
    """Raise InvariantError for a shift under which a group is not exact."""
    if "shift" not in group.supports:
        raise InvariantError(f"{by} gave a shift to a group that is not exact under one", where=group.site)
    if tuple(shift.shape) != (group.size,) or not bool(torch.isfinite(shift).all()):
        raise InvariantError(
            f"{by} gave a group of {group.size} a shift of another size or not finite", where=group.site
        )


@dataclass(frozen=True, eq=False)
class Recorded:
    """Scales, and a shift or None, that a pass left on a group: float64 [size]."""

    kind: str
    site: str
    scales: Tensor
    shift: Tensor | None


def recorded(program: Program) -> Iterator[Recorded]:
    """Yield every record; raises InvariantError when its scales or shift are gone."""
    records: list[dict[str, Any]] = program.attributes.get(RECORDS, [])
    for record in records:
        names = [record[key] for key in ("param", "shift") if key in record]
        for name in names:
            if name not in program.params:
                raise InvariantError(
                    f"the {name.partition('.')[0]} @{name} are gone",
                    where=record["site"],
                    why="a pass between the one that left them and fold dropped them from the store",
                    fix="run fold directly after the passes that leave scales",
                )
        s, *shift = (program.params.get(name).double() for name in names)
        yield Recorded(record["kind"], record["site"], s, shift[0] if shift else None)


def clear(program: Program) -> None:
    """Remove all records and their scales."""
    records = program.attributes.pop(RECORDS, [])
    left = [record[key] for record in records for key in ("param", "shift") if key in record]
    held = set(program.attributes.pop(HELD, [])) - set(left)
    if held:
        program.attributes[HELD] = sorted(held)
    for name in left:
        program.params.drop(name)
        program.version += 1
