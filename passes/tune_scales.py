"""`tune-scales`: scales and offsets of coded weights trained against the float model, block by block; codes stay.

Sources: ELUTQ (2510.19482, section 3.3) and AnyBCQ (2510.10467, section 3.2) tune the scales of binary codes so, PEQA
(2305.14152) those of uniform ones; here inputs come from the compressed blocks before, and offsets learn too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ir.analysis import Block, blocks, matches, site_name
from ir.decode import arguments, code_nodes, codes_of, decoded_name, is_coded
from ir.edit import Editor
from ir.errors import UsageError
from ir.ops.nested import NestedCodes
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.program import Program, is_call
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.equiv.operands import own_gain
from passes.equiv.rules import NORMS
from passes.sites import check_patterns
from passes.stream import Step, split_rows, walk
from passes.training.events import block_name, report_outcome
from passes.training.loop import Outcome, Recipe, train
from passes.training.loss import plain_loss, token_loss
from passes.training.scales import CodedWeight, coded_weight


@dataclass(frozen=True)
class TuneScales(Pass):
    """Train scales and offsets of coded weights so that each block comes close to the float model's."""

    epochs: int = field(default=5, metadata={"help": "times every sample is trained on"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=5e-3, metadata={"help": "learning rate, of scales relative to their size"})
    last_rate: float = field(default=0.05, metadata={"help": "share of the rate at the end of its cosine"})
    gains: bool = field(default=False, metadata={"help": "train the gains of norms as well"})
    loss: Literal["token", "plain"] = field(
        default="token", metadata={"help": "count tokens alike, or by their energy"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave as they are, `*` stands for any text"})

    name: ClassVar[str] = "tune-scales"
    level: ClassVar[tuple[str, str]] = ("compressed", "compressed")
    stage: ClassVar[Stage] = Stage.TUNE
    order_reason: ClassVar[str] = "it trains the scales of codes that are there"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True, original=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training cannot have."""
        for option, low, high in (("epochs", 0, 10**6), ("batch", 1, 10**6), ("last_rate", 0, 1), ("rate", 0, 1)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the coded sites whose scales are trained; none are known before weights are coded."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        return [PlanRow(site_name(n), self.name) for n in nodes if is_coded(n) and not self._skipped(n)]

    def run(self, program: Program, ctx: Context) -> None:
        """Train block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        if ctx.original is None:
            raise UsageError(
                f"pass {self.name} needs the float model to come close to",
                why="the weights were already coded when this run began",
                fix=f"put {self.name} into the pipeline that codes the weights, after the pass that does",
            )
        nodes = [n for block in blocks(program) for n in block.nodes]
        check_patterns([site_name(n) for n in nodes if is_coded(n)], self.skip, self.name)
        rows = replace(ctx, calibration=split_rows(ctx, self.batch))
        for walked in walk(program, rows, "both", self.name, ctx.original):
            chosen = self._chosen(program, walked.block, ctx)
            gains = self._own_gains(program, walked.block) if self.gains else []
            found = load_block(ctx.work, walked.block.index)
            if found is not None:
                tensors, facts = found
                _put(program, tensors, self.name)
                ctx.log.report(**facts)  # type: ignore[arg-type]
                continue
            if chosen:
                problem = _Problem(self, program, walked, chosen, gains, ctx)
                tensors, figures = problem.solve()
                _put(program, tensors, self.name)
                ctx.log.report(**figures)  # type: ignore[arg-type]
                save_block(ctx.work, walked.block.index, tensors, figures)

    def _chosen(self, program: Program, block: Block, ctx: Context) -> list[fx.Node]:
        """Return a block's coded linears that are trained; the others are recorded with the reason."""
        chosen = []
        for node in (program.node(n.name) for n in block.nodes if is_coded(n)):
            if self._skipped(node):
                ctx.log.skip(site_name(node), "the option skip names it", asked=True)
            else:
                chosen.append(node)
        if not chosen:
            ctx.log.skip(block_name(block), "none of its linears is coded")
        return chosen

    def _skipped(self, node: fx.Node) -> bool:
        return any(matches(pattern, site_name(node)) for pattern in self.skip)

    def _own_gains(self, program: Program, block: Block) -> list[str]:
        editor = Editor(program, self.name)
        return [own_gain(editor, node) for node in block.nodes if is_call(node, *NORMS)]


@dataclass
class _Problem:
    """A block to be trained: its coded weights, and the gains of its norms where they are trained too."""

    how: TuneScales
    program: Program
    walked: Step
    nodes: Sequence[fx.Node]
    gains: Sequence[str]
    ctx: Context

    def solve(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the parameters that training changed, by name, and the block's figures."""
        weights = {node.name: _weight(node, self.program) for node in self.nodes}
        outcome = self._train(weights)
        name = block_name(self.walked.block)
        report_outcome(self.ctx, name, outcome)
        changed = {gain: self._gain(outcome.state, gain) for gain in self.gains}
        for node in self.nodes:
            codes = weights[node.name].coded(_part(outcome.state, node.name))
            changed |= _changed(node, codes, self.program)
        figures = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
        return changed, {"site": name, **figures}

    def _train(self, weights: Mapping[str, CodedWeight]) -> Outcome:
        targets = self.walked.float_exits()
        measure = token_loss if self.how.loss == "token" else plain_loss
        names = {node.name: decoded_name(node) for node in self.nodes}
        block = self.walked.function((*names.values(), *self.gains))

        def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
            params = {names[site]: weight.weight(_part(state, site)) for site, weight in weights.items()}
            params |= {name: self._gain(state, name) for name in self.gains}
            return measure(block(params, batch), targets[batch])

        start = {f"{site}/{part}": t for site, weight in weights.items() for part, t in weight.start().items()}
        start |= {f"gain/{name}": torch.zeros_like(self.program.params.get(name)) for name in self.gains}
        recipe = Recipe(self.how.epochs, self.how.last_rate)
        seed = self.ctx.seed + self.walked.block.index
        outcome = train(start, dict.fromkeys(start, self.how.rate), loss, block.batches, recipe, seed)
        block.release()
        return outcome

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


def _put(program: Program, tensors: Mapping[str, Tensor], by: str) -> None:
    editor = Editor(program, by)
    for name, tensor in tensors.items():
        editor.param(name, tensor)
