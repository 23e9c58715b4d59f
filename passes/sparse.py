"""`sparse`: n of every m weights of a row kept, the others zero, in one shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ir.analysis import LinearSite, blocks, sibling_sites
from ir.errors import UnsupportedError
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.quantize.hessian import Gram
from passes.quantize.salience import relative_loss, row_energy
from passes.quantize.targets import corrected
from passes.sites import check_skip, choose_sites, outside_blocks, weights_of
from passes.sparsify.dsnot import exchanged
from passes.sparsify.masks import PACKED, Mask, foresee_masks, put_mask
from passes.sparsify.observed import Observed, observed
from passes.sparsify.pattern import nm_mask, pattern_of
from passes.sparsify.scores import kept_share, magnitude, wanda
from passes.sparsify.sparsegpt import sparsegpt
from passes.stream import walk

Method = Literal["magnitude", "wanda", "sparsegpt", "dsnot"]


@dataclass(frozen=True)
class Sparse(Pass):
    """Keep n of every m neighbouring weights of a row and leave their masks for the passes that store or train them."""

    pattern: str = field(default="2:4", metadata={"help": "n:m, how many of how many neighbouring inputs a row keeps"})
    method: Method = field(
        default="sparsegpt",
        metadata={
            "help": "what is kept: the largest (magnitude), the largest times its input (wanda), that with exchanges "
            "(dsnot), or what the rest can make up for least, the rest making up for what goes (sparsegpt)"
        },
    )
    share: float = field(
        default=0.25,
        metadata={"help": "sparsegpt: how much of the correction for what earlier blocks did is taken, 0 to 1"},
    )
    damp: float = field(default=0.01, metadata={"help": "sparsegpt: damping of the Hessian, relative to its mean"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave dense, `*` stands for any text"})

    name: ClassVar[str] = "sparse"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.SPARSIFY
    order_reason: ClassVar[str] = "sparse chooses among weights that nothing may turn or scale afterwards"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"masks"})
    exact: ClassVar[bool] = False
    closes_with: ClassVar[str] = "pack"

    def needs(self) -> Calib | None:
        """Return the streams that the method looks at."""
        if self.method == "magnitude":
            return None
        return Calib("both" if self._both else "compressed")

    @property
    def _both(self) -> bool:
        return self.method == "sparsegpt" and self.share > 0

    def validate(self) -> None:
        """Raise OptionError for a text that is no pattern and values out of range."""
        try:
            pattern_of(self.pattern)
        except ValueError as error:
            raise OptionError(self.name, "pattern", str(error), fix="use one such as 2:4") from None
        if not 0 <= self.share <= 1:
            raise OptionError(self.name, "share", f"{self.share} is outside 0..1")
        if not 0 < self.damp <= 1:
            raise OptionError(self.name, "damp", f"{self.damp} is outside (0, 1]")

    def inserts(self) -> frozenset[str]:
        """Return what masked weights are packed for."""
        return PACKED

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites that get a mask."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        return [PlanRow(s.name, f"keep {self.pattern}") for s in self._sites(program, nodes, Context())]

    def foresee(self, program: Program) -> None:
        """Note which weights will have a mask."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        foresee_masks(program, self._sites(program, nodes, Context()), pattern_of(self.pattern))

    def run(self, program: Program, ctx: Context) -> None:
        """Choose block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        check_skip(program, self.skip, self.name)
        sites = self._sites(program, nodes, ctx)
        outside_blocks(program, nodes, self.skip, ctx)
        needed = self.needs()
        if needed is None:
            step = ctx.log.progress(len(sites), self.name)
            for site in sites:
                cut = self._cut(program, site, None)
                self._put(program, site, cut, self._figures(program, site, cut, None), ctx)
                step()
            return
        for walked in walk(program, ctx, needed.stream, self.name):
            own = self._sites(program, walked.block.nodes, Context())
            found = load_block(ctx.work, walked.block.index)
            if found is not None:
                for site in (site for group in sibling_sites(own) for site in group):
                    self._put(program, site, *_restored(found, site.node.name), ctx)
                continue
            kept, facts = dict[str, Tensor](), dict[str, object]()
            for group, seen in observed(walked, sibling_sites(own), self._both, self.method == "dsnot"):
                for site in group:
                    stem, cut = site.node.name, self._cut(program, site, seen)
                    figures = self._figures(program, site, cut, seen.moments.gram)
                    kept |= {f"{stem}/weight": cut.weight, f"{stem}/mask": cut.mask}
                    facts[stem] = {"fallback": cut.fallback, "figures": figures}
                    self._put(program, site, cut, figures, ctx)
            save_block(ctx.work, walked.block.index, kept, facts)

    def _sites(self, program: Program, nodes: Sequence[torch.fx.Node], ctx: Context) -> list[LinearSite]:
        """Return the sites whose inputs the pattern divides; the others are recorded."""
        pattern, fitting = pattern_of(self.pattern), []
        for site in choose_sites(program, nodes, self.skip, ctx):
            if pattern.fits(site.inputs):
                fitting.append(site)
            else:
                ctx.log.skip(site.name, f"its {site.inputs} inputs are no multiple of the pattern {pattern}")
        return fitting

    def _cut(self, program: Program, site: LinearSite, seen: Observed | None) -> _Cut:
        """Return a site's weight with zeros where none is kept, in its dtype, and its mask."""
        weight, pattern = weights_of(program, [site], self.name), pattern_of(self.pattern)
        dtype, fallback = program.params.type_of(site.weight).dtype, ""
        if seen is None or not bool(seen.energy.any()):
            if seen is not None:
                fallback = (
                    f"its inputs were zero for all {seen.moments.gram.tokens} tokens, so the largest weights stay"
                )
            mask = nm_mask(magnitude(weight), pattern)
            return _Cut(torch.where(mask, weight, 0.0).to(dtype), mask, fallback)
        score = wanda(weight, seen.energy)
        mask, gram = nm_mask(score, pattern), seen.moments.gram
        if self.method == "dsnot":
            mask = exchanged(weight, mask, score, seen.mean, seen.variance, pattern)
        elif self.method == "sparsegpt":
            try:
                target = corrected(weight, seen.moments, self.damp, self.share)
                weight, mask = sparsegpt(target, gram.matrix, pattern, self.damp, tokens=gram.tokens, site=site.name)
            except UnsupportedError as error:
                fallback = f"{error.what} ({error.why}), so weights stay by their size times their inputs'"
        return _Cut(torch.where(mask, weight, 0.0).to(dtype), mask, fallback)

    def _figures(self, program: Program, site: LinearSite, cut: _Cut, gram: Gram | None) -> dict[str, float]:
        whole = program.params.get(site.weight).double()
        lost = relative_loss(row_energy(whole - cut.weight.double(), gram), row_energy(whole, gram))
        return {"kept_energy": kept_share(whole, cut.mask), "rel_error": lost**0.5}

    def _put(self, program: Program, site: LinearSite, cut: _Cut, figures: Mapping[str, float], ctx: Context) -> None:
        program.params.put(site.weight, cut.weight, self.name)
        put_mask(program, site, Mask(cut.mask, pattern_of(self.pattern)), self.name)
        if cut.fallback:
            ctx.log.skip(site.name, cut.fallback)
        ctx.log.report(site=site.name, **figures)


@dataclass(frozen=True, eq=False)
class _Cut:
    """A weight with zeros where none is kept, its mask, and why it was not chosen as asked, or nothing."""

    weight: Tensor
    mask: Tensor
    fallback: str


def _restored(found: tuple[dict[str, Tensor], dict[str, Any]], stem: str) -> tuple[_Cut, Mapping[str, float]]:
    tensors, facts = found
    cut = _Cut(tensors[f"{stem}/weight"], tensors[f"{stem}/mask"], facts[stem]["fallback"])
    return cut, facts[stem]["figures"]
