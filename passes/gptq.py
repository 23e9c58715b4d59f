"""`gptq`: uniform codes in which later inputs make up for the rounding of earlier ones (GPTQ, 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ir.analysis import LinearSite, blocks, sibling_sites
from ir.errors import UnsupportedError, UsageError
from ir.ops.nm import gather_kept, pack_mask
from ir.ops.quant import QuantCodes
from ir.ops.sparse import SparseCodes
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage, Trial
from passes.moments import moments_of
from passes.quantize.gptq import GptqSpec, Order, gptq, sparse_gptq
from passes.quantize.hessian import Gram
from passes.quantize.salience import row_energy
from passes.quantize.targets import Moments, corrected
from passes.quantize.uniform import UniformCodes, packed, packed_bytes
from passes.sites import check_group, check_skip, choose_sites, dense_weight, figures, outside_blocks, planned
from passes.solved import Solved, put_solved, restore_solved, save_solved
from passes.sparsify.masks import PACKED, Mask, floats_behind, kept_group, mask_of, pattern_at
from passes.sparsify.pattern import Pattern, pattern_of
from passes.stream import Step, walk
from passes.widths import width_of


@dataclass(frozen=True)
class Gptq(Pass):
    """Round weights to uniform levels one input after another, the rest of a row making up for each error."""

    bits: int = field(default=4, metadata={"help": "bits per code, 2 to 8, where the pass bits chose no other"})
    group: int = field(
        default=64, metadata={"help": "inputs that share a scale and zero point; must divide every input"}
    )
    symmetric: bool = field(default=False, metadata={"help": "a range around zero, without stored zero points"})
    terms: int = field(
        default=0, metadata={"help": "powers of two a scale is a sum of, 1 to 3; 0 takes it as it is, in float16"}
    )
    order: Order = field(
        default="groups",
        metadata={
            "help": "groups: those that matter most first, inputs within likewise; inputs: across groups, whose levels "
            "are laid beforehand; stored: as they come"
        },
    )
    search: bool = field(default=True, metadata={"help": "cut a group's range where that leaves less error"})
    target: Literal["float", "own"] = field(
        default="float",
        metadata={
            "help": "float: come close to the float model's outputs on the compressed inputs; own: to the weight's"
        },
    )
    share: float = field(default=0.25, metadata={"help": "how much of that correction is taken, 0 to 1"})
    sequential: bool = field(
        default=False,
        metadata={"help": "sites of a block one after another, each on inputs as those before it left them"},
    )
    damp: float = field(default=0.01, metadata={"help": "damping of the Hessian, relative to its mean diagonal"})
    pattern: str = field(
        default="", metadata={"help": "n:m, such as 2:4, to choose in the same loop which inputs a row keeps"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "gptq"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False
    widths: ClassVar[range] = range(2, 9)

    def needs(self) -> Calib | None:
        """Return the compressed stream, and the float one beside it for float targets."""
        return Calib("both" if self._both else "compressed", original=True)

    @property
    def _both(self) -> bool:
        return self.target == "float" and self.share > 0

    def validate(self) -> None:
        """Raise OptionError for values codes cannot have."""
        for option, low, high in (("bits", 2, 8), ("terms", 0, 3), ("share", 0, 1), ("group", 1, 1 << 20)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        if not 0 < self.damp <= 1:
            raise OptionError(self.name, "damp", f"{self.damp} is outside (0, 1]")
        if self.pattern:
            try:
                kept_group(self.group, pattern_of(self.pattern), self.name)
            except ValueError as error:
                raise OptionError(self.name, "pattern", str(error), fix="use one such as 2:4") from None

    def inserts(self) -> frozenset[str]:
        """Return what masked weights are packed for."""
        return PACKED if self.pattern else frozenset()

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        sites = choose_sites(program, nodes, self.skip, Context())
        check_group(sites, self.group, self.name)
        shapes = [(s, width_of(program, s, self.bits), self._pattern_at(program, s)) for s in sites]
        return [PlanRow(site.name, self.name, planned(self, site, bits, kept)) for site, bits, kept in shapes]

    def run(self, program: Program, ctx: Context) -> None:
        """Round block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        check_skip(program, self.skip, self.name)
        check_group(choose_sites(program, nodes, self.skip, ctx), self.group, self.name)
        outside_blocks(program, nodes, self.skip, ctx)
        floats = floats_behind(program, ctx)
        for walked in walk(program, ctx, "both" if self._both else "compressed", self.name, floats):
            sites = choose_sites(program, walked.block.nodes, self.skip, Context())
            if not restore_solved(program, sites, self.name, ctx, walked.block.index):
                save_solved(ctx, walked.block.index, self._round_block(program, walked, sites, floats, ctx))

    def _round_block(
        self, program: Program, walked: Step, sites: list[LinearSite], floats: Program | None, ctx: Context
    ) -> dict[str, Solved]:
        """Round a block's sites on the second moments of their inputs; return them by the node's name."""
        solved: dict[str, Solved] = {}
        for group, known in moments_of(walked, sibling_sites(sites), self._both, self.sequential):
            for site in group:
                row = solved[site.node.name] = self.fit(program, site, known, floats=floats)
                put_solved(program, row, self.name, ctx)
        return solved

    def fit(
        self,
        program: Program,
        site: LinearSite,
        moments: Moments,
        shares: Tensor | None = None,
        floats: Program | None = None,
        met: Tensor | None = None,
    ) -> Solved:
        """Return a site's codes, fitted to its weights alone where its inputs tell nothing.

        shares: of its groups' ranges, as `passes.quantize.gptq.gptq` takes them; searched for without. floats: the
        program whose weight is to be coded, where that of this one has lost inputs to a mask. met: of a dense weight,
        filled as `passes.quantize.gptq.gptq` does.
        """
        spec, mask = self._spec(width_of(program, site, self.bits)), self._kept(program, site)
        weight, gram = dense_weight(program, floats, site, self.name), moments.gram
        hessian, fallback = gram.matrix, ""
        target = weight
        if not bool(hessian.diagonal().any()):
            fallback = f"its inputs were zero for all {gram.tokens} tokens, so it is rounded without them"
        else:
            try:
                target = corrected(weight, moments, self.damp, self.share)
                codes = self._coded(target, hessian, spec, mask, shares, gram.tokens, site.name, met)
            except UnsupportedError as error:
                fallback, target = f"{error.what} ({error.why}), so it is rounded without them", weight
        if fallback:
            codes = self._coded(weight, None, spec, mask, shares, 0, site.name, met)
        left = target - codes.dequantize(torch.float64)
        lost, whole = (float(row_energy(m, None if fallback else gram).sum()) for m in (left, target))
        rows = figures(codes.stored_bits, site.rows, site.inputs, lost / whole if whole > 0 else 0.0)
        return Solved(site, codes, rows, fallback)

    def _pattern_at(self, program: Program, site: LinearSite) -> Pattern | None:
        """Return the pattern of the mask that a site has or is to get."""
        chosen = pattern_of(self.pattern) if self.pattern else None
        return pattern_at(program, site) or (chosen if chosen is not None and chosen.fits(site.inputs) else None)

    def _kept(self, program: Program, site: LinearSite) -> Mask | Pattern | None:
        """Return the mask on a site, or the pattern that one is to be chosen by; None for a dense weight."""
        mask = mask_of(program, site)
        if mask is not None:
            if self.pattern:
                raise UsageError(
                    f"option pattern of pass {self.name} cannot be used",
                    where=site.name,
                    why=f"it has a mask {mask.pattern} already",
                    fix="leave out the pattern, or the pass that chose the mask",
                )
            return mask
        chosen = pattern_of(self.pattern) if self.pattern else None
        return chosen if chosen is not None and chosen.fits(site.inputs) else None

    def _coded(
        self,
        weight: Tensor,
        hessian: Tensor | None,
        spec: GptqSpec,
        kept: Mask | Pattern | None,
        shares: Tensor | None,
        tokens: int,
        site: str,
        met: Tensor | None = None,
    ) -> QuantCodes | SparseCodes:
        """Return a weight's codes, of the weights it keeps where it has a mask or is to get one."""
        if kept is None:
            codes = gptq(weight, hessian, spec, shares=shares, met=met, tokens=tokens, site=site)
            return packed(codes, self.symmetric)
        known, pattern = (kept.kept, kept.pattern) if isinstance(kept, Mask) else (kept, kept)
        group = kept_group(spec.group, pattern, self.name)
        own = replace(spec, symmetric=True)
        codes, mask = sparse_gptq(weight, hessian, own, known, tokens=tokens, site=site)
        inner = packed(replace(codes, codes=gather_kept(codes.codes, mask), group=group), True)
        return SparseCodes(inner, pack_mask(mask, pattern.n, pattern.m), pattern.n, pattern.m, weight.shape[1])

    def stored_bytes(self, site: LinearSite, bits: int) -> int:
        """Return the bytes of a site's codes, scales and zero points at a width."""
        return packed_bytes(site.rows, site.inputs, bits, self.group, self.symmetric)

    def trial(
        self, weight: Tensor, gram: Gram | None, choices: Sequence[int], site: LinearSite, ctx: Context
    ) -> list[Trial]:
        """Return the site rounded at each width."""
        del ctx
        found: list[Trial] = []
        for bits in choices:
            matrix, tokens = (None, 0) if gram is None else (gram.matrix, gram.tokens)
            codes: UniformCodes = gptq(weight, matrix, self._spec(bits), tokens=tokens, site=site.name)
            lost = row_energy(weight - packed(codes, self.symmetric).dequantize(torch.float64), gram)
            found.append(Trial(bits, self.stored_bytes(site, bits), lost))
        return found

    def _spec(self, bits: int) -> GptqSpec:
        return GptqSpec(bits, self.group, self.symmetric, self.terms, self.order, self.search, self.damp)
