"""Weights that are stored inputs-first, turned without a copy up front."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.builder import Builder
from ir.edit import Editor
from ir.params import Entry, Source
from ir.program import Program, is_call, tensor_type_of
from ir.rewrite import No
from ir.types import TensorType

aten = torch.ops.aten


class TransposedSource:
    """A matrix of another source seen transposed, so that a weight stored inputs-first needs no copy up front."""

    def __init__(self, source: Source, key: str) -> None:
        self.source, self.key = source, key

    def names(self) -> tuple[str, ...]:
        return (self.key,)

    def type_of(self, name: str) -> TensorType:
        kind = self.source.type_of(name)
        return TensorType(kind.dtype, kind.dims[::-1])

    def stored_bytes(self, name: str) -> int:
        return self.source.stored_bytes(name)

    def load(self, name: str) -> torch.Tensor:
        return self.source.load(name).T.contiguous()


class PointsSource:
    """A convolution's weight [out, in, 1, ...] of another source seen as a matrix [out, in]."""

    def __init__(self, source: Source, key: str) -> None:
        self.source, self.key = source, key

    def names(self) -> tuple[str, ...]:
        return (self.key,)

    def type_of(self, name: str) -> TensorType:
        kind = self.source.type_of(name)
        return TensorType(kind.dtype, kind.dims[:2])

    def stored_bytes(self, name: str) -> int:
        return self.source.stored_bytes(name)

    def load(self, name: str) -> torch.Tensor:
        return self.source.load(name).flatten(1)


def without_points(b: Builder, weight: fx.Node) -> fx.Node | No:
    """Return the parameter node of a convolution's weight as a matrix, where its windows are single points."""
    if b.shared(weight):
        return No("weight has other readers", weight)
    name = str(weight.target)
    entry = b.program.params.entry(name)
    source = PointsSource(entry.source, entry.key)
    flat = f"{name}_flat"
    b.program.params.enter(flat, Entry(source, entry.key, source.type_of(entry.key), "canonical"))
    return b.param(flat)


def transposed(b: Builder, weight: fx.Node) -> fx.Node | No:
    """Return the parameter node of a weight stored inputs-first, turned in place in the store."""
    if b.shared(weight):
        return No("weight has other readers", weight)
    return b.param(_turned(b.program, str(weight.target)))


def turn_shared(program: Program, by: str) -> None:
    """Turn weights that several readers share and all want turned, in place: those of tied embeddings."""
    editor = Editor(program, by)
    for weight in program.param_nodes():
        readers = list(weight.users)
        if len(readers) < 2 or not all(_is_turn(r) or _is_product(r, weight) for r in readers):
            continue
        new = editor.param(_turned(program, str(weight.target)))
        for reader in readers:
            if _is_turn(reader):
                editor.replace(reader, new)
            else:
                made = editor.before(reader).call(aten.linear, reader.args[0], new, like=reader)
                editor.replace(reader, made, keep_name=True)
            editor.erase(reader)
    editor.sweep()


def _turned(program: Program, name: str) -> str:
    """Enter a matrix once more, turned; return its name."""
    entry = program.params.entry(name)
    kind = TensorType(entry.type.dtype, entry.type.dims[::-1])
    turned = f"{name.removesuffix('.weight')}.weight_t" if name.endswith(".weight") else f"{name}_t"
    program.params.enter(turned, Entry(TransposedSource(entry.source, entry.key), entry.key, kind, "canonical"))
    return turned


def _is_turn(node: fx.Node) -> bool:
    args: Any = node.args
    return (
        is_call(node, aten.t)
        or (is_call(node, aten.permute) and list(args[1]) == [1, 0])
        or (is_call(node, aten.transpose) and sorted(args[1:3]) == [0, 1])
    )


def _is_product(node: fx.Node, weight: fx.Node) -> bool:
    args: Any = node.args
    if not is_call(node, aten.matmul) or args[1] is not weight or args[0] is weight:
        return False
    return len(tensor_type_of(weight).dims) == 2 and len(tensor_type_of(args[0]).dims) >= 2
