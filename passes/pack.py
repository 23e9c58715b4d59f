"""`pack`: weights with a mask as the bits of the mask and the kept values, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from ir.analysis import linear_sites
from ir.ops.nm import kept_inputs
from ir.ops.sparse import sparse_codes
from ir.program import Program
from passes.base import Context, OptionError, Pass, PlanRow, Stage
from passes.quantize.uniform import packed, rtn
from passes.sites import figures, mask_bytes, put_quant_codes, put_sparse_codes
from passes.sparsify.branches import BRANCHES, branch_params
from passes.sparsify.masks import MASKS, mask_of, pattern_at

MOST_BITS = 8
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Pack(Pass):
    """Store masked weights that are still floats as kept values and a bit an input, and branches as codes."""

    values: Literal["float16", "bfloat16", "float32"] = field(
        default="float16", metadata={"help": "what kept values are stored as; float32 keeps them bit for bit"}
    )
    branches: int = field(
        default=8, metadata={"help": "bits of the codes of branches, 2 to 8, a scale a row; 32 leaves them in float"}
    )

    name: ClassVar[str] = "pack"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.LOWER
    order_reason: ClassVar[str] = "pack stores what is left in floats"
    requires: ClassVar[frozenset[str]] = frozenset({"masks"})
    removes: ClassVar[frozenset[str]] = frozenset({"masks"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for a width codes cannot have."""
        if self.branches not in (*range(2, 9), 32):
            raise OptionError(self.name, "branches", f"{self.branches} is neither 2..8 nor 32")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites that have a mask, with what they take where no pass before stores them as codes."""
        rows = []
        for site in linear_sites(program, list(program.graph.nodes))[0]:
            pattern = pattern_at(program, site)
            if pattern is not None:
                values = site.rows * kept_inputs(site.inputs, pattern.n, pattern.m) * DTYPES[self.values].itemsize
                size, weights = values + mask_bytes(site), site.rows * site.inputs
                found = {"bits": 8 * size / weights, "bytes": float(size), "weights": float(weights)}
                rows.append(PlanRow(site.name, self.name, found))
        return rows

    def run(self, program: Program, ctx: Context) -> None:
        """Pack every weight that has a mask; what earlier passes stored as codes has none any more."""
        masked = program.attributes.get(MASKS, {})
        sites = [s for s in linear_sites(program, list(program.graph.nodes))[0] if s.weight in masked]
        step = ctx.log.progress(len(sites), self.name)
        for site in sites:
            mask, weight = mask_of(program, site), program.params.get(site.weight)
            assert mask is not None
            values = weight.to(DTYPES[self.values])
            codes = sparse_codes(values, mask.kept, mask.pattern.n, mask.pattern.m)
            whole = float(weight.double().square().sum())
            lost = float((weight.double() - values.double()).square().sum()) / whole if whole > 0 else 0.0
            put_sparse_codes(program, site, codes, self.name)
            ctx.log.report(site=site.name, **figures(codes.stored_bits, site.rows, site.inputs, lost))
            step()
        pack_branches(program, self.branches, self.name, ctx)


def pack_branches(program: Program, bits: int, by: str, ctx: Context) -> None:
    """Store the weights of branches as codes of so many bits, a scale a row, and forget that they were branches.

    bits: above 8 leaves them in float.
    """
    inside = branch_params(program)
    program.attributes.pop(BRANCHES, None)
    if bits > MOST_BITS:
        return
    for site in [s for s in linear_sites(program, list(program.graph.nodes))[0] if s.weight in inside]:
        weight = program.params.get(site.weight).double()
        codes = packed(rtn(weight, bits, site.inputs, symmetric=True), True)
        off, whole = weight - codes.dequantize(torch.float64), weight.square().sum().clamp_min(1e-300)
        put_quant_codes(program, site, codes, by)
        row = figures(codes.stored_bits, site.rows, site.inputs, float(off.square().sum() / whole))
        # What a branch takes counts against the weights of the model, of which it has none.
        ctx.log.report(site=site.name, **{**row, "weights": 0.0})
