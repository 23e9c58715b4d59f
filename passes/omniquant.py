"""`omniquant`: clipping and equivalent transforms, learned together block by block and folded away (OmniQuant)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ir.analysis import Block, LinearSite, blocks
from ir.ops.tokens import CODING
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage, Trial
from passes.checkpoint import has_block
from passes.coded_values import code_values
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, Kind
from passes.equiv.untied import untied
from passes.learned_block import LearnedBlock
from passes.peaks import extremes, keeping, smoothing_scales
from passes.presets import FAST_EPOCHS, FLOAT, PRESETS, Preset, Settled
from passes.quantize.hessian import Gram
from passes.quantize.trials import searched_trials
from passes.quantize.uniform import packed_bytes
from passes.scale_search import SearchSpec, reads, search_block
from passes.sites import check_group, check_skip, choose_sites, outside_blocks, planned, weights_of
from passes.solved import restore_floats, restore_solved, save_solved
from passes.stream import Step, by_rows, walk
from passes.training.transforms import Transforms, drop_idle, transforms
from passes.widths import width_of

Legacy = Literal["pairs", "first", "zeros"]

# Exponents tried in the search for scales.
_EXPONENTS = 20


@dataclass(frozen=True)
class Omniquant(Pass):
    """Learn what each group's range is cut to, and scales between weights, and store the weights as uniform codes.

    Source: OmniQuant (2308.13137), sections 3.1 to 3.3, with scales that are exact under rotary embedding and
    grouped-query attention, and a loss that counts every token alike.
    """

    preset: Preset = field(
        default="none", metadata={"help": "what options take that are not given: widths, group and epochs"}
    )
    fast: bool = field(default=False, metadata={"help": "fewer epochs where none are given"})
    bits: int | None = field(
        default=None, metadata={"help": "bits per code, 2 to 8, where the pass bits chose no other; 4 without a preset"}
    )
    group: int | None = field(
        default=None, metadata={"help": "inputs that share a scale and zero point, 0 for whole rows; 64 without one"}
    )
    act: int | None = field(
        default=None, metadata={"help": "bits of what linears read, 2 to 8; 16, without a preset, leaves it in float"}
    )
    kv: int | None = field(default=None, metadata={"help": "bits of the key/value cache, likewise"})
    symmetric: bool = field(default=False, metadata={"help": "a range around zero, without stored zero points"})
    sites: tuple[Kind, ...] | None = field(
        default=None,
        metadata={
            "help": "kinds of groups whose scales are learned; norm->linears, v->o and up->down, and q<->k where the "
            "cache is coded"
        },
    )
    shift: bool = field(default=False, metadata={"help": "learn a shift beside the scales where one is exact"})
    init: Literal["awq", "smooth", "ones"] = field(
        default="awq",
        metadata={"help": "what scales start from: the search of the pass awq, the rule of the pass smooth, or ones"},
    )
    alpha: float = field(default=0.5, metadata={"help": "alpha of the pass smooth, for init=smooth"})
    clip: Literal["search", "open"] = field(
        default="search", metadata={"help": "what clipping starts from: the best range of a search, or 0.982 of all"}
    )
    rounding: Literal["nearest", "gptq"] = field(
        default="nearest", metadata={"help": "how codes are chosen in the learned ranges at the end"}
    )
    epochs: int | None = field(default=None, metadata={"help": "times every sample is trained on; 10 without a preset"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    clip_rate: float = field(default=5e-2, metadata={"help": "learning rate of the strengths of clipping"})
    scale_rate: float = field(default=5e-3, metadata={"help": "learning rate of scales and shifts"})
    last_rate: float = field(default=0.05, metadata={"help": "share of the rates at the end of their cosine"})
    loss: Literal["token", "plain"] = field(
        default="token", metadata={"help": "count tokens alike, or by their energy as the paper does"}
    )
    second: bool = field(default=False, metadata={"help": "a second target: the float block on compressed inputs"})
    legacy: tuple[Legacy, ...] = field(
        default=(),
        metadata={
            "help": "where to do as the release does: pairs, scales of q<->k free of rotary pairs, which changes the "
            "function; first, init=smooth by the weights of one consumer; zeros, no gradient through zero points"
        },
    )
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "omniquant"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True)
    exact: ClassVar[bool] = False
    widths: ClassVar[range] = range(2, 9)

    def settled(self) -> Settled:
        """Return the options that a preset can give, those of the user before those of the preset."""
        chosen = PRESETS[self.preset]
        given = {name: value for name in chosen if (value := getattr(self, name)) is not None}
        found = {**chosen, **({"epochs": FAST_EPOCHS} if self.fast else {}), **given}
        usual: tuple[Kind, ...] = ("norm->linears", "v->o", "up->down")
        sites = (*usual, "q<->k") if found["kv"] < FLOAT else usual
        return Settled(**found, sites=sites if self.sites is None else self.sites)

    def validate(self) -> None:
        """Raise OptionError for values training or codes cannot have."""
        ranges = (("bits", 2, 8), ("group", 0, 1 << 20), ("epochs", 0, 10**6), ("batch", 1, 10**6))
        for option, low, high in (*ranges, ("last_rate", 0, 1), ("alpha", 0, 1)):
            value = getattr(self, option)
            if value is not None and not low <= value <= high:
                raise OptionError(self.name, option, f"{value} is outside {low}..{high}")
        for option in ("act", "kv"):
            if getattr(self, option) not in (None, FLOAT, *range(2, 9)):
                raise OptionError(self.name, option, f"{getattr(self, option)} is neither 2..8 nor {FLOAT}")
        if self.rounding == "gptq" and self.settled().group == 0:
            raise OptionError(self.name, "rounding", "gptq needs groups", fix="give group, such as 64")
        for option in ("clip_rate", "scale_rate"):
            if not 0 <= getattr(self, option) < 1:
                raise OptionError(self.name, option, f"{getattr(self, option)} is outside 0..1")

    def inserts(self) -> frozenset[str]:
        """Return the operators that code tokens, where activations or caches are to be."""
        settled = self.settled()
        return CODING if min(settled.act, settled.kv) < FLOAT else frozenset()

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take, and the groups whose scales are learned."""
        settled, parts = self.settled(), blocks(program)
        sites = choose_sites(program, [n for block in parts for n in block.nodes], self.skip, Context())
        self._check_group(sites)
        rows = [PlanRow(s.name, self.name, planned(self, s, width_of(program, s, settled.bits))) for s in sites]
        found = discover(program).of(*settled.sites)
        groups = [group for block in parts for group in self._inside(found, block)]
        return [*rows, *(PlanRow(g.site, f"learn the scales of {g.kind}") for g in groups)]

    def run(self, program: Program, ctx: Context) -> None:
        """Train block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        settled, nodes = self.settled(), [n for block in blocks(program) for n in block.nodes]
        check_skip(program, self.skip, self.name)
        self._check_group(choose_sites(program, nodes, self.skip, ctx))
        outside_blocks(program, nodes, self.skip, ctx)
        found = discover(program)
        for absence in found.absences:
            if absence.kind in settled.sites:
                ctx.log.skip(absence.site, absence.reason)
        wanted = found.of(*settled.sites)
        inside = {group.site for block in blocks(program) for group in self._inside(wanted, block)}
        for group in wanted:
            if group.site not in inside:
                ctx.log.skip(group.site, "it does not lie in one repeated block")
        original = program.clone()
        code_values(program, settled.act, settled.kv, self.skip, ctx)
        rows = by_rows(ctx, self.batch)
        for walked in walk(program, rows, "both", self.name, original):
            groups, mark = self._inside(wanted, walked.block), ctx.log.mark()
            if has_block(ctx.work, walked.block.index):
                self._restore(program, transforms(program, groups, self.shift, self.name), walked.block, ctx)
                continue
            scales = self._searched(program, groups, walked, ctx)
            parts = transforms(program, groups, self.shift, self.name)
            floats, solved = LearnedBlock(self, settled, program, walked, parts, ctx).solve(scales)
            save_solved(ctx, walked.block.index, solved, floats, ctx.log.since(mark))

    def _restore(self, program: Program, parts: Transforms, block: Block, ctx: Context) -> None:
        """Put what an earlier run made of a block in place."""
        restore_floats(program, self.name, ctx, block.index)
        drop_idle(program, parts, self.name)
        sites = choose_sites(program, block.nodes, self.skip, Context())
        restore_solved(program, sites, self.name, ctx, block.index)

    def _searched(
        self, program: Program, groups: Sequence[EquivGroup], walked: Step, ctx: Context
    ) -> dict[str, Tensor]:
        """Return the scales that training starts from, float64 by site."""
        settled = self.settled()
        for site in choose_sites(program, walked.block.nodes, self.skip, Context()):
            weights_of(program, [site], self.name)
        scales = {group.site: torch.ones(group.size, dtype=torch.float64) for group in groups}
        read = [group for group in groups if reads(group, walked.original_block)]
        if self.init == "smooth":
            scales.update(self._balanced(program, read, walked))
        elif self.init == "awq" and read:
            spec = SearchSpec(settled.bits, settled.group, self.symmetric, _EXPONENTS)
            scales.update({g.site: s for g, s in search_block(program, read, walked, spec, ctx)})
        return scales

    def _balanced(self, program: Program, groups: Sequence[EquivGroup], walked: Step) -> dict[str, Tensor]:
        """Return scales by the rule of SmoothQuant, float64 by site, from what the float stream holds."""
        peaks: dict[fx.Node, Tensor] = {}
        known = {group.site: reads(group, walked.original_block) for group in groups}
        wanted = dict.fromkeys(x for nodes in known.values() for x in nodes.values())
        walked.observe_float({x.name: keeping(x, peaks) for x in wanted})
        first = "first" in self.legacy
        return {
            g.site: smoothing_scales(*extremes(program, g, known[g.site], peaks, first), self.alpha)
            for g in groups
            if all(slot.node in known[g.site] and known[g.site][slot.node] in peaks for slot in g.sinks)
        }

    def stored_bytes(self, site: LinearSite, bits: int) -> int:
        """Return the bytes of a site's codes, scales and zero points at a width."""
        return packed_bytes(site.rows, site.inputs, bits, self.settled().group_of(site), self.symmetric)

    def trial(
        self, weight: Tensor, gram: Gram | None, choices: Sequence[int], site: LinearSite, ctx: Context
    ) -> list[Trial]:
        """Return the site rounded at each width, in the ranges that training starts from."""
        del ctx
        return searched_trials(weight, gram, choices, self.settled().group_of(site), self.symmetric)

    def _inside(self, groups: Sequence[EquivGroup], block: Block) -> list[EquivGroup]:
        """Return the groups that lie in a block whole, as they are learned."""
        names = {node.name for node in block.nodes}
        found = [group for group in groups if all(slot.node in names for slot in group.slots)]
        return [untied(group) for group in found] if "pairs" in self.legacy else found

    def _check_group(self, sites: Sequence[LinearSite]) -> None:
        group = self.settled().group
        if group:
            check_group(sites, group, self.name)
