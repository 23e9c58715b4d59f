"""Running a program with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from ir.analysis import Layout, layout, predicts_tokens
from ir.errors import UnsupportedError, UsageError
from ir.program import Program, release, tensor_type_of
from ir.region import region
from ir.types import ScalarType, TensorType

aten = torch.ops.aten

IDS, MASK = "input_ids", "attention_mask"
# Token ids [batch, seq], or a tensor for every input by name, samples along the first axis.
Batch = Tensor | Mapping[str, Tensor]


def batch_rows(batch: Batch) -> int:
    """Return how many samples a batch holds."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def split_batch(batch: Batch, rows: int) -> list[Batch]:
    """Return a batch in parts of at most `rows` samples each."""
    if isinstance(batch, Tensor):
        return list(batch.split(rows))
    parts = {name: tensor.split(rows) for name, tensor in batch.items()}
    return [{name: own[i] for name, own in parts.items()} for i in range(-(-batch_rows(batch) // rows))]


def batch_inputs(program: Program, batch: Batch, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the program's inputs for a batch, by name; floats come in `dtype`.

    Ids [batch, seq] are completed as by `empty_inputs`, or for a program that predicts no tokens by a mask of ones and
    zeros for other integers of their shape. Raises UnsupportedError for inputs that ids cannot fill, UsageError for
    arrays that are missing, superfluous or of other sizes than the inputs.
    """
    if not isinstance(batch, Tensor):
        return _array_inputs(program, batch, dtype)
    return empty_inputs(program, batch, dtype) if predicts_tokens(program) else _text_inputs(program, batch)


def check_takes_text(program: Program) -> None:
    """Raise UnsupportedError for a program with an input that follows from no text."""
    inputs = {n.name: tensor_type_of(n) for n in program.inputs}
    if predicts_tokens(program):
        return
    dims = inputs[IDS].dims if IDS in inputs else ()
    for name, kind in inputs.items():
        if len(dims) != 2 or kind.dtype.is_floating_point or len(kind.dims) != 2:
            raise UnsupportedError(
                f"token ids alone do not fill the input {name}",
                where=program.name,
                why=f"it is {kind}, and the inputs are {', '.join(inputs)}",
                fix="give arrays for all inputs: --calib FILE.npz",
            )


def _text_inputs(program: Program, ids: Tensor) -> dict[str, Tensor]:
    check_takes_text(program)
    values = {}
    for node in program.inputs:
        fill = ids if node.name == IDS else torch.full_like(ids, int(node.name == MASK))
        values[node.name] = fill.to(tensor_type_of(node).dtype)
        _check_sizes(node, fill)
    return values


def _array_inputs(program: Program, batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    check_arrays(program, batch)
    values = {}
    for node in program.inputs:
        kind = tensor_type_of(node).dtype
        values[node.name] = batch[node.name].to(dtype if kind == torch.float32 else kind)
    return values


def check_arrays(program: Program, batch: Mapping[str, Tensor]) -> None:
    """Raise UsageError unless arrays are those of a program's inputs, sizes and kinds of numbers included."""
    names = [n.name for n in program.inputs]
    missing, more = [n for n in names if n not in batch], [n for n in batch if n not in names]
    if missing or more:
        raise UsageError(
            f"there is no array for the input {missing[0]}"
            if missing
            else f"there is no input for the array {more[0]}",
            where=program.name,
            why=f"the inputs are {', '.join(names)}, the arrays {', '.join(batch) or 'none'}",
            fix="give one array for every input, under its name",
        )
    for node in program.inputs:
        _check_sizes(node, batch[node.name])
        if batch[node.name].is_floating_point() and not tensor_type_of(node).dtype.is_floating_point:
            why = f"the input is {tensor_type_of(node)}, the array {batch[node.name].dtype}"
            raise UsageError(f"the array {node.name} holds no whole numbers", where=node.name, why=why)


def _check_sizes(node: fx.Node, given: Tensor) -> None:
    kind, sizes = tensor_type_of(node), list(given.shape)
    pairs = zip(kind.dims, sizes, strict=False)
    if len(sizes) != len(kind.dims) or any(isinstance(d, int) and d != size for d, size in pairs):
        fix = "give arrays of that shape"
        if node.name == IDS and len(sizes) == 2:
            fix = f"give --seqlen {kind.dims[1]}" if isinstance(kind.dims[1], int) else fix
        raise UsageError(
            f"the sizes {sizes} do not fit the input {node.name}", where=node.name, why=f"it is {kind}", fix=fix
        )


def empty_inputs(program: Program, ids: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return inputs of a language model for a prefill of ids [batch, seq]: a mask of ones and a cache of length 0."""
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
