"""`cbq`: learned rounding of several blocks together, window by window, stored as uniform codes (CBQ, 2312.07950)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ir.analysis import LinearSite, blocks
from ir.products import products_in
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage, Trial
from passes.checkpoint import has_block, load_block, save_block
from passes.quantize.hessian import Gram
from passes.quantize.lowrank_rounding import LowRankRounding, lowrank_rounding
from passes.quantize.salience import row_energy
from passes.quantize.trials import searched_trials
from passes.quantize.uniform import packed, packed_bytes
from passes.sites import check_group, check_skip, choose_sites, figures, outside_blocks, planned, weights_of
from passes.solved import Solved, put_solved, restore_solved, save_solved
from passes.stream import Step, by_rows, walk
from passes.training.events import block_name, report_outcome
from passes.training.loop import Problem, Recipe, train
from passes.training.loss import plain_loss, token_loss
from passes.widths import width_of


@dataclass(frozen=True)
class Cbq(Pass):
    """Learn rounding and scales of a window of blocks at a time, each block again with those after it.

    Source: CBQ (2312.07950), sections 3.1 and 3.3, with a loss that counts tokens alike; the window's inputs are those
    of the compressed blocks before.
    """

    bits: int = field(default=4, metadata={"help": "bits per code, 2 to 8, where the pass bits chose no other"})
    group: int = field(default=64, metadata={"help": "inputs that share a scale and zero point, 0 for whole rows"})
    symmetric: bool = field(default=False, metadata={"help": "a range around zero, without stored zero points"})
    window: int = field(default=2, metadata={"help": "blocks that are trained together"})
    stride: int = field(default=1, metadata={"help": "blocks that a window is ahead of the one before it"})
    rank: int = field(
        default=5, metadata={"help": "rank of what moves the rounding of a weight, 0 trains scales alone"}
    )
    epochs: int = field(default=5, metadata={"help": "times a window is trained on every sample"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=1e-2, metadata={"help": "learning rate of the variables of rounding"})
    scale_rate: float = field(default=5e-3, metadata={"help": "learning rate of scales, relative to their size"})
    loss: Literal["token", "plain"] = field(
        default="token", metadata={"help": "count tokens alike, or by their energy"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "cbq"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True)
    exact: ClassVar[bool] = False
    widths: ClassVar[range] = range(2, 9)

    def validate(self) -> None:
        """Raise OptionError for values training or codes cannot have."""
        whole = (("bits", 2, 8), ("group", 0, 1 << 20), ("window", 1, 64), ("rank", 0, 1 << 10))
        training = (("epochs", 0, 10**6), ("batch", 1, 10**6), ("rate", 0, 1), ("scale_rate", 0, 1))
        for option, low, high in (*whole, *training):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        if not 1 <= self.stride <= self.window:
            raise OptionError(self.name, "stride", f"{self.stride} is outside 1..{self.window}, the blocks of a window")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        sites = choose_sites(program, nodes, self.skip, Context())
        if self.group:
            check_group(sites, self.group, self.name)
        return [PlanRow(s.name, self.name, planned(self, s, width_of(program, s, self.bits))) for s in sites]

    def run(self, program: Program, ctx: Context) -> None:
        """Train window by window; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        parts = blocks(program)
        nodes = [n for block in parts for n in block.nodes]
        check_skip(program, self.skip, self.name)
        chosen = choose_sites(program, nodes, self.skip, ctx)
        if self.group:
            check_group(chosen, self.group, self.name)
        outside_blocks(program, nodes, self.skip, ctx)
        sites = [choose_sites(program, block.nodes, self.skip, Context()) for block in parts]
        windows, carried = _windows(len(parts), self.window, self.stride), dict[str, Tensor]()
        rows = by_rows(ctx, self.batch)
        for walked in walk(program, rows, "both", self.name):
            window = windows.get(walked.block.index)
            if window is None:
                continue
            if all(has_block(ctx.work, index) for index in window.finished):
                for index in window.finished:
                    restore_solved(program, sites[index], self.name, ctx, index)
                carried = _load_ahead(ctx, window)
                continue
            mine = [site for index in window.blocks for site in sites[index]]
            mark, state = ctx.log.mark(), self._trained(program, walked, window, mine, carried, ctx)
            finished = {site.node.name for index in window.finished for site in sites[index]}
            carried = {name: t for name, t in state.items() if name.partition("/")[0] not in finished}
            _save_ahead(ctx, window, carried)
            for index in window.finished:
                solved = self._coded(program, sites[index], state, ctx)
                save_solved(ctx, index, solved, None, ctx.log.since(mark))
                mark = ctx.log.mark()

    def _trained(
        self,
        program: Program,
        walked: Step,
        window: Window,
        sites: Sequence[LinearSite],
        carried: Mapping[str, Tensor],
        ctx: Context,
    ) -> dict[str, Tensor]:
        """Return the state of a window's sites after training; carried: where blocks trained before stand."""
        roundings = {site.node.name: self._rounding(program, site) for site in sites}
        start: dict[str, Tensor] = {}
        for number, (node, rounding) in enumerate(roundings.items()):
            fresh = rounding.start(self.rank, (ctx.seed << 16) + (window.blocks[0] << 8) + number)
            start |= {f"{node}/{part}": carried.get(f"{node}/{part}", t) for part, t in fresh.items()}
        if not start:
            return {}
        problem = self._problem(walked, window, {s.weight: (s.node.name, roundings[s.node.name]) for s in sites}, start)
        with products_in(ctx.precision):
            outcome = train(problem, Recipe(self.epochs), ctx.seed + window.blocks[0])
        problem.release()
        name = block_name(walked.block)
        report_outcome(ctx, name, outcome)
        losses = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
        ctx.log.report(site=name, blocks=float(len(window.blocks)), **losses)
        return outcome.state

    def _problem(
        self,
        walked: Step,
        window: Window,
        roundings: Mapping[str, tuple[str, LowRankRounding]],
        start: dict[str, Tensor],
    ) -> Problem:
        """Return the training of a window; roundings: by the weight's name, with that of the linear."""
        measure = token_loss if self.loss == "token" else plain_loss
        through = window.blocks[-1]
        function, targets = walked.function(tuple(roundings), through), walked.float_window(through)

        def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
            weights = {name: rounding.weight(_part(state, node)) for name, (node, rounding) in roundings.items()}
            return measure(function(weights, batch), targets[batch])

        def release() -> None:
            function.release()
            targets.clear()

        rates = {name: self.scale_rate if name.endswith("/steps") else self.rate for name in start}
        return Problem(start, rates, loss, function.batches, release)

    def _rounding(self, program: Program, site: LinearSite) -> LowRankRounding:
        weight = weights_of(program, [site], self.name).float()
        bits = width_of(program, site, self.bits)
        return lowrank_rounding(weight, bits, self.group or site.inputs, self.symmetric)

    def _coded(
        self, program: Program, sites: Sequence[LinearSite], state: Mapping[str, Tensor], ctx: Context
    ) -> dict[str, Solved]:
        """Put a block's codes in place and return them, by node."""
        solved: dict[str, Solved] = {}
        for site in sites:
            node, weight = site.node.name, program.params.get(site.weight).double()
            codes = packed(self._rounding(program, site).codes(_part(state, node)), self.symmetric)
            lost, whole = (float(row_energy(m, None).sum()) for m in (weight - codes.dequantize(torch.float64), weight))
            rows = figures(codes.stored_bits, site.rows, site.inputs, lost / whole if whole > 0 else 0.0)
            solved[node] = Solved(site, codes, rows)
            put_solved(program, solved[node], self.name, ctx)
        return solved

    def stored_bytes(self, site: LinearSite, bits: int) -> int:
        """Return the bytes of a site's codes, scales and zero points at a width."""
        return packed_bytes(site.rows, site.inputs, bits, self.group or site.inputs, self.symmetric)

    def trial(
        self, weight: Tensor, gram: Gram | None, choices: Sequence[int], site: LinearSite, ctx: Context
    ) -> list[Trial]:
        """Return the site rounded at each width as training starts."""
        del ctx
        return searched_trials(weight, gram, choices, self.group or site.inputs, self.symmetric)


@dataclass(frozen=True)
class Window:
    """Blocks that are trained together, and those of them that are coded once this is done."""

    blocks: range
    finished: range


def _windows(count: int, size: int, stride: int) -> dict[int, Window]:
    """Return the windows of `count` blocks by their first block; the last one finishes all that is left."""
    found: dict[int, Window] = {}
    for first in range(0, count, stride):
        end = min(first + size, count)
        found[first] = Window(range(first, end), range(first, count if end == count else first + stride))
        if end == count:
            break
    return found


def _part(state: Mapping[str, Tensor], node: str) -> dict[str, Tensor]:
    """Return a linear's part of the state."""
    return {part: state[f"{node}/{part}"] for part in ("steps", "left", "right")}


def _save_ahead(ctx: Context, window: Window, carried: dict[str, Tensor]) -> None:
    """Keep where blocks stand that a window trained and did not finish."""
    if ctx.work is not None:
        save_block(ctx.work / "ahead", window.blocks[0], carried, {})


def _load_ahead(ctx: Context, window: Window) -> dict[str, Tensor]:
    found = load_block(None if ctx.work is None else ctx.work / "ahead", window.blocks[0])
    return {} if found is None else found[0]
