"""`to-shiftadd`: uniform integer codes as sign planes, one for each bit, whose scales shift instead of multiplying."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ir.analysis import site_name
from ir.decode import arguments, codes_of
from ir.edit import Editor
from ir.errors import UnsupportedError
from ir.ops.packing import unpack_bits
from ir.ops.powerterms import MAX_TERMS
from ir.ops.quant import QuantCodes
from ir.ops.shiftadd import shiftadd_cost
from ir.ops.shiftcode import ShiftCodes, decode_scales, encode_uniform, group_count
from ir.program import Program
from passes.base import Context, OptionError, Pass, Stage

nomul = torch.ops.nomul


@dataclass(frozen=True)
class ToShiftadd(Pass):
    """Write uniform integer codes as sign planes: the same weights, and no multiply where scales are powers of two."""

    terms: int = field(default=2, metadata={"help": "powers of two a scale may take; sites that need more multiply"})

    name: ClassVar[str] = "to-shiftadd"
    level: ClassVar[tuple[str, str]] = ("compressed", "compressed")
    stage: ClassVar[Stage] = Stage.LOWER
    order_reason: ClassVar[str] = "it rewrites the codes that quantisation leaves"
    requires: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    gives: ClassVar[frozenset[str]] = frozenset({"shift-weights"})
    removes: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = True

    def validate(self) -> None:
        """Raise OptionError for more terms than a code holds."""
        if not 0 <= self.terms <= MAX_TERMS:
            raise OptionError(self.name, "terms", f"{self.terms} is outside 0..{MAX_TERMS}")

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite every site; report its stored bits and the multiplies that are left for one token."""
        nodes = list(program.calls(nomul.quant_linear))
        step = ctx.log.progress(len(nodes), self.name)
        for node in nodes:
            name, codes = site_name(node), as_planes(_quantised(program, node), self.terms, site_name(node))
            _put(program, node, codes, self.name)
            weights = codes.rows * codes.in_features
            ctx.log.report(
                site=name,
                bits=codes.stored_bits / weights,
                bytes=codes.stored_bits / 8,
                weights=float(weights),
                terms=float(codes.terms),
                multiplies=float(shiftadd_cost(codes, 1).multiplies),
            )
            step()
        Editor(program, self.name).sweep()


def as_planes(codes: QuantCodes, terms: int, site: str = "") -> ShiftCodes:
    """Return the same weight, bit for bit, as one sign plane for each bit of its codes.

    terms: the most powers of two a scale may be written as; with more needed anywhere, all stay float16. Raises
    UnsupportedError for scales that are not finite, naming `site`.
    """
    if not torch.isfinite(codes.scales).all():
        raise UnsupportedError("codes with scales that are not finite cannot be rewritten", where=site)
    groups = group_count(codes.in_features, codes.group)
    integers = unpack_bits(codes.codes, codes.bits, codes.in_features)
    zeros = None if codes.zeros is None else unpack_bits(codes.zeros, codes.bits, groups)
    for count in range(1, terms + 1):
        found = encode_uniform(integers, codes.scales, zeros, codes.bits, codes.group, count)
        if torch.equal(decode_scales(found)[..., 0], codes.scales.double().abs()):
            return found
    return encode_uniform(integers, codes.scales, zeros, codes.bits, codes.group, 0)


def _quantised(program: Program, node: fx.Node) -> QuantCodes:
    codes = codes_of(node, program.params.get)
    assert isinstance(codes, QuantCodes)
    return codes


def _put(program: Program, node: fx.Node, codes: ShiftCodes, by: str) -> None:
    """Put the planes where the integer codes are read; tensors that stay the same keep their parameters."""
    editor, values = Editor(program, by).before(node), arguments(node)
    stem = str(values["codes"].target).rpartition(".")[0]
    old = {"scales": values["scales"], "offsets": values["zeros"]}

    def stored(name: str, tensor: Tensor | None) -> fx.Node | None:
        kept = old.get(name)
        if tensor is None or (kept is not None and _equal(program.value(kept), tensor)):
            return kept if tensor is not None else None
        return editor.param(editor.fresh(f"{stem}.{name}"), tensor)

    parts = [stored(name, getattr(codes, name)) for name in ("signs", "scales", "exponents", "offsets")]
    layout = (codes.group, codes.terms, codes.row_group, codes.code)
    new = editor.call(nomul.shiftadd_linear, values["x"], *parts, values["bias"], *layout, like=node)
    editor.replace(node, new, keep_name=True)
    editor.erase(node)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
