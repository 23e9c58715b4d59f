"""`svd`: linears as products of two thinner ones, the best for their outputs on calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ir.analysis import FACTORED, LinearSite, blocks
from ir.edit import Editor
from ir.program import PATH, Program, tensor_type_of
from ir.types import TensorType
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.quantize.hessian import Gram, empty_gram, update
from passes.quantize.salience import relative_loss, row_energy
from passes.sites import check_skip, choose_sites, outside_blocks, weights_of
from passes.sparsify.lowrank import whitened
from passes.stream import Step, walk

aten = torch.ops.aten


@dataclass(frozen=True)
class Svd(Pass):
    """Put two linears in place of each, through as few channels as leave a share of its numbers.

    What is lost is least for the outputs on what earlier blocks give after they were replaced. Source: SVD-LLM
    (2403.07378, section 3.1).
    """

    share: float = field(default=0.8, metadata={"help": "of the numbers of a weight that are left"})
    multiple: int = field(default=32, metadata={"help": "that the channels between are, for groups of codes to divide"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave whole, `*` stands for any text"})

    name: ClassVar[str] = "svd"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.SPARSIFY
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    refuses: ClassVar[frozenset[str]] = frozenset({"masks"})
    data: ClassVar[Calib | None] = Calib("compressed")
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for a share that leaves nothing, or all."""
        if not 0 < self.share < 1:
            raise OptionError(self.name, "share", f"{self.share} is outside 0..1")
        if not 1 <= self.multiple <= 1 << 16:
            raise OptionError(self.name, "multiple", f"{self.multiple} is outside 1..65536")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites and the channels between their two linears."""
        sites = choose_sites(program, _nodes(program), self.skip, Context())
        return [PlanRow(s.name, self.name, {"rank": float(self._rank(s))}) for s in sites if self._rank(s)]

    def run(self, program: Program, ctx: Context) -> None:
        """Replace block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        check_skip(program, self.skip, self.name)
        outside_blocks(program, _nodes(program), self.skip, ctx)
        for walked in walk(program, ctx, "compressed", self.name):
            sites, found = self._sites(program, walked, ctx), load_block(ctx.work, walked.block.index)
            if found is not None:
                for site in sites:
                    stem = site.node.name
                    self._put(program, site, found[0][f"{stem}/up"], found[0][f"{stem}/down"])
                    ctx.log.report(site=site.name, **found[1][stem])  # type: ignore[arg-type]
                continue
            kept, facts = dict[str, Tensor](), dict[str, object]()
            grams = _observed(walked, sites)
            for site in sites:
                stem, weight = site.node.name, weights_of(program, [site], self.name)
                gram = grams[site.node.args[0]]  # type: ignore[index]
                up, down = (part.float() for part in whitened(weight, gram.matrix, self._rank(site)))
                lost = relative_loss(row_energy(weight - up.double() @ down.double(), gram), row_energy(weight, gram))
                figures = {"rank": float(up.shape[1]), "rel_error": lost**0.5}
                kept |= {f"{stem}/up": up, f"{stem}/down": down}
                facts[stem] = figures
                self._put(program, site, up, down)
                ctx.log.report(site=site.name, **figures)
            save_block(ctx.work, walked.block.index, kept, facts)

    def _rank(self, site: LinearSite) -> int:
        most = int(self.share * site.rows * site.inputs / (site.rows + site.inputs))
        return most // self.multiple * self.multiple

    def _sites(self, program: Program, walked: Step, ctx: Context) -> list[LinearSite]:
        found = []
        for site in choose_sites(program, walked.block.nodes, self.skip, ctx):
            if self._rank(site):
                found.append(site)
            else:
                ctx.log.skip(site.name, f"{self.share} of its numbers make no product through {self.multiple} channels")
        return found

    def _put(self, program: Program, site: LinearSite, up: Tensor, down: Tensor) -> None:
        """Replace a linear; what it stands for is counted on the second of the two."""
        editor = Editor(program, self.name).before(site.node)
        x, dtype = site.node.args[0], tensor_type_of(site.node).dtype
        stem = site.weight.rpartition(".")[0] or site.weight.replace(".", "_")
        thin = TensorType(dtype, (*tensor_type_of(x).dims[:-1], down.shape[0]))  # type: ignore[arg-type]
        first = editor.param(editor.fresh(f"{stem}.down.weight"), down.to(dtype))
        inner = editor.call(aten.linear, x, first, like=site.node, type=thin)
        second = editor.param(editor.fresh(f"{stem}.up.weight"), up.to(dtype))
        outer = editor.call(aten.linear, inner, second, *site.node.args[2:], like=site.node)
        editor.replace(site.node, outer, keep_name=True)
        editor.erase(site.node)
        editor.sweep()
        inner.meta[PATH], outer.meta[PATH] = f"{site.name}.down", f"{site.name}.up"
        counted = {f"{site.name}.down": 0, f"{site.name}.up": site.rows * site.inputs}
        program.attributes[FACTORED] = {**program.attributes.get(FACTORED, {}), **counted}
        program.version += 1


def _observed(walked: Step, sites: list[LinearSite]) -> dict[fx.Node, Gram]:
    """Return the second moments of what sites read."""
    grams = {site.node.args[0]: empty_gram(site.inputs) for site in sites}
    if grams:
        walked.observe({x: lambda value, gram=gram: update(gram, value) for x, gram in grams.items()})  # type: ignore[misc]
    return grams  # type: ignore[return-value]


def _nodes(program: Program) -> list[fx.Node]:
    return [node for block in blocks(program) for node in block.nodes]
