"""Running a program with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from ir.analysis import Layout, layout
from ir.program import Program, release
from ir.region import region
from ir.types import ScalarType, TensorType

aten = torch.ops.aten


def empty_inputs(program: Program, ids: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return inputs for a prefill of ids [batch, seq]: an all-ones attention mask and a cache of length 0."""
    values = {program.inputs[0].name: ids, program.inputs[1].name: torch.ones_like(ids)}
    for node in program.inputs[2:]:
        kind = node.meta["type"]
        assert isinstance(kind, TensorType)
        sizes = [d if isinstance(d, int) else ids.shape[0] if d == "batch" else 0 for d in kind.dims]
        values[node.name] = torch.zeros(sizes, dtype=dtype if kind.dtype.is_floating_point else kind.dtype)
    return values


def next_inputs(program: Program, ids: Tensor, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return inputs for the next tokens ids [batch, new] after a run that gave `outputs`: its cache is the past."""
    seen = outputs[1].shape[-2] if len(outputs) > 1 else 0
    mask = torch.ones(ids.shape[0], seen + ids.shape[1], dtype=ids.dtype)
    values = {program.inputs[0].name: ids, program.inputs[1].name: mask}
    return values | {node.name: cache for node, cache in zip(program.inputs[2:], outputs[1:], strict=True)}


def run_in_parts(
    program: Program, inputs: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, plan: Layout | None = None
) -> tuple[Tensor, ...]:
    """Return the program's outputs, computed prologue, block by block, epilogue; float weights are cast to `dtype`.

    inputs: by placeholder name; plan: the program's layout when the caller has it already.
    """
    plan = plan or layout(program)
    values = dict(inputs)
    kept = set(program.outputs)
    _run_parts(program, _parts(plan), values, kept, dtype)
    return tuple(values[node.name] for node in program.outputs)


def logits_by_row(program: Program, ids: Tensor, plan: Layout | None = None) -> Iterator[Tensor]:
    """Yield the logits [1, seq, vocabulary] of each row of ids [rows, seq]; only one row's logits exist at a time."""
    plan = plan or layout(program)
    if not plan.epilogue:  # nothing repeats: there is no common part to run once for all rows
        for row in ids.split(1):
            yield run_in_parts(program, empty_inputs(program, row), plan=plan)[0]
        return
    values: dict[str, Tensor] = empty_inputs(program, ids)
    head = region(program, plan.epilogue, [program.outputs[0]])
    _run_parts(program, _parts(plan)[:-1], values, set(head.inputs), torch.float32)
    module = head.module(decode=True)
    for row in range(ids.shape[0]):
        # A yield inside the block would switch gradients off for whoever reads the rows, too.
        with torch.no_grad():
            logits = module(*[_row(node, values[node.name], row) for node in head.inputs])[0]
        yield logits
    release(module)


def _row(node: fx.Node, value: Tensor, row: int) -> Tensor:
    kind = node.meta["type"]
    if isinstance(kind, TensorType) and kind.dims and kind.dims[0] == "batch":
        return value[row : row + 1]
    if isinstance(kind, ScalarType) and kind.expr == "batch":
        return 1  # type: ignore[return-value]
    return value


def _run_parts(
    program: Program,
    parts: Sequence[tuple[fx.Node, ...]],
    values: dict[str, Tensor],
    kept: set[fx.Node],
    dtype: torch.dtype,
) -> None:
    """Run parts in order on `values`, which grows by what later parts or `kept` need and shrinks by what none does."""
    owner = {node: index for index, nodes in enumerate(parts) for node in nodes}
    last_use = {n: max((owner[u] for u in n.users if u in owner), default=-1) for n in owner}

    def load(name: str) -> Tensor:
        tensor = program.params.get(name)
        return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor

    for index, nodes in enumerate(parts):
        outputs = [n for n in nodes if n in kept or index < last_use[n]]
        part = region(program, nodes, outputs)
        # Codes are decoded to the recorded dtype; in a run of another one the operators themselves decode.
        module = part.module({name: load(name) for name in part.params}, decode=dtype == torch.float32)
        with torch.no_grad():
            results = module(*[values[n.name] for n in part.inputs])
        release(module)
        values.update(zip((n.name for n in outputs), results, strict=True))
        for node in owner:
            if node not in kept and last_use[node] <= index:
                values.pop(node.name, None)


def _parts(plan: Layout) -> list[tuple[fx.Node, ...]]:
    parts = [plan.prologue, *(block.nodes for block in plan.blocks), plan.epilogue]
    return [nodes for nodes in parts if nodes]


def with_positions_in(program: Program, dtype: torch.dtype) -> Program:
    """Return a clone whose calls ask for `dtype` wherever they ask for float32: positions, masks, softmax, codes."""
    clone = program.clone()
    for node in clone.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(dtype if a is torch.float32 else a for a in node.args)
            node.kwargs = {key: dtype if a is torch.float32 else a for key, a in node.kwargs.items()}
    return clone
