"""`rotate`: weights in random bases, where outliers are spread out before they are quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from torch import fx

from ir.analysis import blocks
from ir.errors import UsageError
from ir.program import Program
from passes.base import Calib, Context, Log, OptionError, Pass, PlanRow, Stage
from passes.learned_rotation import LearnSpec, coders, learned_plan
from passes.rotation import RotationPlan, Side, plan_rotation, write_rotation
from passes.rotation_choice import idle_rotations
from passes.sites import check_skip, choose_sites, outside_blocks


@dataclass(frozen=True)
class Rotate(Pass):
    """Turn what linears read by random signs and Hadamard matrices, without changing the function.

    Values of attention are turned inside the weights around it; other inputs by an operator of additions, one for all
    linears that read the same value. Source: QuaRot (2404.00456), with `nomul::hadamard` in place of folded residuals;
    the incoherence is that of QuIP# (2402.04396). Learned rotations are SpinQuant's (2405.16406).
    """

    online: bool = field(default=True, metadata={"help": "insert operators; without, only attention's values turn"})
    seed: int = field(default=0, metadata={"help": "of the random signs"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave alone, `*` stands for any text"})
    residual: bool = field(
        default=True,
        metadata={"help": "turn the residual stream, by the weights that write and read it where norms allow it"},
    )
    learn: int = field(
        default=0,
        metadata={"help": "epochs of learning rotations of the stream and of values for the act and kv that follow"},
    )
    rate: float = field(default=1e-3, metadata={"help": "learning rate there"})
    batch: int = field(default=1, metadata={"help": "samples a step there"})
    loss: Literal["kl", "ce"] = field(
        default="kl", metadata={"help": "towards the float model's predictions there, or towards the text"}
    )
    choose: int = field(
        default=0,
        metadata={"help": "bits of weights and inputs, 2 to 8: turn only what lowers their error then; 0 turns all"},
    )
    side: Side = field(default="inputs", metadata={"help": "both: outputs as well, turned back by an operator each"})

    name: ClassVar[str] = "rotate"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.FOLD
    order_reason: ClassVar[str] = "no scale per channel can be folded through a rotation"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "folded"})
    gives: ClassVar[frozenset[str]] = frozenset({"rotated"})
    exact: ClassVar[bool] = True

    def needs(self) -> Calib | None:
        """Return the float stream where rotations are learned or chosen, and nothing otherwise."""
        return Calib("float", gradients=self.learn > 0, tokens=self.learn > 0) if self.learn or self.choose else None

    def validate(self) -> None:
        """Raise OptionError for values training cannot have."""
        for option, low, high in (("learn", 0, 10**6), ("batch", 1, 10**6), ("rate", 0, 1)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        if self.choose not in (0, *range(2, 9)):
            raise OptionError(self.name, "choose", f"{self.choose} is neither 2..8 nor 0")
        if self.learn and self.side != "inputs":
            raise OptionError(self.name, "learn", "rotations are learned on the side of inputs alone")

    def check_following(self, following: Sequence[Pass]) -> None:
        """Raise UsageError where rotations are to be learned and nothing rounds what they turn."""
        if self.learn and not coders(following):
            raise UsageError(
                f"pass {self.name} has nothing to learn rotations for",
                why="no pass act or kv follows, which would round activations or the cache",
                fix="add act{bits=4}, or leave out the option learn",
            )

    def plan(self, program: Program) -> list[PlanRow]:
        """Return a row per linear to be rotated, and one per operator with its additions a token."""
        plan = self._planned(program, {})
        rows = [PlanRow(s.name, "rotate", {"order": float(plan.order(s))}) for s in plan.turns]
        rows += [PlanRow(t.sites[0].name, "insert nomul.hadamard", {"adds": float(t.adds)}) for t in plan.online]
        ends = [(value.name, found.adds) for found in plan.streams for value, _ in found.ends]
        return [*rows, *(PlanRow(name, "insert nomul.hadamard", {"adds": float(adds)}) for name, adds in ends)]

    def _planned(self, program: Program, without: Mapping[str, str], log: Log | None = None) -> RotationPlan:
        """Return the rotation of the linears of the repeated blocks; log: where those left alone are recorded."""
        sites = choose_sites(program, _block_nodes(program), self.skip, Context(log=log or Log()))
        return plan_rotation(program, sites, self.seed, self.online, self.side, self.residual, without)

    def run(self, program: Program, ctx: Context) -> None:
        """Rotate the linears of the repeated blocks; those outside stay, as nothing quantises them."""
        check_skip(program, self.skip, self.name)
        idle: dict[str, str] = {}
        if self.choose:
            idle = idle_rotations(program, partial(self._planned, program), self.choose, ctx, self.name)
        plan = self._planned(program, idle, ctx.log)
        outside_blocks(program, _block_nodes(program), self.skip, ctx)
        if self.learn:
            spec = LearnSpec(self.learn, self.batch, self.rate, self.loss)
            plan = learned_plan(program, partial(self._planned, without=idle), spec, ctx, self.name)
        done = write_rotation(program, plan, self.name)
        for site, reason in done.left:
            ctx.log.skip(site, reason)
        for row in done.sites:
            ctx.log.report(site=row.site, order=float(row.order), peak_before=row.before, peak_after=row.after)
        for node, adds in done.online:
            ctx.log.report(site=node, adds=float(adds))


def _block_nodes(program: Program) -> list[fx.Node]:
    return [n for block in blocks(program) for n in block.nodes]
