"""`act`: what linears read is rounded token by token to integer codes while the program runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from ir.analysis import blocks, matches, site_name
from ir.decode import is_coded
from ir.edit import Editor
from ir.ops.tokens import CODING, row_bytes
from ir.program import Program, is_call, tensor_type_of
from ir.types import TensorType
from passes.base import Context, OptionError, Pass, PlanRow, Stage
from passes.sites import check_patterns

aten, nomul = torch.ops.aten, torch.ops.nomul


@dataclass(frozen=True)
class Act(Pass):
    """Give every linear of the blocks inputs of a few bits, with a scale a token found as it comes.

    Source: dynamic per-token quantisation as of ZeroQuant (2206.01861, section 4.1) and OmniQuant (2308.13137).
    """

    bits: int = field(default=8, metadata={"help": "bits per code, 2 to 8"})
    symmetric: bool = field(default=False, metadata={"help": "a range around zero"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "act"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.TUNE
    order_reason: ClassVar[str] = "passes that fit weights must see float activations"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"coded-activations"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for a width codes cannot have."""
        if not 2 <= self.bits <= 8:
            raise OptionError(self.name, "bits", f"{self.bits} is outside 2..8")

    def inserts(self) -> frozenset[str]:
        """Return the operators that code tokens."""
        return CODING

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the linears whose inputs will be coded."""
        found = (n for block in blocks(program) for n in linears(block.nodes) if not self._skipped(n))
        return [PlanRow(site_name(n), self.name, {"input_bits": float(self.bits)}) for n in found]

    def run(self, program: Program, ctx: Context) -> None:
        """Encode and decode every value that linears read, once for all its readers."""
        parts = blocks(program)
        check_patterns([site_name(n) for block in parts for n in linears(block.nodes)], self.skip, self.name)
        for block in parts:
            readers: dict[fx.Node, list[fx.Node]] = {}
            for node in linears(block.nodes):
                if self._skipped(node):
                    ctx.log.skip(site_name(node), "the option skip names it", asked=True)
                else:
                    readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
            for node in block.nodes:
                if is_call(node, nomul.grouped_linear):
                    ctx.log.skip(site_name(node), "its inputs are sorted by expert, which only stay float so far")
            for value, nodes in readers.items():
                code_tokens(program, value, nodes, self.bits, self.symmetric, self.name)
                for node in nodes:
                    ctx.log.report(site=site_name(node), input_bits=float(self.bits))

    def _skipped(self, node: fx.Node) -> bool:
        return any(matches(pattern, site_name(node)) for pattern in self.skip)


def linears(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Return the linears among calls, coded or not, that read float values."""
    return [n for n in nodes if is_call(n, aten.linear) or is_coded(n)]


def code_tokens(
    program: Program, value: fx.Node, readers: list[fx.Node], bits: int, symmetric: bool, by: str
) -> tuple[fx.Node, fx.Node]:
    """Make some readers of a value read what its tokens' codes decode to; return the calls that encode and decode."""
    kind = tensor_type_of(value)
    width = int(kind.dims[-1])
    rows = TensorType(torch.uint8, (*kind.dims[:-1], row_bytes(width, bits)))
    editor = Editor(program, by).before(value.next)
    encoded = editor.call(nomul.encode_tokens, value, bits, symmetric, like=value, type=rows)
    decoded = editor.call(nomul.decode_tokens, encoded, bits, width, kind.dtype, like=value)
    for reader in readers:
        reader.replace_input_with(value, decoded)
    return encoded, decoded
