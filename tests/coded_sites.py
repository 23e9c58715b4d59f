"""Sites that a compressing pass has rewritten: their stored parts, and the weight these decode to."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ir.decode import arguments, code_nodes, codes_of
from ir.ops.nested import NestedCodes
from ir.program import PATH, Program, is_call

nomul = torch.ops.nomul
SPARSE = (nomul.sparse_linear, nomul.sparse_shiftadd_linear)
CODED = (nomul.shiftadd_linear, nomul.quant_linear, nomul.nested_linear, *SPARSE)


def coded(program: Program) -> dict[str, fx.Node]:
    """The coded linears of a program, by site name."""
    return {str(n.meta[PATH]): n for n in program.calls(*CODED)}


def parts(program: Program, node: fx.Node) -> list[Tensor | None]:
    """The stored tensors of a coded linear, None for an absent one."""
    if is_call(node, nomul.nested_linear, *SPARSE):
        return [program.value(held) for nodes in code_nodes(node).values() for held in nodes]
    count = 5 if is_call(node, nomul.shiftadd_linear) else 4
    return [None if a is None else program.value(a) for a in node.args[1:count]]  # type: ignore[arg-type]


def stored_bytes(program: Program, node: fx.Node) -> int:
    """Bytes of the stored tensors of a coded linear."""
    return sum(t.numel() * t.element_size() for t in parts(program, node) if t is not None)


def decoded(program: Program, node: fx.Node) -> Tensor:
    """The weight [rows, inputs] that the stored parts stand for, float64."""
    codes = codes_of(node, program.params.get)
    if isinstance(codes, NestedCodes):
        codes = codes.at(arguments(node)["precision"])
    return codes.dequantize(torch.float64)


def same_parts(a: Program, b: Program, site: str) -> bool:
    """Whether a site stores the same bytes in two programs."""
    pairs = zip(parts(a, coded(a)[site]), parts(b, coded(b)[site]), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]
