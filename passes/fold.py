"""`fold`: norm gains, and the scales that earlier passes left, go into the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ir.edit import Editor
from ir.program import Program
from passes.base import Context, Pass, PlanRow, Stage
from passes.equiv.apply import Factors, apply
from passes.equiv.discover import discover
from passes.equiv.groups import NORMS, Discovery, EquivGroup, clear, recorded
from passes.equiv.operands import drop_gain, norm_operands
from passes.equiv.producers import gain_of
from passes.equiv.transfer import unit_scales

# Sites of norms whose gain is a balance that an earlier pass chose; moving it on would undo that pass.
BALANCED = "balanced"


@dataclass(frozen=True)
class Fold(Pass):
    """Move norm gains and scales left by earlier passes into neighbouring weights, without changing the function.

    Gains go from norms into the columns of all linears that read them, and vanish from the norm; its offset stays. A
    norm that carries a scale of an earlier pass keeps the gain that pass chose. Computed in float64, rounded once.
    Raises InvariantError when scales were left on a group that is no longer there. Source: SmoothQuant (2211.10438,
    section 4.1), OmniQuant (2308.13137, section 3.3).
    """

    name: ClassVar[str] = "fold"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.FOLD
    order_reason: ClassVar[str] = "fold must see float weights"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"folded"})
    exact: ClassVar[bool] = True

    def plan(self, program: Program) -> list[PlanRow]:
        """Return a row per scale and per gain that would be folded."""
        found = discover(program)
        rows = [PlanRow(left.site, f"fold the scales of {left.kind}") for left in recorded(program)]
        return [*rows, *(PlanRow(g.site, "fold the gain") for g in _unbalanced(program, found))]

    def run(self, program: Program, ctx: Context) -> None:
        """Gather the factors of every group, write each weight once, and forget the scales."""
        found, factors = discover(program), Factors()
        balanced: set[str] = set(program.attributes.get(BALANCED, []))
        for left in recorded(program):
            group = found.find(left.kind, left.site)
            factors.add(group, left.scales, left.shift)
            balanced |= {left.site} if group.kind in NORMS else set()
            _report(ctx, group, left.scales)
        for absence in found.absences:
            if absence.kind in NORMS:
                ctx.log.skip(absence.site, absence.reason)
        gains = _unbalanced(program, found)
        for group in gains:
            _take_gain(program, group, factors, ctx)
        clear(program)
        changed = apply(program, factors, self.name) + _drop_ones(program, gains, self.name)
        if balanced != set(program.attributes.get(BALANCED, [])):
            program.attributes[BALANCED] = sorted(balanced)
            program.version += 1
        if changed:
            Editor(program, self.name).sweep()


def _unbalanced(program: Program, found: Discovery) -> list[EquivGroup]:
    """Return the norm groups whose gain no earlier pass has chosen."""
    chosen = {left.site for left in recorded(program)} | set(program.attributes.get(BALANCED, []))
    return [group for group in found.of(*NORMS) if group.site not in chosen]


def _take_gain(program: Program, group: EquivGroup, factors: Factors, ctx: Context) -> None:
    """Enter the factors that make a norm's gain one."""
    gain, beta = norm_operands(program, program.node(group.site))
    if group.size != gain.numel():
        ctx.log.skip(group.site, "channels with gains of their own share one scale where they are read")
        return
    s = unit_scales(gain, beta).flatten()
    if "sign" not in group.supports and bool((s < 0).any()):
        ctx.log.skip(group.site, "its gain has negative values, and a rectifier reads them")
    elif bool((s != 1).any()):
        factors.add(group, s)
        _report(ctx, group, s)


def _drop_ones(program: Program, groups: list[EquivGroup], by: str) -> int:
    """Remove gain operands that are one everywhere; return how many."""
    editor, dropped = Editor(program, by), 0
    for group in groups:
        node = program.node(group.site)
        if gain_of(node) is not None and bool((norm_operands(program, node)[0] == 1).all()):
            drop_gain(editor, node)
            dropped += 1
    return dropped


def _report(ctx: Context, group: EquivGroup, s: torch.Tensor) -> None:
    size = s.abs()
    ctx.log.report(
        site=group.site,
        parameters=float(group.size),
        sinks=float(len(group.sinks)),
        spread=float(size.max() / size.min()),
    )
