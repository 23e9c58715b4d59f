"""`bits`: a width for every site from a budget of stored bytes, for the quantising passes that follow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from ir.analysis import LinearSite, blocks, layout, sibling_sites
from ir.errors import InvariantError, UsageError
from ir.program import Program
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.gradients import Callback, loss_gradients
from passes.quantize.hessian import Gram, empty_gram, update
from passes.quantize.knapsack import Choice, allocate
from passes.quantize.salience import (
    fisher_loss,
    importance,
    importance_loss,
    relative_loss,
    row_energy,
    weighted_loss,
)
from passes.sites import check_skip, choose_sites, outside_blocks, weights_of
from passes.stream import Step, token_batches, walk
from passes.widths import put_widths

# Rows tried of a site: what a width loses is a sum over rows, which a sample of them tells at a fraction of the time.
_MOST_ROWS = 192
_BYTES = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([kKMG]?)(i?)B")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3}


@dataclass(frozen=True)
class SiteCost:
    """What each choice of a width costs a site: losses that add up over sites, and its own relative output error.

    errors: energy of the output error relative to the output's, nothing where no codes were tried.
    """

    losses: tuple[float, ...]
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bits(Pass):
    """Choose the width of every site: least loss within a budget of stored bytes, for the quantising pass after it."""

    target: float | str = field(
        default=3.0,
        metadata={"help": "budget of the sites' codes: stored bits per weight such as 2.5, or a size such as 60MB"},
    )
    choices: tuple[int, ...] = field(default=(2, 3, 4), metadata={"help": "widths to choose from"})
    method: Literal["loss", "shiftaddllm", "gradient"] = field(
        default="gradient",
        metadata={
            "help": "gradient: what it adds to the model's loss; loss: relative output error; shiftaddllm: its C"
        },
    )
    tie: Literal["none", "siblings", "block"] = field(
        default="none", metadata={"help": "sites that share a width: those that read the same input, or all of a block"}
    )
    calib: Literal["stream", "none"] = field(
        default="stream", metadata={"help": "stream: errors on calibration inputs; none: errors of the weights alone"}
    )
    sequences: int = field(default=16, metadata={"help": "calibration windows that gradients are taken on"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to give no width, `*` stands for any text"})

    name: ClassVar[str] = "bits"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    data: ClassVar[Calib | None] = Calib("float")
    exact: ClassVar[bool] = True

    def needs(self) -> Calib | None:
        """Return the float stream, with gradients for that method, or nothing for errors of the weights alone."""
        learns = self.method == "gradient"
        return None if self.calib == "none" else Calib("float", gradients=learns, tokens=learns)

    def validate(self) -> None:
        """Raise OptionError for a target that is no budget, and for options that contradict each other."""
        parse_target(self.target, 8)
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise OptionError(self.name, "choices", "it must name at least one width, and none twice")
        if self.sequences < 1:
            raise OptionError(self.name, "sequences", f"{self.sequences} is not positive")
        if self.method == "gradient" and self.calib == "none":
            fix = "give method=loss, or leave calib=none out"
            raise OptionError(self.name, "method", "gradients need calibration text", fix=fix)

    def check_following(self, following: Sequence[Pass]) -> None:
        """Raise UsageError unless a pass after this one can be tried at all the choices."""
        coder_of(following, self.choices)

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites that will be given a width, with the mean of stored bits that a target in bits allows."""
        figures = {} if isinstance(self.target, str) else {"bits": float(self.target)}
        nodes = [n for block in blocks(program) for n in block.nodes]
        return [PlanRow(s.name, self.name, figures) for s in choose_sites(program, nodes, self.skip, Context())]

    def run(self, program: Program, ctx: Context) -> None:
        """Measure block by block what each width loses, then choose; measured blocks are kept in `ctx.work`."""
        coder = coder_of(ctx.following, self.choices)
        check_skip(program, self.skip, self.name)
        parts = self._sites(program, coder, ctx)
        sites = [site for part in parts for site in part]
        widest = max(self.choices)
        most = sum(coder.stored_bytes(s, widest) for s in sites)
        budget = self._budget(sites, coder)
        costs: dict[str, SiteCost] = {}
        if sites and budget > most:
            spent = _amount(most, _weights(sites))
            ctx.log.note(f"target={self.target} leaves room: every site gets {widest} bits, which take {spent}")
            picked = dict.fromkeys((s.name for s in sites), widest)
        else:
            costs = self._measure(program, ctx, coder, parts)
            picked = self._allocate(parts, coder, costs, budget)
        put_widths(program, picked)
        for site in sites:
            found = self._figures(site, coder, picked[site.name], costs.get(site.node.name))
            ctx.log.report(site=site.name, **found)

    def _sites(self, program: Program, coder: Pass, ctx: Context) -> list[list[LinearSite]]:
        """Return the sites of each block that get a width: those that the coding pass will code."""
        parts = blocks(program)
        owner = {node: block.index for block in parts for node in block.nodes}
        planned = {row.site for row in coder.plan(program) if "bytes" in row.figures}
        found: list[list[LinearSite]] = [[] for _ in parts]
        for site in choose_sites(program, owner, self.skip, ctx):
            if site.name in planned:
                found[owner[site.node]].append(site)
            else:
                ctx.log.skip(site.name, f"{coder.name} leaves it alone", asked=True)
        outside_blocks(program, owner, self.skip, ctx)
        return found

    def _budget(self, sites: Sequence[LinearSite], coder: Pass) -> int:
        """Return the target in bytes; raise OptionError where the narrowest choices exceed it."""
        weights, narrowest = _weights(sites), min(self.choices)
        least = sum(coder.stored_bytes(s, narrowest) for s in sites)
        budget = parse_target(self.target, weights)
        if budget < least:
            why = f"{narrowest} bits of {coder.name} at all {len(sites)} sites take {_amount(least, weights)} already"
            smallest = f"give target={_ceil(8 * least / weights)} or target={_size(least)} at least"
            raise OptionError(self.name, "target", why, fix=f"{smallest}, a narrower choice, or larger groups")
        return budget

    def _measure(
        self, program: Program, ctx: Context, coder: Pass, parts: list[list[LinearSite]]
    ) -> dict[str, SiteCost]:
        """Return the cost of every site by node name; blocks that `ctx.work` keeps are taken from there."""
        kept = [_restore(ctx, index) for index in range(len(parts))]
        if None in kept:
            slopes = self._slopes(program, ctx, parts) if self.method == "gradient" else {}
            bench = _Bench(self, program, ctx, coder, slopes)
            if self.calib == "none":
                step = ctx.log.progress(len(parts), self.name)
                for index, sites in enumerate(parts):
                    if kept[index] is None:
                        kept[index] = bench.measure(index, sites, None)
                    step()
            else:
                for walked in walk(program, ctx, "float", self.name):
                    index = walked.block.index
                    if kept[index] is None:
                        kept[index] = bench.measure(index, parts[index], walked)
        return {name: cost for found in kept if found for name, cost in found.items()}

    def _slopes(self, program: Program, ctx: Context, parts: list[list[LinearSite]]) -> dict[str, Tensor]:
        """Return the mean over tokens of the squared gradient of the loss at every output, float64 [N] by node name.

        One window is taken at a time, so that the entries of the blocks are held for one only.
        """
        work = None if ctx.work is None else ctx.work / "gradients"
        if (done := load_block(work, 0)) is not None:
            return done[0]
        batches = token_batches(ctx, program, f"pass {self.name}")
        windows = [ids for batch in batches for ids in batch.split(1)][: self.sequences]
        sums = {s.node: torch.zeros(s.rows, dtype=torch.float64) for sites in parts for s in sites}
        wanted = {node: _squares_into(total) for node, total in sums.items()}
        plan, step = layout(program), ctx.log.progress(len(windows), f"{self.name}: gradients")
        for ids in windows:
            loss_gradients(program, ids, wanted, plan=plan)
            step()
        tokens = sum(ids.numel() for ids in windows)
        slopes = {node.name: total / tokens for node, total in sums.items()}
        save_block(work, 0, slopes, {})
        return slopes

    def _allocate(
        self, parts: list[list[LinearSite]], coder: Pass, costs: Mapping[str, SiteCost], budget: int
    ) -> dict[str, int]:
        """Return the width of every site by name, those of a tie the same."""
        groups = _tied(parts, self.tie)
        table = []
        for group in groups:
            sizes = [sum(coder.stored_bytes(s, bits) for s in group) for bits in self.choices]
            losses = [math.fsum(costs[s.node.name].losses[i] for s in group) for i in range(len(self.choices))]
            table.append([Choice(size, loss) for size, loss in zip(sizes, losses, strict=True)])
        picked = zip(groups, allocate(table, budget), strict=True)
        return {site.name: self.choices[place] for group, place in picked for site in group}

    def _figures(self, site: LinearSite, coder: Pass, width: int, cost: SiteCost | None) -> dict[str, float]:
        size, weights, place = coder.stored_bytes(site, width), site.rows * site.inputs, self.choices.index(width)
        found = {"width": width, "bits": 8 * size / weights, "bytes": size, "weights": weights}
        if cost is not None:
            found["loss"] = cost.losses[place]
        if cost is not None and cost.errors:
            found["rel_error"] = math.sqrt(cost.errors[place])
        return found


@dataclass(frozen=True)
class _Bench:
    """What it takes to measure a block: the options, the pass whose codes are tried, and gradients by node name."""

    options: Bits
    program: Program
    ctx: Context
    coder: Pass
    slopes: Mapping[str, Tensor]

    def measure(self, index: int, sites: Sequence[LinearSite], walked: Step | None) -> dict[str, SiteCost]:
        """Return the cost of a block's sites by node name, and keep it; `walked` shows their inputs."""
        found: dict[str, SiteCost] = {}
        groups = sibling_sites(sites)
        grams: list[Gram | None] = [None] * len(groups)
        if walked is not None:
            wanted = {}
            for place, group in enumerate(groups):
                grams[place] = gram = empty_gram(group[0].inputs)
                wanted[_input(group[0]).name] = _adder(gram)
            walked.observe_float(wanted)
        for group, known in zip(groups, grams, strict=True):
            found |= {site.node.name: self._cost(site, known) for site in group}
        facts = {name: {"losses": cost.losses, "errors": cost.errors} for name, cost in found.items()}
        save_block(self.ctx.work, index, {}, dict(facts))
        return found

    def _cost(self, site: LinearSite, gram: Gram | None) -> SiteCost:
        options, count = self.options, site.rows * site.inputs
        weight = weights_of(self.program, [site], options.name)
        if options.method == "shiftaddllm":
            criterion = importance(weight, gram, site.name)
            return SiteCost(tuple(importance_loss(criterion, bits) for bits in options.choices))
        rows = _sample(site.rows)
        weight, part = weight[rows], replace(site, rows=len(rows))
        losses, errors, output = [], [], row_energy(weight, gram)
        trials = self.coder.trial(weight, gram, options.choices, part, self.ctx)
        for bits, trial in zip(options.choices, trials, strict=True):
            if (trial.bits, trial.stored_bytes) != (bits, self.coder.stored_bytes(part, bits)):
                raise _wrong_trial(self.coder, part, trial.bits, trial.stored_bytes, bits)
            errors.append(relative_loss(trial.row_loss, output))
            if options.method == "gradient":
                slopes = self.slopes[site.node.name][rows]
                losses.append(fisher_loss(trial.row_loss, slopes) * site.rows / part.rows)
            else:
                losses.append(weighted_loss(trial.row_loss, output, count))
        return SiteCost(tuple(losses), tuple(errors))


def _sample(rows: int) -> Tensor:
    """Return the rows of a site that are tried, in order: all of a small site, some of a large one by chance."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:_MOST_ROWS].sort().values


def coder_of(following: Sequence[Pass], choices: Sequence[int]) -> Pass:
    """Return the first of the passes to come that codes sites at a width.

    Raises UsageError when there is none, OptionError when it cannot take one of the choices.
    """
    coder = next((p for p in following if p.widths), None)
    if coder is None:
        after = ", ".join(p.name for p in following)
        raise UsageError(
            "pass bits chooses widths that nothing uses",
            why=f"after it come {after}, none of which codes at a width" if after else "no pass comes after it",
            fix="put a quantising pass after it, as in bits{target=3.0},shiftadd",
        )
    if wrong := [bits for bits in choices if bits not in coder.widths]:
        why = f"{coder.name} takes {coder.widths[0]} to {coder.widths[-1]} bits, not {wrong[0]}"
        raise OptionError("bits", "choices", why)
    return coder


def parse_target(target: float | str, weights: int) -> int:
    """Return a budget in bytes: a number counts stored bits per weight, text such as `60MB` or `900KiB` bytes.

    Raises OptionError for a budget that is neither, or not positive and finite.
    """
    if isinstance(target, str):
        match = _BYTES.fullmatch(target)
        if match is None:
            why = f"{target} is neither bits per weight, such as 2.5, nor bytes, such as 60MB or 900KiB"
            raise OptionError("bits", "target", why)
        size = float(match[1]) * (1024.0 if match[3] else 1000.0) ** _POWERS[match[2]]
    else:
        # A product such as 2.3 * 80 comes out a hair below the whole number that is meant.
        size = target * weights / 8 + 1e-6
    if not 0 < size < math.inf or (not isinstance(target, str) and target <= 0):
        raise OptionError("bits", "target", f"{target} is not a positive amount")
    return math.floor(size)


def _tied(parts: Sequence[Sequence[LinearSite]], tie: str) -> list[list[LinearSite]]:
    """Return the sites grouped by what must share a width; sites of one name always do, as widths go by name."""
    if tie == "block":
        groups = [list(sites) for sites in parts]
    elif tie == "siblings":
        groups = [group for sites in parts for group in sibling_sites(sites)]
    else:
        groups = [[site] for sites in parts for site in sites]
    owner: dict[str, list[LinearSite]] = {}
    for group in groups:
        merged = list(group)
        for other in {id(owner[s.name]): owner[s.name] for s in group if s.name in owner}.values():
            merged = other + merged
        owner |= {site.name: merged for site in merged}
    return list({id(group): group for group in owner.values()}.values())


def _restore(ctx: Context, index: int) -> dict[str, SiteCost] | None:
    """Return a block's costs from an earlier run, or None."""
    kept = load_block(ctx.work, index)
    if kept is None:
        return None
    facts: Mapping[str, object] = kept[1]
    return {name: SiteCost(*(tuple(fact[key]) for key in ("losses", "errors"))) for name, fact in facts.items()}  # type: ignore[index]


def _weights(sites: Iterable[LinearSite]) -> int:
    return sum(site.rows * site.inputs for site in sites)


def _input(site: LinearSite) -> fx.Node:
    source = site.node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _adder(gram: Gram) -> Callback:
    return lambda value: update(gram, value)


def _squares_into(total: Tensor) -> Callback:
    """Return a callback that adds the squares of a gradient [..., N], summed over tokens in float64."""

    def add(gradient: Tensor) -> None:
        total.add_(gradient.flatten(0, -2).double().square().sum(0))

    return add


def _amount(size: int, weights: int) -> str:
    return f"{_size(size)}, {_ceil(8 * size / weights)} stored bits per weight"


def _ceil(number: float) -> str:
    """Return a number with three decimals, rounded up so that it suffices as a budget."""
    return f"{math.ceil(number * 1000 - 1e-9) / 1000:.3f}"


def _size(size: int) -> str:
    """Return bytes as a budget that suffices for them."""
    return f"{_ceil(size / 1e6)}MB" if size >= 10**6 else f"{_ceil(size / 1e3)}kB"


def _wrong_trial(coder: Pass, site: LinearSite, bits: int, size: int, wanted: int) -> InvariantError:
    return InvariantError(
        f"pass {coder.name} tried a site at another width or size than it plans",
        where=site.name,
        why=f"{bits} bits took {size} bytes; {wanted} bits should take {coder.stored_bytes(site, wanted)}",
        fix="this is a bug in that pass; give every site one width with its option bits",
    )
