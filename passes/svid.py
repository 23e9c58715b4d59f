"""`svid`: scales that take the common sizes of columns out of weights, so that signs and row scales can serve them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ir.program import Program
from passes.base import Context, OptionError, Pass, PlanRow, Stage
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, annotate
from passes.equiv.transfer import expand

Site = Literal["norm->linears", "v->o", "up->down", "fc1->fc2"]


@dataclass(frozen=True)
class Svid(Pass):
    """Leave scales for `fold` by which the magnitudes of weights come near a product of a row and a column of factors.

    What remains of the column is taken into the weights before it, so that it costs nothing when the program runs.
    Source: the sign-value-independent decomposition of OneBit (2402.11295, section 3.3), RaBiT (2602.05367).
    """

    rounds: int = field(default=8, metadata={"help": "how often rows and columns are fitted to each other"})
    sites: tuple[Site, ...] = field(
        default=("norm->linears", "v->o", "up->down", "fc1->fc2"), metadata={"help": "kinds of groups to scale"}
    )

    name: ClassVar[str] = "svid"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.TRANSFORM
    order_reason: ClassVar[str] = "svid leaves scales that fold consumes"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    exact: ClassVar[bool] = True

    def validate(self) -> None:
        """Raise OptionError for a number of rounds that fits nothing."""
        if not 1 <= self.rounds <= 1000:
            raise OptionError(self.name, "rounds", f"{self.rounds} is outside 1..1000")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return a row per group that would get scales."""
        return [PlanRow(g.site, f"even out the columns of {g.kind}") for g in discover(program).of(*self.sites)]

    def run(self, program: Program, ctx: Context) -> None:
        """Fit each group by its weights alone."""
        found = discover(program)
        for absence in found.absences:
            if absence.kind in self.sites:
                ctx.log.skip(absence.site, absence.reason)
        for group in found.of(*self.sites):
            columns, gone = column_factors(program, group, self.rounds)
            annotate(program, group, 1 / columns, self.name)
            ctx.log.report(
                site=group.site, smallest=float(columns.min()), largest=float(columns.max()), error_left=gone
            )


def column_factors(program: Program, group: EquivGroup, rounds: int) -> tuple[Tensor, float]:
    """Return what columns of a group's sinks share in size, float64 [size] around 1, and what rows alone leave of it.

    Rows r and columns c take turns in minimising |(|W| - r c^T)|^2 over all sinks at once. The figure is the share of
    the error, with r alone, that is left. A column of zeros has factor 1.
    """
    weights = [program.params.get(slot.weight).double().abs().flatten(0, -2) for slot in group.sinks]
    ties = [slot.tie for slot in group.sinks]
    columns = torch.ones(group.size, dtype=torch.float64)
    alone = _error(weights, [expand(tie, columns) for tie in ties])
    for _ in range(rounds):
        over, under = torch.zeros_like(columns), torch.zeros_like(columns)
        for weight, tie in zip(weights, ties, strict=True):
            rows = _rows(weight, expand(tie, columns))
            own = tie.index >= 0
            over.index_add_(0, tie.index[own], (rows @ weight)[own])
            under.index_add_(0, tie.index[own], rows.square().sum().expand(int(own.sum())))
        columns = torch.where((over > 0) & (under > 0), over / under.clamp(min=1e-300), 1.0)
        columns = columns / columns.log().mean().exp()
    left = _error(weights, [expand(tie, columns) for tie in ties])
    return columns, left / alone if alone else 1.0


def _rows(weight: Tensor, columns: Tensor) -> Tensor:
    """Return the factors of rows that fit best to those of columns."""
    return weight @ columns / columns.square().sum()


def _error(weights: Sequence[Tensor], columns: Sequence[Tensor]) -> float:
    pairs = zip(weights, columns, strict=True)
    return float(sum((w - _rows(w, c)[:, None] * c).square().sum() for w, c in pairs))
