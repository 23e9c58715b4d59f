"""`slim`: a low-rank branch beside coded linears that gives back some of what coding took (SLiM)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ir.analysis import Block, LinearSite, blocks, is_branch, matches, site_name
from ir.decode import decoded_weight, is_coded
from ir.errors import UsageError
from ir.program import Program, tensor_type_of
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.pack import pack_branches
from passes.quantize.hessian import Gram, empty_gram, update
from passes.quantize.salience import relative_loss, row_energy
from passes.rotation import ROTATED
from passes.sites import check_patterns
from passes.sparsify.branches import BRANCHES, Branch, put_branch
from passes.sparsify.lowrank import weighed_error
from passes.sparsify.masks import TRAINED
from passes.stream import Step, walk

aten = torch.ops.aten


@dataclass(frozen=True)
class Slim(Pass):
    """Add a low-rank branch beside every coded linear, the best for its error where strong inputs count more.

    Source: SLiM (2410.09615, section 3.2), on codes of any kind, sparse or not.
    """

    ratio: float = field(default=0.1, metadata={"help": "rank, as a share of the smaller side of the weight"})
    branches: int = field(default=8, metadata={"help": "bits of the branch's codes, 2 to 8, a scale a row; 32: floats"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites without a branch, `*` stands for any text"})

    name: ClassVar[str] = "slim"
    level: ClassVar[tuple[str, str]] = ("compressed", "compressed")
    stage: ClassVar[Stage] = Stage.TUNE
    order_reason: ClassVar[str] = "it looks at the error of codes that are there"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    refuses: ClassVar[frozenset[str]] = frozenset({TRAINED})
    data: ClassVar[Calib | None] = Calib("compressed", original=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values out of range."""
        if not 0 < self.ratio <= 1:
            raise OptionError(self.name, "ratio", f"{self.ratio} is outside (0, 1]")
        if self.branches not in (*range(2, 9), 32):
            raise OptionError(self.name, "branches", f"{self.branches} is neither 2..8 nor 32")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the coded sites that get a branch; none are known before weights are coded."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        return [PlanRow(site_name(n), "add a branch") for n in nodes if is_coded(n) and not is_branch(n)]

    def run(self, program: Program, ctx: Context) -> None:
        """Fit block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        if ctx.original is None:
            raise UsageError(
                f"pass {self.name} needs the weights as they were before they were coded",
                why="they were coded before this run began",
                fix=f"put {self.name} into the pipeline that codes the weights, after the pass that does",
            )
        names = [site_name(n) for b in blocks(program) for n in b.nodes if is_coded(n)]
        check_patterns(names, self.skip, self.name)
        floats = {site_name(n): n for n in ctx.original.calls(aten.linear)}
        for walked in walk(program, ctx, "compressed", self.name):
            found, kept = load_block(ctx.work, walked.block.index), dict[str, Tensor]()
            nodes = self._chosen(program, walked.block, floats, ctx)
            for node, gram in self._observed(walked, nodes):
                site = _site(node)
                error = self._error(program, ctx.original, node, floats[site.name])
                if found is None:
                    up, down = self.factors(error, gram, self._rank(site))
                    branch = Branch(up.float(), down.float())
                    kept |= {f"{node.name}/up": branch.up, f"{node.name}/down": down.float()}
                else:
                    branch = Branch(found[0][f"{node.name}/up"], found[0][f"{node.name}/down"])
                self._put(program, site, branch, error, gram, ctx)
            if found is None:
                save_block(ctx.work, walked.block.index, kept, {})
        pack_branches(program, self.branches, self.name, ctx)

    def factors(self, error: Tensor, gram: Gram, rank: int) -> tuple[Tensor, Tensor]:
        """Return factors up [N, r] and down [r, K] for what coding took, [N, K]."""
        return weighed_error(error, gram.matrix.diagonal(), rank)

    def _rank(self, site: LinearSite) -> int:
        return max(1, int(self.ratio * min(site.rows, site.inputs)))

    def _chosen(self, program: Program, block: Block, floats: dict[str, fx.Node], ctx: Context) -> list[fx.Node]:
        """Return a block's coded linears that get a branch; the others are recorded with the reason."""
        chosen, turned = [], _turned(program) != _turned(ctx.original)
        for node in (program.node(n.name) for n in block.nodes if is_coded(n) and not is_branch(n)):
            name = site_name(node)
            if any(matches(pattern, name) for pattern in self.skip):
                ctx.log.skip(name, "the option skip names it", asked=True)
            elif turned:
                ctx.log.skip(name, "weights were turned since the float model was kept (shiftadd has basis=plain)")
            elif _is_branched(program, floats.get(name)):
                ctx.log.skip(name, "it has a branch already")
            elif name not in floats:
                ctx.log.skip(name, "the float program has no linear of its name")
            else:
                chosen.append(node)
        return chosen

    def _observed(self, walked: Step, nodes: list[fx.Node]) -> list[tuple[fx.Node, Gram]]:
        inputs = {n.args[0]: empty_gram(int(tensor_type_of(n.args[0]).dims[-1])) for n in nodes}  # type: ignore[arg-type]
        if inputs:
            walked.observe({x: lambda value, gram=gram: update(gram, value) for x, gram in inputs.items()})  # type: ignore[misc]
        return [(node, inputs[node.args[0]]) for node in nodes]

    def _error(self, program: Program, original: Program, node: fx.Node, linear: fx.Node) -> Tensor:
        """Return what coding took from a weight, float64 [N, K]."""
        weight = linear.args[1]
        assert isinstance(weight, fx.Node)
        coded = decoded_weight(node, program.params.get).double()
        return original.params.get(str(weight.target)).double() - coded

    def _put(self, program: Program, site: LinearSite, branch: Branch, error: Tensor, gram: Gram, ctx: Context) -> None:
        left = error - branch.weight.double()
        gone = relative_loss(row_energy(left, gram), row_energy(error, gram))
        put_branch(program, site, branch, self.name)
        ctx.log.report(site=site.name, error_left=gone**0.5, rank=float(branch.up.shape[1]))


def _turned(program: Program | None) -> list[str]:
    """Return which linears read turned inputs, by weights or by operators."""
    return [] if program is None else program.attributes.get(ROTATED, [])


def _is_branched(program: Program, linear: fx.Node | None) -> bool:
    """Return whether an earlier pass put a branch beside what a float linear became."""
    weight = None if linear is None else linear.args[1]
    return isinstance(weight, fx.Node) and str(weight.target) in program.attributes.get(BRANCHES, {})


def _site(node: fx.Node) -> LinearSite:
    rows, inputs = (int(tensor_type_of(n).dims[-1]) for n in (node, node.args[0]))  # type: ignore[arg-type]
    return LinearSite(site_name(node), node, f"{site_name(node)}.weight", rows, inputs, None)
