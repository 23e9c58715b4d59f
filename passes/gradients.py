"""Gradients of the next-token loss at values inside the blocks, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional

from ir.analysis import Block, Layout, between, layout
from ir.errors import UnsupportedError
from ir.execute import empty_inputs
from ir.program import Program, release
from ir.region import Region, region

Callback = Callable[[Tensor], None]


def loss_gradients(
    program: Program,
    ids: Tensor,
    wanted: Mapping[fx.Node, Callback],
    dtype: torch.dtype = torch.float32,
    plan: Layout | None = None,
) -> float:
    """Return L, the summed cross-entropy in nats of each next token of ids [batch, seq], and hand out its gradients.

    wanted: nodes inside the blocks; each callback gets dL/d(value) of its node once, zeros where L does not depend on
    it. dtype: float32 parameters are cast to it; plan: the program's layout when the caller has it already. The forward
    run keeps only the entry of every block, [batch, seq, width] each; then the head and the blocks, last one first, run
    once more with gradients. Raises UnsupportedError for a program without blocks.
    """
    plan = plan or layout(program)
    if not plan.blocks:
        raise UnsupportedError(
            "no repeated blocks were found",
            where=program.name,
            why="gradients are taken block by block",
            fix="use a pass or option that needs no gradients",
        )
    values: dict[str, Tensor] = empty_inputs(program, ids, dtype)
    prologue = region(program, plan.prologue)
    values.update(zip((n.name for n in prologue.outputs), _forward(prologue, values, dtype), strict=True))
    for block in plan.blocks:
        values[block.exit.name] = _forward(_part(program, plan, block, ()), values, dtype)[0]
    loss, upstream = _head(program, plan, ids, values, dtype)
    for block in reversed(plan.blocks):
        inside = set(block.nodes)
        upstream = _backward(program, plan, block, {n: c for n, c in wanted.items() if n in inside}, values, upstream)
        del values[block.exit.name]
    return loss


def _part(program: Program, plan: Layout, block: Block, wanted: Sequence[fx.Node]) -> Region:
    """Return the part of a block that its exit and the wanted nodes need."""
    outside, outputs = set(plan.prologue), [block.exit, *wanted]
    nodes = dict.fromkeys(n for out in outputs for n in between(program, block.entry, out, outside))
    return region(program, nodes, outputs)


def _call(part: Region, values: Mapping[str, Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Run a region on values by name, its float32 weights cast to `dtype`."""

    def load(name: str) -> Tensor:
        tensor = part.program.params.get(name)
        return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor

    # Codes are decoded to the recorded dtype; in a run of another one the operators themselves decode.
    module = part.module({name: load(name) for name in part.params}, decode=dtype == torch.float32)
    found: Sequence[Tensor] = module(*[values[n.name] for n in part.inputs])
    release(module)
    return found


def _forward(part: Region, values: Mapping[str, Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    with torch.no_grad():
        return _call(part, values, dtype)


def _head(
    program: Program, plan: Layout, ids: Tensor, values: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[float, Tensor]:
    """Return the loss and its gradient at the exit of the last block."""
    last, logits = plan.blocks[-1].exit, program.outputs[0]
    part = region(program, between(program, last, logits, set(plan.prologue)), [logits])
    start = values[last.name].detach().requires_grad_()
    with torch.enable_grad():
        found = _call(part, {**values, last.name: start}, dtype)[0]
        loss = functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        return float(loss.detach()), torch.autograd.grad(loss, start)[0]


def _backward(
    program: Program,
    plan: Layout,
    block: Block,
    wanted: Mapping[fx.Node, Callback],
    values: Mapping[str, Tensor],
    upstream: Tensor,
) -> Tensor:
    """Return the gradient at a block's entry given the one at its exit, and hand out those in between."""
    part = _part(program, plan, block, tuple(wanted))
    start = values[block.entry.name].detach().requires_grad_()
    with torch.enable_grad():
        exit_value, *inner = _call(part, {**values, block.entry.name: start}, start.dtype)
        found = torch.autograd.grad(exit_value, [start, *inner], upstream, allow_unused=True)
    for call, value, gradient in zip(wanted.values(), inner, found[1:], strict=True):
        call(torch.zeros_like(value) if gradient is None else gradient)
    assert found[0] is not None
    return found[0]
