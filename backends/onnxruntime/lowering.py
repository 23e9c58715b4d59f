"""From a program to the two files: what is needed is emitted in order, and weights are streamed into the data file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import fx

from backends.detours import Detour
from backends.native.library import DEFAULT_MODE
from backends.onnxruntime.emitter import DETOURS, Emitter, Refused, Uniform
from backends.onnxruntime.fusion import plan
from backends.onnxruntime.groups import Fused
from backends.onnxruntime.packages import package
from backends.onnxruntime.tables import overload_text, own_groups, whole_table
from ir.errors import UnsupportedError
from ir.program import Program
from ir.text import node_line

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
OPSETS = (21, 22, 23)
DEFAULT_OPSET = 23
# Constants up to this size stay in the graph's own file, where shape inference reads them.
_INLINE_BYTES = 256
_SHOWN = 5


def emit_program(
    program: Program,
    opset: int = DEFAULT_OPSET,
    fuse: bool = True,
    mode: str = DEFAULT_MODE,
    uniform: Uniform = "own",
    accuracy_level: int | None = None,
    narrow: bool = True,
) -> Any:
    """Return the `onnx_ir.Model` of a program, weights unread.

    mode: how kernels take activations, one of `backends.native.library.MODES`; uniform: `contrib` gives uniform codes
    to `com.microsoft::MatMulNBits` where it takes them; accuracy_level: of that, by default what fits the mode; narrow:
    store float32 weights that consist of 16-bit floats as these. Raises UnsupportedError that names every call without
    an ONNX form, with the reason.
    """
    if opset not in OPSETS:
        raise UnsupportedError(
            f"opset {opset} cannot be written", where=program.name, fix=f"use one of {', '.join(map(str, OPSETS))}"
        )
    emitter = Emitter(program, whole_table(), opset, fuse, mode, uniform, accuracy_of(mode, accuracy_level), narrow)
    fused = plan(program, opset, own_groups(uniform)) if fuse else ()
    refused = _emit_nodes(emitter, program, fused)
    if refused:
        raise refusal(program, refused)
    return emitter.model()


def accuracy_of(mode: str, level: int | None) -> int:
    """Return the accuracy level of MatMulNBits: the one asked for, or 4 (8-bit activations), in mode `exact` 0."""
    if level is not None:
        return level
    return 0 if mode == "exact" else 4


def detours_of(model: Any) -> tuple[Detour, ...]:
    """Return the sites that a model runs otherwise than by the kernels that were asked for, as its metadata says."""
    return tuple(Detour(**one) for one in json.loads(model.metadata_props[DETOURS]))


def _emit_nodes(emitter: Emitter, program: Program, fused: tuple[Fused, ...]) -> list[tuple[fx.Node, str]]:
    """Emit what the outputs need, in order; return the calls that could not be, less those that read one of them."""
    owner = {node: group for group in fused for node in group.binds}
    roots = {group.root: group for group in fused}
    needed, lost = _needed(program, owner), set[fx.Node]()
    refused: list[tuple[fx.Node, str]] = []
    for node in program.graph.nodes:
        group = roots.get(node)
        if group is not None and any(n in needed for n in group.binds):
            binds, reads, emit = group.binds, group.reads, partial(emitter.on_behalf, node, group.emit)
        elif node.op == "call_function" and node in needed and node not in owner:
            binds, reads, emit = (node,), tuple(node.all_input_nodes), partial(emitter.emit, node)
        else:
            continue
        try:
            if lost & set(reads):
                lost |= set(binds)
            else:
                emit()
        except Refused as no:
            refused.append((node, str(no)))
            lost |= set(binds)
    return refused


def refusal(program: Program, refused: list[tuple[fx.Node, str]]) -> UnsupportedError:
    """Return the error that lists calls with the reasons why they cannot be emitted."""
    lines = [f"{node_line(node)}: {reason}" for node, reason in refused[:_SHOWN]]
    more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    return UnsupportedError(
        "onnxruntime cannot run this program",
        where=program.name,
        why="; ".join(lines) + more,
        fix="choose --target reference, which runs every program, or leave out the pass that made the operator",
    )


def missing(node: fx.Node) -> str | None:
    """Return why a call has no entry in the table, or None when it has one."""
    if node.target in whole_table():
        return None
    return f"the emitter has no entry for {overload_text(node.target)}"


def _needed(program: Program, owner: dict[fx.Node, Fused]) -> set[fx.Node]:
    """Return the nodes whose values the outputs depend on, fused groups reading only what they say."""
    found: set[fx.Node] = set()
    stack: list[fx.Node] = list(program.outputs)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack.extend(owner[node].reads if node in owner else node.all_input_nodes)
    return found


def write_model(model: Any, folder: Path, step: Callable[[str], None] = lambda name: None) -> None:
    """Write `model.onnx` and `model.onnx.data`; each weight is read, written and let go before the next.

    step: called with the name of each tensor, for progress.
    """
    ir = package("onnx_ir")
    ir.save(
        model,
        str(folder / MODEL_FILE),
        external_data=DATA_FILE,
        size_threshold_bytes=_INLINE_BYTES,
        # Weights of more than a mebibyte begin on a page, so that a runtime can map them.
        alignment=4096,
        callback=lambda tensor, info: step(str(tensor.name)),
    )


def node_counts(model: Any) -> dict[str, int]:
    """Return operator -> number of nodes of a model, most frequent first."""
    counted: dict[str, int] = {}
    nodes: Iterable[Any] = model.graph
    for node in nodes:
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        counted[name] = counted.get(name, 0) + 1
    return dict(sorted(counted.items(), key=lambda item: -item[1]))
