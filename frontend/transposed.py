"""Weights that are stored inputs-first, turned without a copy up front."""

from __future__ import annotations

import torch
from torch import fx

from ir.builder import Builder
from ir.params import Entry, Source
from ir.rewrite import No
from ir.types import TensorType


class TransposedSource:
    """A matrix of another source seen transposed, so that a weight stored inputs-first needs no copy up front."""

    def __init__(self, source: Source, key: str) -> None:
        self._source, self._key = source, key

    def names(self) -> tuple[str, ...]:
        return (self._key,)

    def type_of(self, name: str) -> TensorType:
        kind = self._source.type_of(name)
        return TensorType(kind.dtype, kind.dims[::-1])

    def stored_bytes(self, name: str) -> int:
        return self._source.stored_bytes(name)

    def load(self, name: str) -> torch.Tensor:
        return self._source.load(name).T.contiguous()


def transposed(b: Builder, weight: fx.Node) -> fx.Node | No:
    """Return the parameter node of a weight stored inputs-first, turned in place in the store."""
    if b.shared(weight):
        return No("weight has other readers", weight)
    name = str(weight.target)
    entry = b.program.params.entry(name)
    kind = TensorType(entry.type.dtype, entry.type.dims[::-1])
    turned = f"{name.removesuffix('.weight')}.weight_t" if name.endswith(".weight") else f"{name}_t"
    b.program.params.enter(turned, Entry(TransposedSource(entry.source, entry.key), entry.key, kind, "canonical"))
    return b.param(turned)
