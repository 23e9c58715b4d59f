"""`rtn`: uniform rounding to nearest, the baseline every method is held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ir.analysis import LinearSite, blocks
from ir.ops.packing import pack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import group_count
from ir.program import Program
from passes.base import Context, OptionError, Pass, PlanRow, Stage
from passes.quantize.uniform import rtn
from passes.sites import check_group, check_skip, choose_sites, figures, outside_blocks, put_quant_codes, weights_of


@dataclass(frozen=True)
class Rtn(Pass):
    """Round every weight to the nearest of 2^bits uniform levels between its group's minimum and maximum."""

    bits: int = field(default=4, metadata={"help": "bits per code, 2 to 8"})
    group: int = field(
        default=64, metadata={"help": "inputs that share a scale and zero point; must divide every input"}
    )
    symmetric: bool = field(default=False, metadata={"help": "a range around zero, without stored zero points"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "rtn"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for widths codes cannot have."""
        if not 2 <= self.bits <= 8:
            raise OptionError(self.name, "bits", f"{self.bits} is outside 2..8")
        if self.group < 1:
            raise OptionError(self.name, "group", f"{self.group} is not positive")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        sites = choose_sites(program, nodes, self.skip, Context())
        check_group(sites, self.group, self.name)
        return [PlanRow(s.name, self.name, self._predicted(s)) for s in sites]

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
            codes = self._round(site, weight)
            error = weight - codes.dequantize(weight.dtype)
            rel = float(error.square().sum() / weight.square().sum().clamp_min(1e-300))
            put_quant_codes(program, site, codes, self.name)
            ctx.log.report(site=site.name, **figures(codes.stored_bits, site.rows, site.inputs, rel))
            step()

    def _round(self, site: LinearSite, weight: Tensor) -> QuantCodes:
        found = rtn(weight, self.bits, self.group, self.symmetric)
        zeros = None if self.symmetric else pack_bits(found.zeros, self.bits)
        packed = pack_bits(found.codes, self.bits)
        return QuantCodes(packed, found.scales, zeros, self.bits, self.group, site.inputs)

    def _predicted(self, site: LinearSite) -> dict[str, float]:
        groups = group_count(site.inputs, self.group)
        row = -(-site.inputs * self.bits // 8) + 2 * groups + (0 if self.symmetric else -(-groups * self.bits // 8))
        return {
            "bits": 8 * row / site.inputs,
            "bytes": float(row * site.rows),
            "weights": float(site.rows * site.inputs),
        }
