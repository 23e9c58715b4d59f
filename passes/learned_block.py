"""A block as `omniquant` trains it: strengths of clipping, scales of its groups, and the weights these make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ir.analysis import LinearSite, sibling_sites
from ir.ops.quant import QuantCodes
from ir.products import products_in
from ir.program import Program
from passes.activations import Shelf
from passes.base import Context
from passes.gptq import Gptq
from passes.moments import moments_of
from passes.presets import Settled
from passes.quantize.clipping import START, clipped, clipped_codes
from passes.quantize.salience import relative_loss, row_energy
from passes.quantize.uniform import best_shares, packed
from passes.sites import choose_sites, figures
from passes.solved import Solved, put_solved
from passes.stream import Callback, Step
from passes.training.events import block_name, report_outcome
from passes.training.loop import Outcome, Problem, Recipe, judge, train
from passes.training.loss import plain_loss, token_loss
from passes.training.transforms import Transforms, drop_idle, transforms
from passes.widths import width_of

if TYPE_CHECKING:
    from passes.omniquant import Omniquant

# The widest open that strengths start: a share of 0.9975 of the range.
_WIDEST = 6.0


@dataclass
class LearnedBlock:
    """A block to be trained: what is learned of it, and what that makes of its weights."""

    how: Omniquant
    settled: Settled
    program: Program
    walked: Step
    parts: Transforms
    ctx: Context

    def __post_init__(self) -> None:
        self.sites = self._sites()
        names = dict.fromkeys((*self.parts.names, *(site.weight for site in self.sites)))
        self.originals = {name: self.program.params.get(name) for name in names}
        self.widths = {site.node.name: width_of(self.program, site, self.settled.bits) for site in self.sites}

    def _sites(self) -> list[LinearSite]:
        return choose_sites(self.program, self.walked.block.nodes, self.how.skip, Context())

    def solve(self, scales: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Solved]]:
        """Train the block and put the result in place; return what stays float, by name, and the codes, by node.

        scales: of each group at the start, by site.
        """
        targets = [self.walked.float_exits()]
        if self.how.second:
            targets.append(self.walked.original_exits())
        problem = self.problem(scales, targets)
        recipe = Recipe(self.settled.epochs, self.how.last_rate)
        with products_in(self.ctx.precision):
            outcome = train(problem, recipe, self.ctx.seed + self.walked.block.index)
        problem.release()
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
        solved = self._code(state, targets)
        self._report(outcome, targets)
        for extra in targets[1:]:
            extra.clear()
        return {name: tensor for name, tensor in floats.items() if name not in coded}, solved

    def _put(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            program.params.put(name, tensor, self.how.name)

    def _report(self, outcome: Outcome, targets: list[Shelf]) -> None:
        """Report the block's loss at the start, after training and as it is stored, and what happened on the way."""
        block, stored = self.walked.block, self.walked.function(())
        name = block_name(block)
        with products_in(self.ctx.precision):
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
        group, shape = self.settled.group_of(site), (2, site.rows, -(-site.inputs // self.settled.group_of(site)))
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
                self.settled.group_of(site),
                self.how.symmetric,
                zero_moves="zeros" not in self.how.legacy,
            )
        return found

    def _measure(self, found: Tensor, targets: list[Shelf], batch: int) -> Tensor:
        measure = token_loss if self.how.loss == "token" else plain_loss
        return sum((measure(found, target[batch]) for target in targets), torch.zeros(()))

    def problem(self, scales: Mapping[str, Tensor], targets: list[Shelf]) -> Problem:
        """Return what is trained; arguments as for `solve`, and where the block's exit should be, batch by batch."""
        block, start = self.walked.function(tuple(self.originals)), self._start(scales)

        def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
            return self._measure(block(self._effective(state), batch), targets, batch)

        rates = {name: self.how.clip_rate if name.startswith("clip:") else self.how.scale_rate for name in start}
        return Problem(start, rates, loss, block.batches, block.release)

    def _code(self, state: Mapping[str, Tensor], targets: list[Shelf]) -> dict[str, Solved]:
        """Put the codes of all sites in place; their weights are transformed by now."""
        strengths = {site.node.name: state[f"clip:{site.node.name}"] for site in self.sites}
        if self.how.rounding == "gptq":
            solved = self._by_gptq({node: torch.sigmoid(s) for node, s in strengths.items()}, targets)
        else:
            solved = self._to_nearest(strengths)
        for row in solved.values():
            put_solved(self.program, row, self.how.name, self.ctx)
        return solved

    def _to_nearest(self, strengths: Mapping[str, Tensor]) -> dict[str, Solved]:
        """Return the weights rounded to the nearest levels of the learned ranges."""
        solved: dict[str, Solved] = {}
        for group, known in moments_of(self.walked, sibling_sites(self.sites), False, False):
            for site in group:
                node, weight = site.node.name, self.program.params.get(site.weight)
                size, symmetric = self.settled.group_of(site), self.how.symmetric
                codes = packed(clipped_codes(weight, strengths[node], self.widths[node], size, symmetric), symmetric)
                gram = known.gram if bool(known.gram.matrix.diagonal().any()) else None
                off, whole = weight.double() - codes.dequantize(torch.float64), weight.double()
                loss = relative_loss(row_energy(off, gram), row_energy(whole, gram))
                solved[node] = Solved(site, codes, figures(codes.stored_bits, site.rows, site.inputs, loss))
        return solved

    def _by_gptq(self, shares: Mapping[str, Tensor], targets: list[Shelf]) -> dict[str, Solved]:
        """Return codes by `gptq` in the learned ranges or in ranges it searches, whichever leave the block closer.

        Ranges learned for rounding to nearest are not always the best for weights that make up for each other.
        """
        fit = Gptq(self.settled.bits, self.settled.group, self.how.symmetric, skip=self.how.skip)
        moments = list(moments_of(self.walked, sibling_sites(self.sites), True, False))
        found: list[tuple[float, dict[str, Solved]]] = []
        for given in (shares, dict.fromkeys(shares)):
            rows = [fit.fit(self.program, site, m, given[site.node.name]) for group, m in moments for site in group]
            found.append((self._lost(rows, targets), {row.site.node.name: row for row in rows}))
        (learned, _), (searched, _) = found
        name = block_name(self.walked.block)
        self.ctx.log.report(site=name, loss_learned_ranges=learned, loss_searched_ranges=searched)
        return found[1][1] if searched < learned else found[0][1]

    def _lost(self, rows: list[Solved], targets: list[Shelf]) -> float:
        """Return the block's loss with these codes in place of their weights."""
        weights = {row.site.weight: row.codes.dequantize() for row in rows if isinstance(row.codes, QuantCodes)}
        block = self.walked.function(tuple(weights))
        with products_in(self.ctx.precision):
            found = judge({}, lambda _, batch: self._measure(block(weights, batch), targets, batch), block.batches)
        block.release()
        return found
