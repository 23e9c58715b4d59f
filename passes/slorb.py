"""`slorb`: a small branch beside masked linears that gives back some of what masks drop (SLoRB, and better starts)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
from passes.sparsify.masks import TRAINED, mask_of, pattern_at
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
            groups = sibling_sites(self._masked(program, walked.block.nodes, ctx))
            found = load_block(ctx.work, walked.block.index)
            if found is not None:
                for site in (site for group in groups for site in group):
                    self._put(program, site, *self._restored(found, site.node.name), ctx)
                continue
            kept, facts = dict[str, Tensor](), dict[str, object]()
            for group, moments in moments_of(walked, groups, True, False):
                for site in group:
                    stem, fitted = site.node.name, self._fit(program, ctx.original, site, moments)
                    figures = self._figures(program, ctx.original, site, fitted, moments)
                    branch = fitted.branch
                    kept |= {f"{stem}/weight": fitted.weight, f"{stem}/up": branch.up}
                    if isinstance(branch.down, Tensor):
                        kept[f"{stem}/down"] = branch.down
                    facts[stem] = {"fallback": fitted.fallback, "figures": figures}
                    self._put(program, site, fitted, figures, ctx)
            save_block(ctx.work, walked.block.index, kept, facts)

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

    def _fit(self, program: Program, original: Program, site: LinearSite, moments: Moments) -> _Fitted:
        """Return a site's branch, and its weight beside that, in its dtype."""
        mask = mask_of(program, site)
        assert mask is not None
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
            return _Fitted(program.params.get(site.weight), branch, "")
        rest, why = beside(target, kept, branch.weight.double()), ""
        if not seen:
            why = f"its inputs were zero for all {gram.tokens} tokens, so its branch is fitted without them"
        elif self.refit:
            try:
                left = target - branch.weight.double()
                rest = under_mask(left, gram.matrix, kept, self.damp, tokens=gram.tokens, site=site.name)
            except UnsupportedError as error:
                why = f"{error.what} ({error.why}), so kept weights only give way to the branch"
        return _Fitted(torch.where(kept, rest, 0.0).to(dtype), branch, why)

    def _restored(
        self, found: tuple[dict[str, Tensor], dict[str, Any]], stem: str
    ) -> tuple[_Fitted, Mapping[str, float]]:
        tensors, facts = found
        branch = Branch(tensors[f"{stem}/up"], tensors.get(f"{stem}/down", self.k))
        return _Fitted(tensors[f"{stem}/weight"], branch, facts[stem]["fallback"]), facts[stem]["figures"]

    def _figures(
        self, program: Program, original: Program, site: LinearSite, fitted: _Fitted, moments: Moments
    ) -> dict[str, float]:
        """Return the error of the outputs before and after, and how many numbers the branch has."""
        whole, gram, branch = original.params.get(site.weight).double(), moments.gram, fitted.branch
        before, after = (
            relative_loss(row_energy(whole - w.double(), gram), row_energy(whole, gram))
            for w in (program.params.get(site.weight), fitted.weight.double() + branch.weight.double())
        )
        size = branch.up.numel() + (branch.down.numel() if isinstance(branch.down, Tensor) else 0)
        return {"numbers": float(size), "rel_error_before": before**0.5, "rel_error": after**0.5}

    def _put(
        self, program: Program, site: LinearSite, fitted: _Fitted, figures: Mapping[str, float], ctx: Context
    ) -> None:
        if fitted.fallback:
            ctx.log.skip(site.name, fitted.fallback)
        program.params.put(site.weight, fitted.weight, self.name)
        put_branch(program, site, fitted.branch, self.name)
        ctx.log.report(site=site.name, **figures)


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A branch, the weight beside it, and why that was not refitted, or nothing."""

    weight: Tensor
    branch: Branch
    fallback: str
