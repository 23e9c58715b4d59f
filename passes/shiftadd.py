"""`shiftadd`: linears as sums of sign planes with power-of-two scales (ShiftAddLLM, 2406.05981)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ir.analysis import LinearSite, blocks, sibling_sites
from ir.ops.codes import group_count, part_types
from ir.ops.hadamard import block_order
from ir.ops.packing import pack_bits
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage, Trial
from passes.bits import Bits
from passes.equiv.turns import random_signs
from passes.moments import moments_of
from passes.pipeline import Item
from passes.quantize.hessian import Gram
from passes.quantize.salience import row_energy
from passes.quantize.targets import Moments
from passes.rotation import plan_rotation, rotate_sites
from passes.shiftcode.budget import choose
from passes.shiftcode.siblings import Fitting, fit_masked, fit_siblings, quick
from passes.shiftcode.solver import metric_of, solve
from passes.shiftcode.spec import MOST_TRITS, ShiftSpec
from passes.sites import (
    check_group,
    check_skip,
    choose_sites,
    dense_weight,
    outside_blocks,
    planned,
    weights_of,
)
from passes.solved import Solved, put_solved, restore_solved, save_solved
from passes.sparsify.masks import floats_behind, kept_group, mask_of, pattern_at
from passes.stream import Step, walk
from passes.widths import width_of

_LAT_COLUMNS = 8
nomul = torch.ops.nomul


@dataclass(frozen=True)
class ShiftAdd(Pass):
    """Replace float linears by signed binary planes with power-of-two scales, fitted to the layer's inputs."""

    bits: int = field(default=3, metadata={"help": "sign planes per weight, where the pass bits chose no other"})
    group: int = field(
        default=64,
        metadata={"help": "weights that share a set of scales, 0 for all: inputs of a row (must divide every input)"},
    )
    mode: Literal["row", "lat", "acc"] = field(
        default="row",
        metadata={
            "help": "who shares scales: row: inputs of a row; lat: 8 inputs of group/8 rows; acc: rows of an input"
        },
    )
    basis: Literal["rotated", "plain"] = field(
        default="rotated", metadata={"help": "rotated: inputs turned by Hadamard matrices first, at run time by adds"}
    )
    code: Literal["planes", "trits", "trits31"] = field(
        default="planes", metadata={"help": "digits -1, +1; trits: -1, 0, +1; trits31: two trits with scales 3:1"}
    )
    terms: int = field(default=2, metadata={"help": "powers of two per scale, 1 to 4; 0: float16 scales, multiplied"})
    offset: bool = field(default=True, metadata={"help": "one more power-of-two value per group, added to its weights"})
    bpw: float = field(
        default=0.0,
        metadata={"help": "stored bits per weight to stay within: chooses group, terms, offset, bits by site; 0: no"},
    )
    nested: tuple[int, ...] = field(
        default=(), metadata={"help": "precisions that share planes, such as [2 3 4]; one is chosen at load time"}
    )
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
    weighted: bool = field(
        default=True, metadata={"help": "weigh a group's inputs by their curvature in the first fit"}
    )
    ordered: bool = field(default=True, metadata={"help": "take groups and inputs by falling curvature"})
    feedback: bool = field(default=True, metadata={"help": "later scales make up for the rounding of earlier ones"})
    rounds: int = field(default=10, metadata={"help": "alternations of scales and codes in the first fit, at most"})
    starts: int = field(default=4, metadata={"help": "code books the first fit starts from; the best is kept"})
    iterations: int = field(default=4, metadata={"help": "walks and scale solves per group after the first fit"})
    polish: int = field(default=2, metadata={"help": "code descents and scale solves per group after those"})
    refit: bool = field(default=False, metadata={"help": "solve all scales of a row together after the column loop"})
    sweeps: int = field(default=2, metadata={"help": "passes over all groups after it; more is closer and slower"})
    damp: float = field(default=0.01, metadata={"help": "damping of the Hessian, relative to its mean diagonal"})
    calib: Literal["stream", "none"] = field(
        default="stream", metadata={"help": "stream: inputs from the compressed prefix; none: fit the weights alone"}
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "shiftadd"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"shift-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False
    widths: ClassVar[range] = range(1, 9)

    def needs(self) -> Calib | None:
        """Return the compressed stream, the float one beside it for float targets, gradients for `bpw`, or nothing."""
        if self.calib == "none":
            return None
        learns = bool(self.bpw)
        return Calib("both" if self._both else "compressed", gradients=learns, original=True, tokens=learns)

    @property
    def _both(self) -> bool:
        return self.target == "float" and self.share > 0

    def validate(self) -> None:
        """Raise OptionError for values outside what codes can hold."""
        for option, low, high in _RANGES:
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        if not 0 < self.damp <= 1:
            raise OptionError(self.name, "damp", f"{self.damp} is outside (0, 1]")
        if self.code == "trits31" and self.bits != 2:
            raise OptionError(self.name, "bits", "trits31 is two trits", fix="give bits=2")
        if self.code != "planes" and self.bits > MOST_TRITS:
            raise OptionError(self.name, "bits", f"{self.bits} is outside 1..{MOST_TRITS} for trits")
        if self.nested:
            self._check_nested()
        if self.bpw and (self.mode != "row" or self.nested or self.code != "planes"):
            raise OptionError(self.name, "bpw", "it chooses for mode=row code=planes without nested precisions")

    def _check_nested(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.nested))
        if not ascending or not all(1 <= p <= 8 for p in self.nested):
            raise OptionError(self.name, "nested", f"{list(self.nested)} are not ascending numbers of planes, 1 to 8")
        for option, plain in (("code", "planes"), ("calib", "stream")):
            if getattr(self, option) != plain:
                raise OptionError(self.name, "nested", f"it cannot be used with {option}={getattr(self, option)}")

    def spec(self, site: LinearSite, bits: int) -> ShiftSpec:
        """Return the solver's options for a site at a width."""
        group, row_group = self.group or site.inputs, 1
        if self.mode == "lat":
            rows = self.group // _LAT_COLUMNS if self.group else group_count(site.rows, _LAT_COLUMNS)
            group, row_group = _LAT_COLUMNS, max(1, rows)
        elif self.mode == "acc":
            group, row_group = 1, self.group or site.rows
        same = {name: getattr(self, name) for name in _SAME}
        return ShiftSpec(bits=bits, group=group, row_group=row_group, **same)

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take, and the rotations that come first."""
        sites = choose_sites(program, _block_nodes(program), self.skip, Context())
        self._check_group(sites)
        rows = []
        if self.basis == "rotated":
            turns = plan_rotation(program, [s for s in sites if pattern_at(program, s) is None], 0).online
            rows = [PlanRow(t.sites[0].name, "insert nomul.hadamard", {"adds": float(t.adds)}) for t in turns]
        if self.bpw:
            self._within_budget(sites)
            return rows + [PlanRow(s.name, self.name, {"bits": self.bpw}) for s in sites]
        shapes = [(s, self._width(program, s), pattern_at(program, s)) for s in sites]
        return rows + [PlanRow(site.name, self.name, planned(self, site, bits, kept)) for site, bits, kept in shapes]

    def _within_budget(self, sites: Sequence[LinearSite]) -> tuple[ShiftAdd, Bits]:
        """Return the pass with group, terms and offset chosen for `bpw`, and the one that chooses planes by site."""
        weights = sum(s.rows * s.inputs for s in sites)

        def stored(spec: ShiftSpec) -> float:
            return 8 * sum(_bytes(spec, s, (spec.bits,)) for s in sites) / weights

        rotated = self.basis == "rotated"
        found, planes = choose(self.bpw, self.spec(sites[0], self.bits), [s.inputs for s in sites], stored, rotated)
        group = 0 if found.group >= max(s.inputs for s in sites) else found.group
        chosen = replace(self, bpw=0.0, group=group, terms=found.terms, offset=found.offset)
        method: Literal["loss", "gradient"] = "loss" if self.calib == "none" else "gradient"
        return chosen, Bits(target=self.bpw, choices=planes, method=method, calib=self.calib, skip=self.skip)

    def _run_within_budget(self, program: Program, ctx: Context) -> None:
        """Choose the options that meet `bpw`, then the planes of every site, and run with them."""
        chosen, widths = self._within_budget(choose_sites(program, _block_nodes(program), self.skip, Context()))
        ctx.log.note(f"bpw={self.bpw:g} stands for {Item(widths)},{Item(chosen)}")
        work = None if ctx.work is None else ctx.work / widths.name
        widths.run(program, replace(ctx, log=ctx.log.of(widths.name), work=work, following=(chosen,)))
        chosen.run(program, ctx)

    def _check_group(self, sites: Sequence[LinearSite]) -> None:
        if self.mode == "row" and self.group and not self.bpw:
            check_group(sites, self.group, self.name)

    def _check_masks(self, program: Program, sites: Sequence[LinearSite]) -> None:
        """Raise OptionError for options that weights with masks do not have."""
        for site in sites:
            mask = mask_of(program, site)
            if mask is None:
                continue
            if self.mode != "row" or self.nested:
                option = "nested" if self.nested else "mode"
                raise OptionError(self.name, option, f"{site.name} has a mask {mask.pattern}, whose scales a row has")
            if self.group:
                kept_group(self.group, mask.pattern, self.name)

    def _width(self, program: Program, site: LinearSite) -> int:
        return width_of(program, site, self.bits) if self.code == "planes" else self.bits

    def run(self, program: Program, ctx: Context) -> None:
        """Compress block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        nodes = _block_nodes(program)
        check_skip(program, self.skip, self.name)
        if self.bpw:
            self._run_within_budget(program, ctx)
            return
        sites = choose_sites(program, nodes, self.skip, ctx)
        self._check_group(sites)
        outside_blocks(program, nodes, self.skip, ctx)
        self._check_masks(program, sites)
        if self.basis == "rotated":
            # A turned input mixes what a mask tells apart.
            rotate_sites(program, [s for s in sites if mask_of(program, s) is None], ctx.seed, self.name)
        # The first solution on a machine compiles the solver, which takes half a minute that should have a name.
        step = ctx.log.progress(1, "prepare the solver")
        solve(torch.eye(2), None, ShiftSpec(group=2))
        step()
        if self.calib == "none":
            self._run_free(program, ctx)
            return
        floats = floats_behind(program, ctx)
        for walked in walk(program, ctx, "both" if self._both else "compressed", self.name, floats):
            sites = choose_sites(program, walked.block.nodes, self.skip, Context())
            if not restore_solved(program, sites, self.name, ctx, walked.block.index):
                save_solved(ctx, walked.block.index, self._solve(program, walked, sites, ctx))

    def _run_free(self, program: Program, ctx: Context) -> None:
        step = ctx.log.progress(len(blocks(program)), self.name)
        for block in blocks(program):
            sites = choose_sites(program, block.nodes, self.skip, Context())
            solved: dict[str, Solved] = {}
            for group in sibling_sites(sites):
                solved |= self._put(program, group, None, ctx)
            save_solved(ctx, block.index, solved)
            step()

    def _solve(self, program: Program, walked: Step, sites: list[LinearSite], ctx: Context) -> dict[str, Solved]:
        """Fit a block's sites to the second moments of their inputs and put their codes in place, by node name."""
        solved: dict[str, Solved] = {}
        for group, known in moments_of(walked, sibling_sites(sites), self._both, self.sequential):
            solved |= self._put(program, group, known, ctx)
        return solved

    def _put(
        self, program: Program, group: list[LinearSite], moments: Moments | None, ctx: Context
    ) -> dict[str, Solved]:
        """Fit sites that read the same input and put their codes in place; return them by the node's name."""
        how = Fitting(lambda site: self.spec(site, self._width(program, site)), self.nested, self.share)
        masks = {site.name: mask_of(program, site) for site in group}
        dense = [site for site in group if masks[site.name] is None]
        rows = fit_siblings(weights_of(program, dense, self.name), dense, moments, how) if dense else []
        for site in group:
            mask = masks[site.name]
            if mask is not None:
                target = dense_weight(program, floats_behind(program, ctx), site, self.name)
                rows.append(fit_masked(target, site, mask, moments, how))
        solved = {row.site.node.name: row for row in rows}
        for row in rows:
            put_solved(program, row, self.name, ctx)
        return solved

    def stored_bytes(self, site: LinearSite, bits: int) -> int:
        """Return the bytes of a site's codes at a width; of nested ones at all precisions."""
        return _bytes(self.spec(site, bits), site, self.nested or (bits,))

    def trial(
        self, weight: Tensor, gram: Gram | None, choices: Sequence[int], site: LinearSite, ctx: Context
    ) -> list[Trial]:
        """Return the site fitted at each width, in fewer rounds than the pass itself takes."""
        if self.basis == "rotated":
            weight, gram = _rotated(weight, gram, ctx.seed)
        specs = [quick(self.spec(site, bits)) for bits in choices]
        metric = None if gram is None else metric_of(gram.matrix, specs[0], tokens=gram.tokens, site=site.name)
        found = [solve(weight, metric, spec, site=site.name) for spec in specs]
        return [
            Trial(bits, self.stored_bytes(site, bits), row_energy(weight - codes.dequantize(torch.float64), gram))
            for bits, codes in zip(choices, found, strict=True)
        ]


_RANGES = (
    *(("bits", 1, 8), ("bpw", 0, 16), ("terms", 0, 4), ("group", 0, 1 << 20), ("share", 0, 1), ("rounds", 0, 1000)),
    *(("starts", 1, 4), ("iterations", 0, 100), ("polish", 0, 100), ("sweeps", 0, 100)),
)
_SAME = (
    *("code", "terms", "offset", "weighted", "ordered", "feedback", "rounds", "starts", "iterations", "polish"),
    *("refit", "sweeps", "damp"),
)


def _bytes(spec: ShiftSpec, site: LinearSite, precisions: Sequence[int]) -> int:
    """Return the bytes of a site's codes, which share the planes of the last precision."""
    spec = spec.clipped(site.rows, site.inputs)
    sizes = (site.rows, site.inputs, spec.group, spec.terms, spec.row_group, spec.code, spec.offset)
    found = [part_types(p, *sizes) for p in precisions]
    parts = [found[-1]["signs"], *(kind for types in found for name, kind in types.items() if name != "signs")]
    return sum(dtype.itemsize * math.prod(dims) for dtype, dims in parts)


def _rotated(weight: Tensor, gram: Gram | None, seed: int) -> tuple[Tensor, Gram | None]:
    """Return a weight and the Gram matrix of its inputs in a random basis, in which the energies of outputs stay."""
    width = weight.shape[1]
    order = block_order(width)
    signs = pack_bits(random_signs(seed, "trial", width), 1)

    def turned(rows: Tensor) -> Tensor:
        out: Tensor = nomul.hadamard(rows, signs, order)
        return out / math.sqrt(order)

    if gram is None:
        return turned(weight), None
    matrix = gram.matrix.double()
    return turned(weight), Gram(turned(turned(matrix).T), gram.tokens)


def _block_nodes(program: Program) -> list[fx.Node]:
    return [n for block in blocks(program) for n in block.nodes]
