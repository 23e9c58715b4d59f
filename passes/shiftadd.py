"""`shiftadd`: linears as sums of sign planes with power-of-two scales (ShiftAddLLM, 2406.05981)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from ir.analysis import LinearSite, blocks, sibling_sites
from ir.ops.shiftcode import ShiftCodes, dequantize, group_count, take_rows
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.quantize.hessian import Gram, empty_gram, update
from passes.shiftcode.solver import ShiftSpec, metric_of, relative_loss, solve
from passes.sites import check_group, check_skip, choose_sites, figures, outside_blocks, put_shift_codes, weights_of
from passes.stream import Step, walk

_PARTS = ("signs", "scales", "exponents", "offsets")


@dataclass(frozen=True)
class ShiftAdd(Pass):
    """Replace float linears by signed binary planes with power-of-two scales, fitted to the layer's inputs."""

    bits: int = field(default=3, metadata={"help": "sign planes per weight"})
    group: int = field(default=64, metadata={"help": "inputs that share one set of scales; must divide every input"})
    terms: int = field(default=2, metadata={"help": "powers of two per scale: 1, 2 or 3"})
    offset: bool = field(default=True, metadata={"help": "one more power-of-two value per group, added to its weights"})
    rounds: int = field(default=10, metadata={"help": "alternations of scales and codes per group, at most"})
    starts: int = field(default=4, metadata={"help": "code books each group is fitted from; the best is kept"})
    polish: int = field(default=2, metadata={"help": "refits of a group's scales and codes inside the column loop"})
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
    exact: ClassVar[bool] = False

    def needs(self) -> Calib | None:
        """Return the compressed stream, or nothing for the data-free fit."""
        return Calib("compressed") if self.calib == "stream" else None

    def validate(self) -> None:
        """Raise OptionError for values outside what codes can hold."""
        for option, value, low, high in (
            ("bits", self.bits, 1, 8),
            ("terms", self.terms, 1, 3),
            ("group", self.group, 1, 1 << 20),
            ("rounds", self.rounds, 0, 1000),
            ("starts", self.starts, 1, 4),
            ("polish", self.polish, 0, 100),
            ("sweeps", self.sweeps, 0, 100),
        ):
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        if not 0 < self.damp <= 1:
            raise OptionError(self.name, "damp", f"{self.damp} is outside (0, 1]")

    def spec(self) -> ShiftSpec:
        """Return the solver's options."""
        return ShiftSpec(
            self.bits,
            self.group,
            self.terms,
            self.offset,
            self.rounds,
            self.starts,
            self.damp,
            self.polish,
            self.sweeps,
        )

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take."""
        sites = choose_sites(program, _block_nodes(program), self.skip, Context())
        check_group(sites, self.group, self.name)
        return [PlanRow(s.name, self.name, _predicted(self, s)) for s in sites]

    def run(self, program: Program, ctx: Context) -> None:
        """Compress block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        nodes = _block_nodes(program)
        check_skip(program, self.skip, self.name)
        check_group(choose_sites(program, nodes, self.skip, ctx), self.group, self.name)
        outside_blocks(program, nodes, self.skip, ctx)
        if self.calib == "none":
            step = ctx.log.progress(len(blocks(program)), self.name)
            for block in blocks(program):
                sites = choose_sites(program, block.nodes, self.skip, Context())
                self._finish(program, ctx, block.index, sites, self._solve_free(program, sites))
                step()
            return
        for walked in walk(program, ctx, "compressed", self.name):
            sites = choose_sites(program, walked.block.nodes, self.skip, Context())
            done = _restore(program, sites, ctx, walked.block.index)
            if not done:
                solved = self._solve(program, walked, sites)
                self._finish(program, ctx, walked.block.index, sites, solved)

    def _solve(self, program: Program, walked: Step, sites: list[LinearSite]) -> _Solved:
        """Fit the sites of a block to the second moments of their inputs."""
        groups = sibling_sites(sites)
        grams = [empty_gram(group[0].inputs) for group in groups]
        walked.observe({g[0].node.args[0]: _adder(m) for g, m in zip(groups, grams, strict=True)})  # type: ignore[misc]
        return [row for g, gram in zip(groups, grams, strict=True) for row in self._fit(program, g, gram)]

    def _solve_free(self, program: Program, sites: list[LinearSite]) -> _Solved:
        return [row for group in sibling_sites(sites) for row in self._fit(program, group, None)]

    def _fit(self, program: Program, group: list[LinearSite], gram: Gram | None) -> _Solved:
        """Fit sites that share their input, stacked along the rows."""
        spec, name = self.spec(), group[0].name
        weight = weights_of(program, group, self.name)
        metric = None if gram is None else metric_of(gram.matrix, spec, tokens=gram.tokens, site=name)
        codes = solve(weight, metric, spec, site=name)
        solved, row = [], 0
        for site in group:
            part = take_rows(codes, row, row + site.rows)
            decoded = dequantize(part, torch.float64)
            rel = relative_loss(weight[row : row + site.rows], decoded, None if gram is None else gram.matrix)
            solved.append((site, part, figures(part.stored_bits, site.rows, site.inputs, rel)))
            row += site.rows
        return solved

    def _finish(self, program: Program, ctx: Context, index: int, sites: list[LinearSite], solved: _Solved) -> None:
        """Keep a block's codes, then put them in place in the order of its sites, as a resumed run will."""
        solved = sorted(solved, key=lambda row: sites.index(row[0]))
        tensors, facts = {}, {}
        for site, codes, numbers in solved:
            for part in _PARTS:
                if getattr(codes, part) is not None:
                    tensors[f"{site.node.name}/{part}"] = getattr(codes, part)
            facts[site.node.name] = {"figures": numbers, "group": codes.group, "terms": codes.terms}
        save_block(ctx.work, index, tensors, dict(facts))
        for site, codes, numbers in solved:
            put_shift_codes(program, site, codes, self.name)
            ctx.log.report(site=site.name, **numbers)


_Solved = list[tuple[LinearSite, ShiftCodes, dict[str, float]]]


def _block_nodes(program: Program) -> list[fx.Node]:
    return [n for block in blocks(program) for n in block.nodes]


def _adder(gram: Gram):  # type: ignore[no-untyped-def]
    return lambda value: update(gram, value)


def _restore(program: Program, sites: list[LinearSite], ctx: Context, index: int) -> bool:
    """Put a block's codes from an earlier run in place; return whether there were any."""
    kept = load_block(ctx.work, index)
    if kept is None:
        return False
    tensors, facts = kept
    for site in sites:
        fact = facts[site.node.name]
        assert isinstance(fact, dict)
        signs, scales, exponents = (tensors[f"{site.node.name}/{part}"] for part in _PARTS[:3])
        offsets = tensors.get(f"{site.node.name}/offsets")
        codes = ShiftCodes(signs, scales, exponents, offsets, fact["group"], fact["terms"], site.inputs)
        put_shift_codes(program, site, codes, "shiftadd")
        ctx.log.report(site=site.name, **fact["figures"])
    return True


def _predicted(options: ShiftAdd, site: LinearSite) -> dict[str, float]:
    groups = group_count(site.inputs, options.group)
    row = options.bits * -(-site.inputs // 8) + -(-groups * options.bits * options.terms // 2) + 2
    row += -(-groups * options.terms // 2) if options.offset else 0
    return {"bits": 8 * row / site.inputs, "bytes": float(row * site.rows), "weights": float(site.rows * site.inputs)}
