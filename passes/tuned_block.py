"""A block as `tune-scales` trains it: its coded weights, and the gains of its norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ir.decode import arguments, code_nodes, codes_of, decoded_name
from ir.ops.nested import NestedCodes
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.products import products_in
from ir.program import Program
from passes.activations import Shelf
from passes.base import Context
from passes.stream import Step
from passes.training.events import block_name, report_outcome
from passes.training.loop import Problem, Recipe, train
from passes.training.loss import plain_loss, token_loss
from passes.training.scales import CodedWeight, coded_weight

if TYPE_CHECKING:
    from passes.tune_scales import TuneScales


@dataclass
class TunedBlock:
    """A block to be trained: its coded weights, and the gains of its norms where they are trained too."""

    how: TuneScales
    program: Program
    walked: Step
    nodes: Sequence[fx.Node]
    gains: Sequence[str]
    ctx: Context

    def __post_init__(self) -> None:
        self.weights = {node.name: _weight(node, self.program) for node in self.nodes}

    def solve(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the parameters that training changed, by name, and the block's figures."""
        problem = self.problem(self.walked.float_exits())
        recipe = Recipe(self.how.epochs, self.how.last_rate)
        with products_in(self.ctx.precision):
            outcome = train(problem, recipe, self.ctx.seed + self.walked.block.index)
        problem.release()
        name = block_name(self.walked.block)
        report_outcome(self.ctx, name, outcome)
        changed = {gain: self._gain(outcome.state, gain) for gain in self.gains}
        for node in self.nodes:
            codes = self.weights[node.name].coded(_part(outcome.state, node.name))
            changed |= _changed(node, codes, self.program)
        figures = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
        return changed, {"site": name, **figures}

    def problem(self, targets: Shelf) -> Problem:
        """Return what is trained; targets: where the block's exit should be, batch by batch."""
        measure = token_loss if self.how.loss == "token" else plain_loss
        names = {node.name: decoded_name(node) for node in self.nodes}
        block = self.walked.function((*names.values(), *self.gains))

        def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
            params = {names[site]: weight.weight(_part(state, site)) for site, weight in self.weights.items()}
            params |= {name: self._gain(state, name) for name in self.gains}
            return measure(block(params, batch), targets[batch])

        start = {f"{site}/{part}": t for site, weight in self.weights.items() for part, t in weight.start().items()}
        start |= {f"gain/{name}": torch.zeros_like(self.program.params.get(name)) for name in self.gains}
        return Problem(start, dict.fromkeys(start, self.how.rate), loss, block.batches, block.release)

    def _gain(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        return self.program.params.get(name) * (1 + state[f"gain/{name}"])


def _weight(node: fx.Node, program: Program) -> CodedWeight:
    codes = codes_of(node, program.params.get)
    return coded_weight(codes.at(arguments(node)["precision"]) if isinstance(codes, NestedCodes) else codes)


def _part(state: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
    """Return a site's part of the state."""
    return {name.rpartition("/")[2]: t for name, t in state.items() if name.rpartition("/")[0] == site}


def _changed(node: fx.Node, codes: QuantCodes | ShiftCodes, program: Program) -> dict[str, Tensor]:
    """Return the parameters of a coded linear that differ from those stored, by name."""
    values, stored = arguments(node), code_nodes(node)
    which = list(values["precisions"]).index(values["precision"]) if "precision" in values else 0
    found: dict[str, Tensor] = {}
    for part in ("scales", "exponents", "offsets"):
        if part in stored and getattr(codes, part) is not None:
            name = str(stored[part][which].target)
            if not torch.equal(program.params.get(name), getattr(codes, part)):
                found[name] = getattr(codes, part)
    return found
