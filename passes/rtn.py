"""`rtn`: uniform rounding to nearest, the baseline every method is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ir.analysis import LinearSite, blocks
from ir.ops.nm import gather_kept, pack_mask
from ir.ops.quant import QuantCodes
from ir.ops.sparse import SparseCodes
from ir.program import Program
from passes.base import Context, OptionError, Pass, PlanRow, Stage, Trial
from passes.quantize.hessian import Gram
from passes.quantize.salience import row_energy
from passes.quantize.uniform import packed, packed_bytes, rtn
from passes.sites import (
    check_group,
    check_skip,
    choose_sites,
    figures,
    outside_blocks,
    planned,
    put_quant_codes,
    put_sparse_codes,
    weights_of,
)
from passes.sparsify.masks import Mask, kept_group, mask_of, pattern_at
from passes.widths import width_of


@dataclass(frozen=True)
class Rtn(Pass):
    """Round every weight to the nearest of 2^bits uniform levels between its group's minimum and maximum."""

    bits: int = field(default=4, metadata={"help": "bits per code, 2 to 8, where the pass bits chose no other"})
    group: int = field(
        default=64, metadata={"help": "inputs that share a scale and zero point; must divide every input"}
    )
    symmetric: bool = field(default=False, metadata={"help": "a range around zero, without stored zero points"})
    terms: int = field(
        default=0, metadata={"help": "powers of two a scale is a sum of, 1 to 3; 0 takes it as it is, in float16"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "rtn"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False
    widths: ClassVar[range] = range(2, 9)

    def validate(self) -> None:
        """Raise OptionError for widths codes cannot have."""
        if not 2 <= self.bits <= 8:
            raise OptionError(self.name, "bits", f"{self.bits} is outside 2..8")
        if self.group < 1:
            raise OptionError(self.name, "group", f"{self.group} is not positive")
        if not 0 <= self.terms <= 3:
            raise OptionError(self.name, "terms", f"{self.terms} is outside 0..3")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        sites = choose_sites(program, nodes, self.skip, Context())
        check_group(sites, self.group, self.name)
        shapes = [(s, width_of(program, s, self.bits), pattern_at(program, s)) for s in sites]
        return [PlanRow(site.name, self.name, planned(self, site, bits, kept)) for site, bits, kept in shapes]

    def run(self, program: Program, ctx: Context) -> None:
        """Round the linears of all blocks, one weight in memory at a time."""
        parts = blocks(program)
        nodes = [n for block in parts for n in block.nodes]
        check_skip(program, self.skip, self.name)
        sites = choose_sites(program, nodes, self.skip, ctx)
        check_group(sites, self.group, self.name)
        outside_blocks(program, nodes, self.skip, ctx)
        step = ctx.log.progress(len(sites), self.name)
        for site in sites:
            weight = weights_of(program, [site], self.name)
            bits, mask = width_of(program, site, self.bits), mask_of(program, site)
            codes = self._round(weight, bits) if mask is None else self._round_kept(weight, mask, bits)
            error = weight - codes.dequantize(weight.dtype)
            rel = float(error.square().sum() / weight.square().sum().clamp_min(1e-300))
            if isinstance(codes, QuantCodes):
                put_quant_codes(program, site, codes, self.name)
            else:
                put_sparse_codes(program, site, codes, self.name)
            ctx.log.report(site=site.name, **figures(codes.stored_bits, site.rows, site.inputs, rel))
            step()

    def stored_bytes(self, site: LinearSite, bits: int) -> int:
        """Return the bytes of a site's codes, scales and zero points at a width."""
        return packed_bytes(site.rows, site.inputs, bits, self.group, self.symmetric)

    def trial(
        self, weight: Tensor, gram: Gram | None, choices: Sequence[int], site: LinearSite, ctx: Context
    ) -> list[Trial]:
        """Return the site rounded at each width."""
        del ctx
        tried = [(bits, self._round(weight, bits)) for bits in choices]
        return [
            Trial(bits, codes.stored_bits // 8, row_energy(weight - codes.dequantize(weight.dtype), gram))
            for bits, codes in tried
        ]

    def _round(self, weight: Tensor, bits: int) -> QuantCodes:
        return packed(rtn(weight, bits, self.group, self.symmetric, self.terms), self.symmetric)

    def _round_kept(self, weight: Tensor, mask: Mask, bits: int) -> SparseCodes:
        """Return the weights that a mask keeps, around zero; groups of the option's inputs share a scale."""
        group = kept_group(self.group, mask.pattern, self.name)
        kept = packed(rtn(gather_kept(weight, mask.kept), bits, group, True, self.terms), True)
        n, m = mask.pattern.n, mask.pattern.m
        return SparseCodes(kept, pack_mask(mask.kept, n, m), n, m, weight.shape[1])
