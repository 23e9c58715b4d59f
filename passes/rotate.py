"""`rotate`: weights in random bases, where outliers are spread out before they are quantised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from ir.analysis import blocks
from ir.program import Program
from passes.base import Context, Pass, PlanRow, Stage
from passes.rotation import Side, plan_rotation, rotate_sites
from passes.sites import check_skip, choose_sites, outside_blocks


@dataclass(frozen=True)
class Rotate(Pass):
    """Turn what linears read by random signs and Hadamard matrices, without changing the function.

    Values of attention are turned inside the weights around it; other inputs by an operator of additions, one for all
    linears that read the same value. Source: QuaRot (2404.00456), with `nomul::hadamard` in place of folded residuals;
    the incoherence is that of QuIP# (2402.04396).
    """

    online: bool = field(default=True, metadata={"help": "insert operators; without, only attention's values turn"})
    seed: int = field(default=0, metadata={"help": "of the random signs"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave alone, `*` stands for any text"})
    residual: bool = field(
        default=False,
        metadata={"help": "turn the residual stream, by the weights that write and read it where norms allow it"},
    )
    side: Side = field(default="inputs", metadata={"help": "both: outputs as well, turned back by an operator each"})

    name: ClassVar[str] = "rotate"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.FOLD
    order_reason: ClassVar[str] = "no scale per channel can be folded through a rotation"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "folded"})
    gives: ClassVar[frozenset[str]] = frozenset({"rotated"})
    exact: ClassVar[bool] = True

    def plan(self, program: Program) -> list[PlanRow]:
        """Return a row per linear to be rotated, and one per operator with its additions a token."""
        sites = choose_sites(program, _block_nodes(program), self.skip, Context())
        plan = plan_rotation(program, sites, self.seed, self.online, self.side, self.residual)
        rows = [PlanRow(s.name, "rotate", {"order": float(plan.order(s))}) for s in plan.turns]
        rows += [PlanRow(t.sites[0].name, "insert nomul.hadamard", {"adds": float(t.adds)}) for t in plan.online]
        ends = [(value.name, found.adds) for found in plan.streams for value, _ in found.ends]
        return [*rows, *(PlanRow(name, "insert nomul.hadamard", {"adds": float(adds)}) for name, adds in ends)]

    def run(self, program: Program, ctx: Context) -> None:
        """Rotate the linears of the repeated blocks; those outside stay, as nothing quantises them."""
        check_skip(program, self.skip, self.name)
        inside = _block_nodes(program)
        sites = choose_sites(program, inside, self.skip, ctx)
        outside_blocks(program, inside, self.skip, ctx)
        done = rotate_sites(program, sites, self.seed, self.name, self.online, self.side, self.residual)
        for site, reason in done.left:
            ctx.log.skip(site, reason)
        for row in done.sites:
            ctx.log.report(site=row.site, order=float(row.order), peak_before=row.before, peak_after=row.after)
        for node, adds in done.online:
            ctx.log.report(site=node, adds=float(adds))


def _block_nodes(program: Program) -> list[fx.Node]:
    return [n for block in blocks(program) for n in block.nodes]
