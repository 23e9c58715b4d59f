"""A program from token ids to logits as a function of parameters of its blocks, for training end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ir.analysis import Layout, between, layout
from ir.execute import empty_inputs
from ir.program import Program, release
from ir.region import Region, region
from ir.weights import LinearWeight
from passes.activations import Shelf
from passes.stream import Step

Params = Mapping[str, Tensor | LinearWeight]
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Part:
    """A region, and the module that maps values of its free parameters, then its inputs, to its outputs."""

    region: Region
    free: tuple[str, ...]
    module: nn.Module

    def __call__(self, params: Params, values: Values) -> Sequence[Tensor]:
        given = [params[name] for name in self.free]
        found: Sequence[Tensor] = self.module(*given, *[values[n.name] for n in self.region.inputs])
        return found


@dataclass(frozen=True)
class WholeFunction:
    """A program in three steps: what comes before its blocks, its blocks, and its head.

    recompute: between forward and backward only the entry of each block is kept; its weights, and what happens inside,
    are computed again on the way back (1604.06174, section 4), so that memory beyond the entries is that of one block.
    """

    program: Program
    plan: Layout
    recompute: bool
    _start: _Part
    _blocks: tuple[_Part, ...]
    _head: _Part

    def start(self, ids: Tensor) -> Values:
        """Return what blocks and head read besides each other's values, by name, for token ids [batch, seq]."""
        values: dict[str, Tensor] = empty_inputs(self.program, ids)
        with torch.no_grad():
            values.update(zip((n.name for n in self._start.region.outputs), self._start({}, values), strict=True))
        return values

    def exits(self, params: Sequence[Callable[[], Params]], values: Values) -> Tensor:
        """Return the exit of the last block [batch, seq, width].

        params: for each block, a function that gives the values of its free parameters; values: as `start` has them.
        """
        x = values[self.plan.blocks[0].entry.name]
        for block, part, own in zip(self.plan.blocks, self._blocks, params, strict=True):
            run = partial(_run, part, own, values, block.entry.name)
            x = checkpoint(run, x, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else run(x)
        return x

    def logits(self, exits: Tensor, values: Values) -> Tensor:
        """Return the logits [batch, seq, vocabulary] of what the last block gives."""
        return self._head({}, {**values, self.plan.blocks[-1].exit.name: exits})[0]

    def release(self) -> None:
        """Let go of all parameters."""
        for part in (self._start, *self._blocks, self._head):
            release(part.module)


def whole_function(program: Program, free: Sequence[Sequence[str]] | None, recompute: bool = True) -> WholeFunction:
    """Return a program as a function of parameters of its blocks.

    free: their names for each block, those of coded weights as `ir.decode.decoded_name` has them; None for start and
    head alone; recompute: spend a second forward pass of each block to save memory.
    """
    plan = layout(program)
    outside, last, logits = set(plan.prologue), plan.blocks[-1].exit, program.outputs[0]
    start = region(program, plan.prologue)
    head = region(program, between(program, last, logits, outside), [logits])
    blocks = []
    for block, names in zip(plan.blocks if free is not None else (), free or (), strict=True):
        part = region(program, between(program, block.entry, block.exit, outside), [block.exit])
        blocks.append(_Part(part, tuple(names), part.function(names)))
    first, end = (_Part(part, (), part.module(decode=True)) for part in (start, head))
    return WholeFunction(program, plan, recompute, first, tuple(blocks), end)


def _run(part: _Part, own: Callable[[], Params], values: Values, entry: str, x: Tensor) -> Tensor:
    return part(own(), {**values, entry: x})[0]


@dataclass(frozen=True)
class Teacher:
    """What a float model predicts, of which only its last block's exits are kept, and its head."""

    _function: WholeFunction
    _exits: Shelf

    def logits(self, ids: Tensor, batch: int) -> Tensor:
        """Return the logits [batch, seq, vocabulary] for the token ids of a batch of calibration."""
        with torch.no_grad():
            return self._function.logits(self._exits[batch], self._function.start(ids))

    def release(self) -> None:
        """Let go of all parameters."""
        self._function.release()


def teacher_of(last: Step) -> Teacher:
    """Return the float model of a walk as a teacher; last: the walk's step at the last block."""
    return Teacher(whole_function(last.original, None), last.float_exits())
