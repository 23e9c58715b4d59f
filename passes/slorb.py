"""`slorb`: a small branch beside masked linears that gives back some of what masks drop (SLoRB, and better starts)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ir.analysis import BRANCH, LinearSite, blocks, sibling_sites
from ir.errors import UnsupportedError, UsageError
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.moments import moments_of
from passes.quantize.salience import relative_loss, row_energy
from passes.quantize.targets import Moments, corrected
from passes.sites import check_skip, choose_sites, weights_of
from passes.sparsify.branches import Branch, branch_of, put_branch
from passes.sparsify.lowrank import beside, completed, group_means
from passes.sparsify.masks import TRAINED, Mask, mask_of, pattern_at
from passes.sparsify.sparsegpt import under_mask
from passes.stream import walk

Start = Literal["svd", "dropped", "mean"]


@dataclass(frozen=True)
class Slorb(Pass):
    """Add a branch of 1/k of the inputs beside every masked linear, fitted to what its mask drops.

    Source: AST (2407.20584, section 3.4) for start=mean; kept weights that give way to the branch, and a branch fitted
    by the strength of inputs, as in SLiM (2410.09615, section 3.2).
    """

    k: int = field(default=16, metadata={"help": "inputs for each number that a branch sees"})
    start: Start = field(
        default="svd",
        metadata={
            "help": "svd: the best product of that rank where nothing is kept; dropped, mean: sums of k neighbours "
            "times the mean of what is dropped there, over those dropped or, as published, over all k"
        },
    )
    rounds: int = field(default=8, metadata={"help": "svd: how often it is fitted anew"})
    refit: bool = field(
        default=True, metadata={"help": "let kept weights make up for what the branch leaves, as sparsegpt does"}
    )
    share: float = field(
        default=0.25, metadata={"help": "how much of the correction for what earlier blocks did is taken, 0 to 1"}
    )
    damp: float = field(default=0.01, metadata={"help": "damping of the Hessian, relative to its mean diagonal"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites without a branch, `*` stands for any text"})

    name: ClassVar[str] = "slorb"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.SPARSIFY
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "masks"})
    refuses: ClassVar[frozenset[str]] = frozenset({TRAINED})
    data: ClassVar[Calib | None] = Calib("both", original=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values out of range."""
        for option, low, high in (("k", 2, 1 << 16), ("rounds", 0, 1000), ("share", 0, 1)):
            value = getattr(self, option)
            if not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        if not 0 < self.damp <= 1:
            raise OptionError(self.name, "damp", f"{self.damp} is outside (0, 1]")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites that get a branch, with what its codes will take beside the weights."""
        sites = [s for b in blocks(program) for s in choose_sites(program, b.nodes, self.skip, Context())]
        return [self._planned(s) for s in sites if pattern_at(program, s) is not None and s.inputs % self.k == 0]

    def _planned(self, site: LinearSite) -> PlanRow:
        rank = site.inputs // self.k
        numbers = site.rows * rank + (rank * site.inputs if self.start == "svd" else 0)
        scales = site.rows + (rank if self.start == "svd" else 0)
        return PlanRow(f"{site.name}{BRANCH}", self.name, {"bytes": float(numbers + 2 * scales), "weights": 0.0})

    def run(self, program: Program, ctx: Context) -> None:
        """Fit block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        if ctx.original is None:
            raise UsageError(
                f"pass {self.name} needs the weights that masks dropped",
                why="they were dropped before this run began",
                fix="put it into the pipeline that chooses the masks",
            )
        check_skip(program, self.skip, self.name)
        for walked in walk(program, ctx, "both", self.name, ctx.original):
            sites = self._masked(program, walked.block.nodes, ctx)
            found, kept, why = load_block(ctx.work, walked.block.index), dict[str, Tensor](), dict[str, object]()
            for group, moments in moments_of(walked, sibling_sites(sites), True, False):
                for site in group:
                    stem, mask = site.node.name, mask_of(program, site)
                    assert mask is not None
                    if found is None:
                        weight, branch, why[stem] = self._fit(program, ctx.original, site, mask, moments)
                        kept |= {f"{stem}/weight": weight, f"{stem}/up": branch.up}
                        if isinstance(branch.down, Tensor):
                            kept[f"{stem}/down"] = branch.down
                    else:
                        weight, branch = found[0][f"{stem}/weight"], self._restored(found[0], stem)
                        why[stem] = found[1][stem]
                    if why[stem]:
                        ctx.log.skip(site.name, str(why[stem]))
                    self._put(program, ctx.original, site, weight, branch, moments, ctx)
            if found is None:
                save_block(ctx.work, walked.block.index, kept, why)

    def _masked(self, program: Program, nodes: tuple[torch.fx.Node, ...], ctx: Context) -> list[LinearSite]:
        """Return the sites that get a branch; those that could not are recorded."""
        found = []
        for site in choose_sites(program, nodes, self.skip, Context()):
            if mask_of(program, site) is None or branch_of(program, site) is not None:
                continue
            if site.inputs % self.k:
                ctx.log.skip(site.name, f"its {site.inputs} inputs are no multiple of k={self.k}")
            else:
                found.append(site)
        return found

    def _fit(
        self, program: Program, original: Program, site: LinearSite, mask: Mask, moments: Moments
    ) -> tuple[Tensor, Branch, str]:
        """Return a site's weight beside its branch, in its dtype, the branch, and why it was not refitted, if so."""
        whole, dtype = weights_of(original, [site], self.name), program.params.type_of(site.weight).dtype
        gram, kept = moments.gram, mask.kept
        seen = bool(gram.matrix.diagonal().any())
        target = corrected(whole, moments, self.damp, self.share) if seen and self.refit else whole
        if self.start == "svd":
            energy = gram.matrix.diagonal() if seen else None
            up, down = completed(target, kept, site.inputs // self.k, energy, self.rounds)
            branch = Branch(up.to(dtype), down.to(dtype))
        else:
            up = group_means(target, kept, self.k, self.start == "dropped")
            branch = Branch(up.to(dtype), self.k)
        if self.start == "mean" and not self.refit:
            return program.params.get(site.weight), branch, ""
        rest, why = beside(target, kept, branch.weight.double()), ""
        if not seen:
            why = f"its inputs were zero for all {gram.tokens} tokens, so its branch is fitted without them"
        elif self.refit:
            try:
                left = target - branch.weight.double()
                rest = under_mask(left, gram.matrix, kept, self.damp, tokens=gram.tokens, site=site.name)
            except UnsupportedError as error:
                why = f"{error.what} ({error.why}), so kept weights only give way to the branch"
        return torch.where(kept, rest, 0.0).to(dtype), branch, why

    def _restored(self, tensors: dict[str, Tensor], stem: str) -> Branch:
        return Branch(tensors[f"{stem}/up"], tensors.get(f"{stem}/down", self.k))

    def _put(
        self,
        program: Program,
        original: Program,
        site: LinearSite,
        weight: Tensor,
        branch: Branch,
        moments: Moments,
        ctx: Context,
    ) -> None:
        whole, gram = original.params.get(site.weight).double(), moments.gram
        before, after = (
            relative_loss(row_energy(whole - w.double(), gram), row_energy(whole, gram))
            for w in (program.params.get(site.weight), weight.double() + branch.weight.double())
        )
        program.params.put(site.weight, weight, self.name)
        put_branch(program, site, branch, self.name)
        size = branch.up.numel() + (branch.down.numel() if isinstance(branch.down, Tensor) else 0)
        figures = {"rel_error_before": before**0.5, "rel_error": after**0.5}
        ctx.log.report(site=site.name, numbers=float(size), **figures)
