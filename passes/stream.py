"""Calibration block by block: what flows into each block, on the program as it is now and as it was before the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from ir.analysis import Block, Layout, between, layout, predicts_tokens, stream_input, token_carriers
from ir.errors import UnsupportedError, UsageError
from ir.execute import Batch, batch_inputs, split_batch
from ir.products import Precision, products_in
from ir.program import Program, is_call, release
from ir.region import Region, region
from ir.weights import LinearWeight
from passes.activations import Room, Shelf, shelved
from passes.base import Context

Callback = Callable[[Tensor], None]
PairCallback = Callable[[Tensor, Tensor], None]


@dataclass
class _Flow:
    """One stream of activations through a program, with matrix products in `precision`.

    entry: the value entering the current block, per batch; carried: the token ids and other token-dependent values of
    the prologue that blocks read, per batch; ambient: values that depend on shapes only, per batch shape (of arrays,
    whose masks are data too, none); ready: the block's exit, per batch, where observing a block that will not change
    has computed it already; due: blocks that were left without anybody looking at the stream, and are run once somebody
    does; seen: whether somebody did in this one.
    """

    program: Program
    plan: Layout
    entry: Shelf
    carried: list[dict[str, Tensor]]
    ambient: dict[torch.Size, dict[str, Tensor]]
    shapes: list[torch.Size]
    precision: Precision
    ready: Shelf
    due: list[Block] = field(default_factory=list)
    seen: bool = False

    def values(self, batch: int, block: Block) -> Mapping[str, Tensor]:
        _settle(self)
        known = {**self.ambient[self.shapes[batch]], **self.carried[batch]}
        return {**known, block.entry.name: self.entry[batch]}


@dataclass(frozen=True, eq=False)
class BlockFunction:
    """A block on the compressed stream as a function of some of its parameters, for training them.

    batches: how many there are; module: as `Region.function` gives it, for the parameters `free`.
    """

    free: tuple[str, ...]
    batches: int
    _module: nn.Module
    _part: Region
    _flow: _Flow
    _block: Block

    def __call__(self, params: Mapping[str, Tensor | LinearWeight], batch: int) -> Tensor:
        """Return a batch's exit value [batch, seq, width] under these values of the free parameters."""
        values = self._flow.values(batch, self._block)
        found: Tensor = self._module(
            *[params[name] for name in self.free], *[values[n.name] for n in self._part.inputs]
        )[0]
        return found

    def release(self) -> None:
        """Let go of the block's other parameters."""
        release(self._module)


@dataclass(frozen=True)
class Step:
    """One block of a walk, with the streams standing at its entry.

    block: as in the program the pass works on; `observe` runs it on the compressed stream, `observe_float` its
    original on the float stream (only when the walk carries that stream).
    """

    block: Block
    _compressed: _Flow | None
    _float: _Flow | None
    _float_block: Block | None

    def observe(self, wanted: Mapping[fx.Node, Callback]) -> None:
        """Hand every batch's value of each wanted node of the block, as it is now, to its callback."""
        if self._compressed is None:
            raise ValueError("this walk carries no compressed stream")
        _run(self._compressed, self.block, wanted)

    def observe_float(self, wanted: Mapping[str, Callback]) -> None:
        """Hand every batch's value of nodes of the original block, by node name, to their callbacks."""
        if self._float is None or self._float_block is None:
            raise ValueError("this walk carries no float stream")
        nodes = _by_name(self._float, self._float_block)
        _run(self._float, self._float_block, {nodes[name]: call for name, call in wanted.items()})

    def observe_pairs(self, wanted: Mapping[fx.Node, PairCallback], last: bool = True) -> None:
        """Hand every batch's value of each wanted node, on the compressed and on the float stream, to its callback.

        The float value is that of the node of the same name in the original block, or of what a node decodes. One batch
        is in memory at a time.
        last: whether the block is not observed again; the float stream then keeps what it needs to move on, unless it
        has that already.
        """
        if self._compressed is None or self._float is None or self._float_block is None:
            raise ValueError("this walk does not carry both streams")
        nodes = _by_name(self._float, self._float_block)
        ours = _values(self._compressed, self.block, list(wanted))
        names = [uncoded(node).name for node in wanted]
        after = [self._float_block.exit] if last and not len(self._float.ready) else []
        theirs = _values(self._float, self._float_block, [*(nodes[name] for name in names), *after])
        for compressed, original in zip(ours, theirs, strict=True):
            for value in original[len(wanted) :]:
                self._float.ready.append(value)
            with products_in(self._float.precision):
                for call, a, b in zip(wanted.values(), compressed, original[: len(wanted)], strict=True):
                    call(a, b)

    @property
    def original(self) -> Program:
        """The program of the float stream, for passes that change the basis of values inside a block on both sides."""
        if self._float is None:
            raise ValueError("this walk carries no float stream")
        return self._float.program

    @property
    def original_block(self) -> Block:
        """The block as it was when the float stream began; its nodes are those of `original`."""
        if self._float_block is None:
            raise ValueError("this walk carries no float stream")
        return self._float_block

    def function(self, free: Sequence[str], through: int | None = None) -> BlockFunction:
        """Return the block as it is now, on the compressed stream, as a function of the parameters `free`.

        through: the index of a later block, up to whose exit the function then goes.
        """
        if self._compressed is None:
            raise ValueError("this walk carries no compressed stream")
        part = _whole(self._compressed, self.block, through)
        flow = self._compressed
        return BlockFunction(tuple(free), len(flow.entry), part.function(free), part, flow, self.block)

    def float_exits(self) -> Shelf:
        """Return what the original block gives on the float stream, per batch; the stream moves on by these."""
        if self._float is None or self._float_block is None:
            raise ValueError("this walk carries no float stream")
        if not len(self._float.ready):
            self._float.ready = shelved(self._float.ready.room, _exits(self._float, self._float_block))
        return self._float.ready

    def float_window(self, through: int) -> Shelf:
        """Return what the float model gives at the exit of a later block, per batch; the caller clears it."""
        if self._float is None or self._float_block is None:
            raise ValueError("this walk carries no float stream")
        return shelved(self._float.entry.room, _exits(self._float, self._float_block, through))

    def original_exits(self) -> Shelf:
        """Return what the original block gives on the compressed stream, per batch; the caller clears it."""
        if self._compressed is None or self._float is None or self._float_block is None:
            raise ValueError("this walk does not carry both streams")
        _settle(self._compressed)
        flow = replace(self._compressed, program=self._float.program, plan=self._float.plan)
        return shelved(flow.entry.room, _exits(flow, self._float_block))


def uncoded(node: fx.Node) -> fx.Node:
    """Return what a value was before its tokens were encoded and decoded."""
    while is_call(node, torch.ops.nomul.decode_tokens, torch.ops.nomul.encode_tokens):
        node = node.args[0]  # type: ignore[assignment]
    return node


def walk(
    program: Program,
    ctx: Context,
    stream: Literal["float", "compressed", "both"],
    label: str,
    original: Program | None = None,
) -> Iterator[Step]:
    """Yield the blocks in order; when the caller comes back for the next, the streams have moved on.

    The compressed stream moves by running the block as the caller left it. The float stream runs a copy taken at the
    start, of `original` where one is given: the same model before its weights were coded. Raises UsageError without
    calibration batches, UnsupportedError for a program without blocks.
    """
    plan = layout(program)
    if not plan.blocks:
        raise UnsupportedError(
            "no repeated blocks were found",
            where=program.name,
            why="the dataflow from tokens to logits has no cut points that repeat",
            fix="use a pass or option that needs no calibration (calib=none)",
        )
    batches, room = calibration(ctx), Room(ctx.activation_budget, ctx.work)
    try:
        yield from _walk(program, plan, batches, room, ctx, stream, label, original)
    finally:
        room.close()


def _walk(
    program: Program,
    plan: Layout,
    batches: Sequence[Batch],
    room: Room,
    ctx: Context,
    stream: Literal["float", "compressed", "both"],
    label: str,
    original: Program | None,
) -> Iterator[Step]:
    compressed = _start(program, plan, batches, ctx.precision, room) if stream != "float" else None
    floating = None
    if stream != "compressed":
        copy = (original or program).clone()
        floating = _start(copy, layout(copy), batches, ctx.precision, room)
    step = ctx.log.progress(len(plan.blocks), label)
    for block in plan.blocks:
        float_block = floating.plan.blocks[block.index] if floating is not None else None
        yield Step(block, compressed, floating, float_block)
        last = block.index == len(plan.blocks) - 1
        for flow, owner in ((compressed, block), (floating, float_block)):
            if flow is not None and owner is not None and not last:
                _leave(flow, owner)
        step()


def observe(program: Program, ctx: Context, wanted: Mapping[fx.Node, Callback], label: str) -> None:
    """Run the whole calibration set through the program once and hand wanted nodes' values to their callbacks.

    A node that lies in no block (a head, an embedding) is never handed out.
    """
    for step in walk(program, ctx, "float", label):
        inside = {node.name for node in step.block.nodes}
        step.observe_float({node.name: call for node, call in wanted.items() if node.name in inside})


def calibration(ctx: Context) -> Sequence[Batch]:
    """Return the calibration batches; raises UsageError when the run has none."""
    if not ctx.calibration:
        raise UsageError(
            "the pipeline needs calibration text",
            why="none was given",
            fix="pass --calib FILE or --calib builtin",
        )
    return ctx.calibration


def token_batches(ctx: Context, program: Program, what: str) -> Sequence[Tensor]:
    """Return the calibration batches as token ids [batch, seq], for what learns from predictions of tokens.

    what: names it. Raises UsageError for a program that predicts no tokens and for batches of arrays.
    """
    batches = calibration(ctx)
    found = [batch for batch in batches if isinstance(batch, Tensor)]
    require_predictions(program, len(found) < len(batches), what)
    return found


def require_predictions(program: Program, arrays: bool, what: str) -> None:
    """Raise UsageError where there are no predictions of tokens to learn from; arrays: calibration is of these."""
    if predicts_tokens(program) and not arrays:
        return
    raise UsageError(
        f"{what} learns from predictions of tokens, which there are none of here",
        where=program.name,
        why="calibration is of arrays" if predicts_tokens(program) else "the model is no causal language model",
        fix="use what works block by block: gptq, awq, omniquant, shiftadd, sparse, tune-scales, bits{method=loss}",
    )


def by_rows(ctx: Context, rows: int) -> Context:
    """Return the run with calibration batches cut to at most `rows` samples each, for steps of training."""
    parts = [part for batch in calibration(ctx) for part in split_batch(batch, rows)]
    counted = ctx.counted and [part for mask in ctx.counted for part in mask.split(rows)]
    return replace(ctx, calibration=parts, counted=counted)


def counted_in(ctx: Context, batch: int) -> Tensor | None:
    """Return which tokens of a batch of calibration training is to predict, bool [batch, seq]; None for all."""
    return None if ctx.counted is None else ctx.counted[batch]


def _start(program: Program, plan: Layout, batches: Sequence[Batch], precision: Precision, room: Room) -> _Flow:
    """Run the prologue on every batch and keep what the blocks read of it."""
    carriers, start = token_carriers(program), stream_input(program)
    inside = {n for block in plan.blocks for n in block.nodes}
    read = {s for n in inside for s in n.all_input_nodes if s not in inside and s.op == "call_function"}
    entry = plan.blocks[0].entry
    outputs = [n for n in plan.prologue if n in read or n is entry]
    flow = _Flow(program, plan, Shelf(room), [], {}, [], precision, Shelf(room))
    part = region(program, plan.prologue, outputs)
    module = part.module(decode=True)
    for batch in batches:
        inputs = batch_inputs(program, batch)
        found = dict(zip((n.name for n in outputs), _call(module, part, inputs), strict=True))
        flow.entry.append(found.pop(entry.name) if entry.name in found else inputs[entry.name])
        if isinstance(batch, Tensor):
            own = {n.name: found.pop(n.name) for n in outputs if n in carriers and n is not entry}
            flow.carried.append({start.name: inputs[start.name], **own})
            flow.ambient.setdefault(batch.shape, {**inputs, **found})
            flow.shapes.append(batch.shape)
        else:
            flow.carried.append({**inputs, **found})
            flow.ambient.setdefault(torch.Size(), {})
            flow.shapes.append(torch.Size())
    release(module)
    return flow


def _call(module: nn.Module, part: Region, values: Mapping[str, Tensor]) -> Sequence[Tensor]:
    with torch.no_grad():
        return module(*[values[n.name] for n in part.inputs])  # type: ignore[no-any-return]


def _outside(flow: _Flow) -> set[fx.Node]:
    return set(flow.plan.prologue)


def _run(flow: _Flow, block: Block, wanted: Mapping[fx.Node, Callback]) -> None:
    """Run the block up to the wanted values, batch by batch; the entry itself may be wanted too."""
    for values in _values(flow, block, list(wanted)):
        with products_in(flow.precision):
            for call, value in zip(wanted.values(), values, strict=True):
                call(value)


def _values(flow: _Flow, block: Block, wanted: Sequence[fx.Node]) -> Iterator[list[Tensor]]:
    """Yield each batch's wanted values, run only as far as they need; the entry itself may be wanted too."""
    _settle(flow)
    inner = [n for n in wanted if n is not block.entry]
    nodes = dict.fromkeys(n for w in inner for n in between(flow.program, block.entry, w, _outside(flow)))
    part = region(flow.program, nodes, inner)
    module = part.module(decode=True) if inner else None
    for batch in range(len(flow.entry)):
        found = {block.entry: flow.entry[batch]}
        if module is not None:
            with products_in(flow.precision):
                found.update(zip(inner, _call(module, part, flow.values(batch, block)), strict=True))
        yield [found[n] for n in wanted]
    if module is not None:
        release(module)


def _leave(flow: _Flow, block: Block) -> None:
    """Move a stream to the block's exit: at once where somebody looked at it here, and otherwise when somebody does.

    A resumed pass thus runs no block that it finds finished before the first that it does not.
    """
    if flow.seen or len(flow.ready):
        _settle(flow)
        _advance(flow, block)
    else:
        flow.due.append(block)
    flow.seen = False


def _settle(flow: _Flow) -> None:
    """Bring a stream to the block it stands at."""
    flow.seen = True
    due, flow.due = flow.due, []
    for block in due:
        _advance(flow, block)


def _advance(flow: _Flow, block: Block) -> None:
    """Replace each batch's entry by the block's exit, computed with the block as it is now unless it is ready."""
    if len(flow.ready):
        flow.entry.clear()
        flow.entry, flow.ready = flow.ready, Shelf(flow.entry.room)
        return
    for batch, value in enumerate(_exits(flow, block)):
        flow.entry[batch] = value


def _exits(flow: _Flow, block: Block, through: int | None = None) -> Iterator[Tensor]:
    """Yield each batch's exit of a block, or of a later one, as it is now."""
    _settle(flow)
    part = _whole(flow, block, through)
    module = part.module(decode=True)
    for batch in range(len(flow.entry)):
        with products_in(flow.precision):
            found = _call(module, part, flow.values(batch, block))[0]
        yield found
    release(module)


def _by_name(flow: _Flow, block: Block) -> dict[str, fx.Node]:
    """Return the entry and the calls of a block as it is now, by name."""
    return {node.name: node for node in (block.entry, *_whole(flow, block).nodes)}


def _whole(flow: _Flow, block: Block, through: int | None = None) -> Region:
    """Return a block from entry to exit, or to the exit of a later one, as it is now."""
    last = block.exit if through is None else flow.plan.blocks[through].exit
    return region(flow.program, between(flow.program, block.entry, last, _outside(flow)), [last])
