"""`omniquant`: clipping and equivalent transforms, learned together block by block and folded away (OmniQuant)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ir.analysis import Block, LinearSite, blocks
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import has_block
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup
from passes.gptq import Gptq
from passes.quantize.clipping import START, clipped, clipped_codes
from passes.quantize.salience import row_energy
from passes.quantize.uniform import best_shares, packed, packed_bytes
from passes.scale_search import SearchSpec, reads, search_block
from passes.sites import check_group, check_skip, choose_sites, figures, outside_blocks, weights_of
from passes.smooth import Site
from passes.solved import Solved, put_solved, restore_floats, restore_solved, save_solved
from passes.stream import Callback, Step, split_rows, walk
from passes.training.events import block_name, report_outcome
from passes.training.loop import Outcome, Recipe, judge, train
from passes.training.loss import plain_loss, token_loss
from passes.training.transforms import Transforms, drop_idle, transforms
from passes.widths import width_of

# The widest open that strengths start: a share of 0.9975 of the range.
_WIDEST = 6.0
# Exponents tried in the search for scales.
_EXPONENTS = 20


@dataclass(frozen=True)
class Omniquant(Pass):
    """Learn what each group's range is cut to, and scales between weights, and store the weights as uniform codes.

    Source: OmniQuant (2308.13137), sections 3.1 to 3.3, with scales that are exact under rotary embedding and
    grouped-query attention, and a loss that counts every token alike.
    """

    bits: int = field(default=4, metadata={"help": "bits per code, 2 to 8, where the pass bits chose no other"})
    group: int = field(default=64, metadata={"help": "inputs that share a scale and zero point, 0 for whole rows"})
    symmetric: bool = field(default=False, metadata={"help": "a range around zero, without stored zero points"})
    sites: tuple[Site, ...] = field(
        default=("norm->linears", "v->o", "up->down"), metadata={"help": "kinds of groups whose scales are learned"}
    )
    shift: bool = field(default=False, metadata={"help": "learn a shift beside the scales where one is exact"})
    init: Literal["awq", "ones"] = field(
        default="awq", metadata={"help": "what scales start from: the search of the pass awq, or ones"}
    )
    clip: Literal["search", "open"] = field(
        default="search", metadata={"help": "what clipping starts from: the best range of a search, or 0.982 of all"}
    )
    rounding: Literal["nearest", "gptq"] = field(
        default="nearest", metadata={"help": "how codes are chosen in the learned ranges at the end"}
    )
    epochs: int = field(default=10, metadata={"help": "times every sample is trained on"})
    batch: int = field(default=2, metadata={"help": "samples a step"})
    clip_rate: float = field(default=5e-2, metadata={"help": "learning rate of the strengths of clipping"})
    scale_rate: float = field(default=5e-3, metadata={"help": "learning rate of scales and shifts"})
    last_rate: float = field(default=0.05, metadata={"help": "share of the rates at the end of their cosine"})
    loss: Literal["token", "plain"] = field(
        default="token", metadata={"help": "count tokens alike, or by their energy as the paper does"}
    )
    second: bool = field(default=False, metadata={"help": "a second target: the float block on compressed inputs"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "omniquant"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training or codes cannot have."""
        ranges = (("bits", 2, 8), ("group", 0, 1 << 20), ("epochs", 0, 10**6), ("batch", 1, 10**6))
        for option, low, high in (*ranges, ("last_rate", 0, 1)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        for option in ("clip_rate", "scale_rate"):
            if not 0 <= getattr(self, option) < 1:
                raise OptionError(self.name, option, f"{getattr(self, option)} is outside 0..1")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take, and the groups whose scales are learned."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        sites = choose_sites(program, nodes, self.skip, Context())
        self._check_group(sites)
        rows = [PlanRow(s.name, self.name, self._predicted(s, width_of(program, s, self.bits))) for s in sites]
        groups = [g for block in blocks(program) for g in _inside(discover(program).of(*self.sites), block)]
        return [*rows, *(PlanRow(g.site, f"learn the scales of {g.kind}") for g in groups)]

    def run(self, program: Program, ctx: Context) -> None:
        """Train block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        check_skip(program, self.skip, self.name)
        self._check_group(choose_sites(program, nodes, self.skip, ctx))
        outside_blocks(program, nodes, self.skip, ctx)
        found = discover(program)
        for absence in found.absences:
            if absence.kind in self.sites:
                ctx.log.skip(absence.site, absence.reason)
        rows = replace(ctx, calibration=split_rows(ctx, self.batch))
        for walked in walk(program, rows, "both", self.name):
            groups = _inside(found.of(*self.sites), walked.block)
            done, mark = has_block(ctx.work, walked.block.index), ctx.log.mark()
            scales = {} if done else self._searched(program, groups, walked, ctx)
            parts = transforms(program, groups, self.shift, self.name)
            if done:
                self._restore(program, parts, walked.block, ctx)
                continue
            floats, solved = _Problem(self, program, walked, parts, ctx).solve(scales)
            save_solved(ctx, walked.block.index, solved, floats, ctx.log.since(mark))

    def _restore(self, program: Program, parts: Transforms, block: Block, ctx: Context) -> None:
        """Put what an earlier run made of a block in place."""
        restore_floats(program, self.name, ctx, block.index)
        drop_idle(program, parts, self.name)
        sites = choose_sites(program, block.nodes, self.skip, Context())
        restore_solved(program, sites, self.name, ctx, block.index)

    def _searched(
        self, program: Program, groups: Sequence[EquivGroup], walked: Step, ctx: Context
    ) -> dict[str, Tensor]:
        """Return the scales that training starts from, float64 by site."""
        for site in choose_sites(program, walked.block.nodes, self.skip, Context()):
            weights_of(program, [site], self.name)
        scales = {group.site: torch.ones(group.size, dtype=torch.float64) for group in groups}
        read = [group for group in groups if reads(group, walked.block)]
        if self.init == "awq" and read:
            spec = SearchSpec(self.bits, self.group, self.symmetric, _EXPONENTS)
            scales.update({g.site: s for g, s in search_block(program, read, walked, spec, ctx)})
        return scales

    def group_of(self, site: LinearSite) -> int:
        """Return the inputs of a site that share a scale."""
        return self.group or site.inputs

    def _check_group(self, sites: Sequence[LinearSite]) -> None:
        if self.group:
            check_group(sites, self.group, self.name)

    def _predicted(self, site: LinearSite, bits: int) -> dict[str, float]:
        size, weights = packed_bytes(site.rows, site.inputs, bits, self.group_of(site), self.symmetric), site.rows
        return {
            "bits": 8 * size / (weights * site.inputs),
            "bytes": float(size),
            "weights": float(weights * site.inputs),
        }


@dataclass
class _Problem:
    """A block to be trained: what is learned of it, and what that makes of its weights."""

    how: Omniquant
    program: Program
    walked: Step
    parts: Transforms
    ctx: Context

    def __post_init__(self) -> None:
        self.sites = self._sites()
        names = dict.fromkeys((*self.parts.names, *(site.weight for site in self.sites)))
        self.originals = {name: self.program.params.get(name) for name in names}
        self.widths = {site.node.name: width_of(self.program, site, self.how.bits) for site in self.sites}

    def _sites(self) -> list[LinearSite]:
        return choose_sites(self.program, self.walked.block.nodes, self.how.skip, Context())

    def solve(self, scales: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Solved]]:
        """Train the block and put the result in place; return what stays float, by name, and the codes, by node.

        scales: of each group at the start, by site.
        """
        targets = [self.walked.float_exits()]
        if self.how.second:
            targets.append(self.walked.original_exits())
        outcome = self._train(self._start(scales), targets)
        state = outcome.state
        with torch.no_grad():
            floats = self._transformed(state)
        if self.how.rounding == "gptq":  # it compares values inside the block, which must be the same on both sides
            transforms(self.walked.original, self.parts.groups, self.how.shift, self.how.name)
            self._put(self.walked.original, floats)
        self._put(self.program, floats)
        drop_idle(self.program, self.parts, self.how.name)
        coded = {site.weight for site in self.sites}
        self.sites = self._sites()
        solved = self._code(state)
        self._report(outcome, targets)
        return {name: tensor for name, tensor in floats.items() if name not in coded}, solved

    def _put(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            program.params.put(name, tensor, self.how.name)

    def _report(self, outcome: Outcome, targets: list[list[Tensor]]) -> None:
        """Report the block's loss at the start, after training and as it is stored, and what happened on the way."""
        block, stored = self.walked.block, self.walked.function(())
        name = block_name(block)
        found = judge({}, lambda _, batch: self._measure(stored({}, batch), targets, batch), stored.batches)
        stored.release()
        report_outcome(self.ctx, name, outcome)
        figures = {"loss_before": outcome.before, "loss_after": outcome.after, "loss_stored": found}
        self.ctx.log.report(site=name, **figures, epochs=float(outcome.epochs))

    def _start(self, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to learn at their start, float32: logs of scales, shifts, strengths of clipping."""
        energy = self._energies()
        state = {f"scale:{site}": s.log().float() for site, s in scales.items()}
        sizes = {group.site: group.size for group in self.parts.groups}
        state |= {f"shift:{site}": torch.zeros(sizes[site]) for site in sorted(self.parts.shifted)}
        with torch.no_grad():
            weights = self.originals | self._transformed(state)
        for site in self.sites:
            # An input is as strong as it was before its weights were multiplied.
            spread = weights[site.weight].square().sum(0) / self.originals[site.weight].square().sum(0).clamp(min=1e-30)
            strength = energy[site.node.name] / spread.double().clamp(min=1e-30)
            state[f"clip:{site.node.name}"] = self._strengths(site, weights[site.weight], strength)
        return state

    def _strengths(self, site: LinearSite, weight: Tensor, energy: Tensor) -> Tensor:
        """Return the strengths of clipping at the start, [2, N, G]."""
        group, shape = self.how.group_of(site), (2, site.rows, -(-site.inputs // self.how.group_of(site)))
        if self.how.clip == "open":
            return torch.full(shape, START)
        known = energy if bool(energy.any()) else None
        bits = self.widths[site.node.name]
        share = best_shares(weight, bits, group, self.how.symmetric, importance=known)
        return torch.logit(share.double()).clamp(max=_WIDEST).float().expand(shape).clone()

    def _energies(self) -> dict[str, Tensor]:
        """Return the summed squares of each site's inputs on the compressed stream, float64 [K], by node name."""
        sums: dict[fx.Node, Tensor] = {}

        def adding(node: fx.Node) -> Callback:
            def add(x: Tensor) -> None:
                seen = x.flatten(0, -2).square().sum(0, dtype=torch.float64)
                sums[node] = sums[node] + seen if node in sums else seen

            return add

        inputs = {site.node.name: site.node.args[0] for site in self.sites}
        self.walked.observe({x: adding(x) for x in dict.fromkeys(inputs.values())})  # type: ignore[misc, arg-type]
        return {name: sums[x] for name, x in inputs.items()}  # type: ignore[index]

    def _transformed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that groups change, before rounding."""
        scales = {g.site: state[f"scale:{g.site}"].exp() for g in self.parts.groups}
        return self.parts.apply(self.originals, scales, {s: state[f"shift:{s}"] for s in self.parts.shifted})

    def _effective(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all parameters that training changes, weights rounded."""
        found = self.originals | self._transformed(state)
        for site in self.sites:
            node = site.node.name
            found[site.weight] = clipped(
                found[site.weight],
                state[f"clip:{node}"],
                self.widths[node],
                self.how.group_of(site),
                self.how.symmetric,
            )
        return found

    def _measure(self, found: Tensor, targets: list[list[Tensor]], batch: int) -> Tensor:
        measure = token_loss if self.how.loss == "token" else plain_loss
        return sum((measure(found, target[batch]) for target in targets), torch.zeros(()))

    def _train(self, start: dict[str, Tensor], targets: list[list[Tensor]]) -> Outcome:
        block = self.walked.function(tuple(self.originals))

        def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
            return self._measure(block(self._effective(state), batch), targets, batch)

        rates = {name: self.how.clip_rate if name.startswith("clip:") else self.how.scale_rate for name in start}
        recipe = Recipe(self.how.epochs, self.how.last_rate)
        seed = self.ctx.seed + self.walked.block.index
        outcome = train(start, rates, loss, block.batches, recipe, seed)
        block.release()
        return outcome

    def _code(self, state: Mapping[str, Tensor]) -> dict[str, Solved]:
        """Put the codes of all sites in place; their weights are transformed by now."""
        if self.how.rounding == "gptq":
            shares = {s.node.name: torch.sigmoid(state[f"clip:{s.node.name}"]) for s in self.sites}
            fit = Gptq(self.how.bits, self.how.group, self.how.symmetric, skip=self.how.skip)
            return fit.round_block(self.program, self.walked, self.sites, self.ctx, self.how.name, shares)
        solved: dict[str, Solved] = {}
        for site in self.sites:
            node, weight = site.node.name, self.program.params.get(site.weight)
            group, symmetric = self.how.group_of(site), self.how.symmetric
            codes = packed(clipped_codes(weight, state[f"clip:{node}"], self.widths[node], group, symmetric), symmetric)
            lost, whole = (
                float(row_energy(m, None).sum()) for m in (weight.double() - codes.dequantize(torch.float64), weight)
            )
            rows = figures(codes.stored_bits, site.rows, site.inputs, lost / whole if whole > 0 else 0.0)
            solved[node] = Solved(site, codes, rows)
            put_solved(self.program, solved[node], self.how.name, self.ctx)
        return solved


def _inside(groups: Sequence[EquivGroup], block: Block) -> list[EquivGroup]:
    """Return the groups that lie in a block whole."""
    names = {node.name for node in block.nodes}
    return [group for group in groups if all(slot.node in names for slot in group.slots)]
