"""`ast`: masks and weights trained together against the float model's predictions (Adaptive Sparse Trainer)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from ir.analysis import Block, LinearSite, blocks
from ir.edit import Editor
from ir.errors import UnsupportedError
from ir.products import products_in
from ir.program import Program, is_call
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.equiv.operands import own_gain
from passes.equiv.rules import NORMS
from passes.sites import check_group, check_skip, choose_sites, dense_weight, weights_of
from passes.sparsify.branches import branch_params
from passes.sparsify.masks import PACKED, TRAINED, Mask, foresee_masks, kept_group, mask_of, pattern_at, put_mask
from passes.sparsify.pattern import DENSE, Pattern, nm_mask, pattern_of
from passes.sparsify.scores import magnitude
from passes.stream import Step, by_rows, counted_in, token_batches, walk
from passes.training.events import report_outcome
from passes.training.loop import Outcome, Problem, Recipe, split, train
from passes.training.loss import distilled_loss
from passes.training.masked import CHANGES, FREE, MASK, WEIGHT, Annealing, MaskCourse, MaskedWeights, Norm
from passes.training.whole import teacher_of, whole_function

# Rows of the log of changes in a report.
_ROWS = 10


@dataclass(frozen=True)
class Ast(Pass):
    """Train masked weights, dropped ones too, so that masks follow them, towards the float model's predictions.

    Source: AST (2407.20584): annealed decay of dropped weights (section 3.2), self-distillation (section 3.3).
    """

    pattern: str = field(
        default="2:4",
        metadata={"help": "n:m of weights without a mask, whose largest stay; none: train them dense, as a control"},
    )
    epochs: int = field(default=1, metadata={"help": "times every sample is trained on"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=1e-4, metadata={"help": "learning rate"})
    branches: float = field(
        default=0.1,
        metadata={"help": "share of that rate for branches beside linears, whose two factors multiply what each moves"},
    )
    last_rate: float = field(default=0.1, metadata={"help": "share of the rate at the end of its cosine"})
    warmup: float = field(default=0.1, metadata={"help": "share of all steps over which the rate rises from zero"})
    teacher: float = field(
        default=0.67, metadata={"help": "share of the loss that is the distance to the float model; the rest is text"}
    )
    temperature: float = field(default=2.0, metadata={"help": "by which predictions are softened in that distance"})
    decay: float = field(
        default=6e-5, metadata={"help": "pull of dropped weights towards zero, before AdamW scales it"}
    )
    norm: Norm = field(default="l2", metadata={"help": "l2 pulls by a weight's size, l1 by a constant (CAST)"})
    ramp: float = field(default=0.25, metadata={"help": "share of all steps over which the decay rises, 0 for none"})
    every: int = field(default=10, metadata={"help": "steps between renewals of the masks, 0 keeps them"})
    freeze: float = field(default=0.1, metadata={"help": "share of all steps at the end in which masks stay"})
    revive: float = field(
        default=0.9,
        metadata={"help": "dropped weights start as they were, at most so much of the least kept one of their group"},
    )
    bits: int = field(
        default=0, metadata={"help": "round kept weights to this width in every step, as rtn after it does; 0: floats"}
    )
    group: int = field(default=64, metadata={"help": "inputs that share a scale there"})
    gains: bool = field(default=True, metadata={"help": "train the gains of norms as well"})
    recompute: bool = field(
        default=True,
        metadata={"help": "run each block again on the way back: a quarter more work, and memory for one block only"},
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave as they are, `*` stands for any text"})

    name: ClassVar[str] = "ast"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.SPARSIFY
    order_reason: ClassVar[str] = "it trains weights before they become codes"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"masks", TRAINED})
    refuses: ClassVar[frozenset[str]] = frozenset()
    closes_with: ClassVar[str] = "pack"
    data: ClassVar[Calib | None] = Calib("float", gradients=True, original=True, tokens=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values training cannot have."""
        try:
            self._wanted()
        except ValueError as error:
            raise OptionError(self.name, "pattern", str(error), fix="use one such as 2:4") from None
        names = ("rate", "branches", "last_rate", "warmup", "teacher", "ramp", "freeze", "revive")
        shares = [(option, 0.0, 1.0) for option in names]
        counts = [("epochs", 0.0, 1e6), ("batch", 1.0, 1e6), ("every", 0.0, 1e6), ("decay", 0.0, 1e6)]
        for option, low, high in (*shares, *counts):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low:g}..{high:g}")
        if self.bits not in (0, *range(2, 9)):
            raise OptionError(self.name, "bits", f"{self.bits} is neither 2..8 nor 0")
        if self.bits:
            kept_group(self.group, self._wanted(), self.name)
        if not 0 < self.temperature <= 100:
            raise OptionError(self.name, "temperature", f"{self.temperature} is outside (0, 100]")

    def inserts(self) -> frozenset[str]:
        """Return what masked weights are packed for."""
        return frozenset() if self._wanted() == DENSE else PACKED

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites that are trained."""
        return [PlanRow(s.name, "train under a mask") for part in blocks(program) for s in self._sites(program, part)]

    def foresee(self, program: Program) -> None:
        """Note which weights will have a mask."""
        for block in blocks(program):
            new = [s for s in self._sites(program, block) if pattern_at(program, s) is None]
            if self._wanted() != DENSE:
                foresee_masks(program, new, self._wanted())

    def run(self, program: Program, ctx: Context) -> None:
        """Train; the run is kept after every epoch in `ctx.work`, and taken from there on a resumed run."""
        check_skip(program, self.skip, self.name)
        sites = [site for block in blocks(program) for site in self._sites(program, block, ctx)]
        if not sites:
            raise UnsupportedError("there is no weight to train under a mask", where=program.name)
        if self.bits:
            check_group(sites, self.group, self.name)
        masks = {site.weight: self._mask(program, site) for site in sites}
        parts = [self._part(program, block) for block in blocks(program)]
        rows = by_rows(ctx, self.batch)
        for walked in walk(program, rows, "float", f"{self.name}, float model", ctx.original):
            if walked.block.index == len(parts) - 1:
                problem = self._problem(program, sites, parts, masks, walked, rows)
                step = ctx.log.progress(self.epochs * len(split(problem.batches)[0]), self.name)
                with products_in(ctx.precision):
                    outcome = train(problem, self._recipe(), ctx.seed, step, ctx.work)
                problem.release()
        self._put(program, sites, masks, outcome, ctx)

    def _recipe(self) -> Recipe:
        return Recipe(self.epochs, self.last_rate, warmup=self.warmup)

    def _wanted(self) -> Pattern:
        """Return the pattern of weights without a mask."""
        return DENSE if self.pattern == "none" else pattern_of(self.pattern)

    def _sites(self, program: Program, block: Block, ctx: Context | None = None) -> list[LinearSite]:
        """Return a block's sites that have a mask or fit the pattern; the others are recorded where a log is given."""
        ctx, pattern, found = ctx or Context(), self._wanted(), []
        for site in choose_sites(program, block.nodes, self.skip, ctx):
            if pattern_at(program, site) is not None or pattern.fits(site.inputs):
                found.append(site)
            else:
                ctx.log.skip(site.name, f"its {site.inputs} inputs are no multiple of the pattern {pattern}")
        return found

    def _mask(self, program: Program, site: LinearSite) -> Mask:
        mask, pattern = mask_of(program, site), self._wanted()
        return mask or Mask(nm_mask(magnitude(weights_of(program, [site], self.name)), pattern), pattern)

    def _part(self, program: Program, block: Block) -> MaskedWeights:
        weights = tuple(site.weight for site in self._sites(program, block))
        norms = [n for n in block.nodes if is_call(n, *NORMS)] if self.gains else []
        editor = Editor(program, self.name)
        gains = tuple(own_gain(editor, norm) for norm in norms)
        operands = [a for n in block.nodes for a in n.args if isinstance(a, fx.Node)]
        read = {str(a.target) for a in operands if a.op == "get_attr"}
        branches = tuple(sorted(branch_params(program) & read))
        return MaskedWeights(weights, (*gains, *branches), self.bits, self.group)

    def _problem(
        self,
        program: Program,
        sites: list[LinearSite],
        parts: list[MaskedWeights],
        masks: Mapping[str, Mask],
        last: Step,
        ctx: Context,
    ) -> Problem:
        """Return what is trained; last: the last block of a walk on the float model."""
        rows = token_batches(ctx, program, f"pass {self.name}")
        model, teacher = whole_function(program, [part.free for part in parts], self.recompute), teacher_of(last)

        def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
            ids = rows[batch]
            values = model.start(ids)
            logits = model.logits(model.exits([partial(part.params, state) for part in parts], values), values)
            wanted = teacher.logits(ids, batch) if self.teacher > 0 else logits
            return distilled_loss(logits, wanted, ids, self.teacher, self.temperature, counted_in(ctx, batch))

        def release() -> None:
            model.release()
            teacher.release()

        start = {WEIGHT + s.weight: self._dense(program, last.original, s, masks[s.weight]) for s in sites}
        start |= {FREE + name: program.params.get(name) for part in parts for name in part.others}
        how = Annealing(self.decay, self.norm, self.ramp, self.every, self.freeze)
        kept, patterns = ({n: getattr(m, part) for n, m in masks.items()} for part in ("kept", "pattern"))
        course = MaskCourse(kept, patterns, how, self.epochs * len(split(len(rows))[0]))
        rates = dict.fromkeys(start, self.rate)
        rates |= dict.fromkeys(
            rates.keys() & {FREE + name for name in branch_params(program)}, self.rate * self.branches
        )
        return Problem(start, rates, loss, len(rows), release, course)

    def _dense(self, program: Program, original: Program, site: LinearSite, mask: Mask) -> Tensor:
        """Return a site's weight with its dropped entries as they were, small enough that none is among the largest."""
        weight = program.params.get(site.weight)
        before = dense_weight(program, original, site, self.name).to(weight.dtype)
        groups = torch.where(mask.kept, weight.abs(), torch.inf).unflatten(1, (-1, mask.pattern.m))
        limit = (self.revive * groups.amin(-1, keepdim=True)).expand(groups.shape).flatten(1)
        return torch.where(mask.kept, weight, torch.clamp(before, -limit, limit))

    def _put(
        self, program: Program, sites: list[LinearSite], masks: Mapping[str, Mask], outcome: Outcome, ctx: Context
    ) -> None:
        """Put the best state in place and report it."""
        report_outcome(ctx, program.name, outcome)
        for site in sites:
            kept = outcome.state[MASK + site.weight]
            weight = torch.where(kept, outcome.state[WEIGHT + site.weight], 0.0)
            program.params.put(site.weight, weight, self.name)
            if masks[site.weight].pattern != DENSE:
                put_mask(program, site, Mask(kept, masks[site.weight].pattern), self.name)
        for name, tensor in outcome.state.items():
            if name.startswith(FREE):
                program.params.put(name.removeprefix(FREE), tensor, self.name)
        figures = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
        ctx.log.report(site=program.name, **figures)
        self._report_changes(outcome.state[CHANGES], ctx)

    def _report_changes(self, changes: Tensor, ctx: Context) -> None:
        """Report what share of the masks changed, over some renewals a row."""
        known = [(i, row) for i, row in enumerate(changes) if not math.isnan(float(row[0]))]
        per_row = max(1, -(-len(known) // _ROWS))
        for first in range(0, len(known), per_row):
            part = known[first : first + per_row]
            mean = sum(float(row[0]) for _, row in part) / len(part)
            steps = f"steps {part[0][0] * self.every + 1} to {(part[-1][0] + 1) * self.every}"
            ctx.log.report(site=f"masks, {steps}", changed=mean, changed_since_start=float(part[-1][1][1]))
