"""Learning rotations: on top of random ones, so that predictions suffer least from rounded activations (SpinQuant)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ir.analysis import LinearSite, blocks
from ir.products import products_in
from ir.program import Program
from passes.act import Act
from passes.base import Context, Log, Pass
from passes.equiv.producers import bias_of
from passes.equiv.turns import Mix, cayley, turned_bias, turned_weight
from passes.kv import Kv
from passes.rotation import RotationPlan, write_rotation
from passes.stream import Step, by_rows, counted_in, token_batches, walk
from passes.training.events import report_outcome
from passes.training.loop import Problem, Recipe, split, train
from passes.training.loss import next_token_loss, teacher_loss
from passes.training.whole import Params, WholeFunction, teacher_of, whole_function

_STREAM = "stream"


@dataclass(frozen=True)
class LearnSpec:
    """How rotations are learned: epochs over all samples, samples a step, rate of the entries, towards what."""

    epochs: int
    batch: int
    rate: float
    loss: Literal["kl", "ce"]


def coders(following: Sequence[Pass]) -> list[Act | Kv]:
    """Return the passes of a pipeline that round activations and caches."""
    return [pass_ for pass_ in following if isinstance(pass_, (Act, Kv))]


def learned_plan(
    program: Program, planned: Callable[[Program], RotationPlan], spec: LearnSpec, ctx: Context, by: str
) -> RotationPlan:
    """Return a program's plan with rotations learned on top of its own, of the residual stream and of values.

    planned: gives the plan of a program. They are those under which the rotated program, its activations and cache
    rounded as the passes that follow will do, predicts best; weights stay float. Reports the loss before and after.
    """
    rows = by_rows(ctx, spec.batch)
    model = program.clone()
    plan = planned(model)
    write_rotation(model, plan, by)
    for coder in coders(ctx.following):
        coder.run(model, replace(ctx, log=Log()))
    outcome = None
    for walked in walk(program, rows, "float", f"{by}, float model"):
        if walked.block.index == len(blocks(program)) - 1:
            problem = _problem(model, plan, walked, spec, rows)
            step = ctx.log.progress(spec.epochs * len(split(problem.batches)[0]), by)
            with products_in(ctx.precision):
                outcome = train(problem, Recipe(spec.epochs), ctx.seed, step, ctx.work)
            problem.release()
    assert outcome is not None
    report_outcome(ctx, program.name, outcome)
    figures = {"loss_before": outcome.before, "loss_after": outcome.after, "epochs": float(outcome.epochs)}
    ctx.log.report(site=program.name, **figures)
    return composed(planned(program), outcome.state) if outcome.after < outcome.before else planned(program)


def composed(plan: RotationPlan, entries: Mapping[str, Tensor]) -> RotationPlan:
    """Return a plan with learned rotations behind its own; entries: of their Cayley transforms, as `starts` names."""
    matrices = {name: cayley(tensor.double()) for name, tensor in entries.items()}
    turns = {site: list(own) for site, own in plan.turns.items()}
    for site, mix in _mixes(plan, matrices):
        turns[site].append(mix)
    streams = [replace(found, mix=matrices[_STREAM][0]) for found in plan.streams]
    return replace(plan, turns=turns, streams=streams)


def _mixes(plan: RotationPlan, matrices: Mapping[str, Tensor]) -> Iterator[tuple[LinearSite, Mix]]:
    """Yield each site with a change of basis by the learned matrices, the residual stream's first."""
    for found in plan.streams:
        for site, axis in found.sides():
            yield site, Mix(axis, torch.arange(found.stream.width), matrices[_STREAM])
    own = {site.node: site for site in plan.turns}
    for number, heads in enumerate(plan.values):
        for axis, slots in (("rows", heads.sources), ("cols", heads.sinks)):
            for slot in slots:
                chosen = matrices[_values(number)][slot.heads]
                yield own[slot.node], Mix(axis, slot.channels.flatten(), chosen)


def _values(number: int) -> str:
    return f"values/{number}"


def starts(plan: RotationPlan) -> dict[str, Tensor]:
    """Return the entries of what can be learned, zeros: [1, width, width] of the stream, [heads, d, d] of values."""
    found = {_values(i): torch.zeros(heads.count, heads.width, heads.width) for i, heads in enumerate(plan.values)}
    for turn in plan.streams:
        found[_STREAM] = torch.zeros(1, turn.stream.width, turn.stream.width)
    return found


@dataclass(frozen=True)
class _Turned:
    """The linears of a block that turn: names of weight and bias by the node's name, no bias an empty one."""

    operands: Mapping[str, tuple[str, str]]

    @property
    def free(self) -> tuple[str, ...]:
        return tuple(name for pair in self.operands.values() for name in pair if name)

    def params(self, model: Program, mixes: Mapping[str, Sequence[Mix]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for node, (weight, bias) in self.operands.items():
            found[weight] = turned_weight(model.params.get(weight), mixes[node])
            if bias:
                found[bias] = turned_bias(model.params.get(bias), mixes[node])
        return found


def _by_block(model: Program, plan: RotationPlan) -> list[_Turned]:
    """Return what turns in each block of the rotated model, by the plan's weights and the model's own biases."""
    weights = {site.node.name: site.weight for site in plan.turns}
    parts = []
    for block in blocks(model):
        nodes = [model.node(node.name) for node in block.nodes if node.name in weights]
        biases = [str(b.target) if (b := bias_of(node)) is not None and b.op == "get_attr" else "" for node in nodes]
        parts.append(_Turned({node.name: (weights[node.name], bias) for node, bias in zip(nodes, biases, strict=True)}))
    return parts


def _problem(model: Program, plan: RotationPlan, last: Step, spec: LearnSpec, ctx: Context) -> Problem:
    """Return what is trained; model: rotated, with rounded activations; last: the float model's last block."""
    rows, parts = token_batches(ctx, model, "learning rotations"), _by_block(model, plan)
    function, teacher = whole_function(model, [part.free for part in parts]), teacher_of(last)
    start = starts(plan)

    def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
        ids, matrices = rows[batch], {name: cayley(entries) for name, entries in state.items()}
        mixes: dict[str, list[Mix]] = {site.node.name: [] for site in plan.turns}
        for site, mix in _mixes(plan, matrices):
            mixes[site.node.name].append(mix)
        given = [partial(part.params, model, mixes) for part in parts]
        logits = _logits(function, given, ids, matrices.get(_STREAM))
        counted = counted_in(ctx, batch)
        if spec.loss == "ce":
            return next_token_loss(logits, ids, counted)
        return teacher_loss(logits, teacher.logits(ids, batch), counted)

    def release() -> None:
        function.release()
        teacher.release()

    return Problem(start, dict.fromkeys(start, spec.rate), loss, len(rows), release)


def _logits(
    function: WholeFunction, given: Sequence[Callable[[], Params]], ids: Tensor, matrix: Tensor | None
) -> Tensor:
    """Return the logits of blocks whose stream is in the basis of a matrix [1, width, width], the ends not."""
    values = dict(function.start(ids))
    if matrix is None:
        return function.logits(function.exits(given, values), values)
    entry = function.plan.blocks[0].entry.name
    values[entry] = values[entry] @ matrix[0].T
    return function.logits(function.exits(given, values) @ matrix[0], values)
