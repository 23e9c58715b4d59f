"""A step of training a block against float passes of the same block, and one of all blocks against LoRA's."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from frontend.open import open_model
from ir.analysis import linear_sites
from ir.program import Program
from passes.act import Act
from passes.base import Context
from passes.equiv.discover import discover
from passes.kv import Kv
from passes.l4q import L4q
from passes.learned_block import LearnedBlock
from passes.manager import Settings as PipelineSettings
from passes.manager import run_pipeline
from passes.memory import PeakMemory, give_back_memory
from passes.omniquant import Omniquant
from passes.pipeline import parse
from passes.rtn import Rtn
from passes.stream import Step, walk
from passes.training.loop import Problem
from passes.training.loss import token_loss
from passes.training.problems import block_problem
from passes.training.transforms import transforms
from passes.tune_scales import TuneScales
from passes.tuned_weights import tuned_weights
from tools.console import size_text, table

# Inputs that share a scale, or what divides the inputs of smaller models.
_GROUP = 64


@dataclass(frozen=True)
class Settings:
    """What to measure: the model, tokens a step, and rounds of one step each of everything."""

    model: str
    tokens: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class _Task:
    """A kind of training by name, with what it trains.

    against: the name of what its time is told in multiples of; updates: whether a step ends with one of the optimiser.
    """

    name: str
    problem: Problem
    against: str
    updates: bool = True

    def step(self) -> float:
        """Return the seconds of a forward and a backward pass, and of an update."""
        leaves = {n: t.detach().clone().requires_grad_() for n, t in self.problem.start.items()}
        optimiser = torch.optim.AdamW(list(leaves.values()), lr=0.0)
        start = time.perf_counter()
        self.problem.loss(leaves, 0).backward()  # type: ignore[no-untyped-call]
        if self.updates:
            optimiser.step()
        return time.perf_counter() - start


def measure(settings: Settings, note: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures as JSON-able data; note: takes a line on what is being measured."""
    program = open_model(settings.model, note).program
    if "canonical" not in program.facts:
        run_pipeline(program, parse("canon"), Context(), PipelineSettings(verify="off"))
    rows = []
    for tokens in settings.tokens:
        rows += _rows(list(_block_tasks(program, tokens, note)), tokens, settings.rounds, note)
    fewest = min(settings.tokens)
    rows += _rows(list(_whole_tasks(program, fewest, note)), fewest, settings.rounds, note)
    return {
        "model": settings.model,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": psutil.getloadavg()[0],
        "torch": torch.__version__,
        "rounds": settings.rounds,
        "weight_bytes": _bytes(program),
        "steps": rows,
    }


def as_text(found: dict[str, Any]) -> str:
    """Return the figures as a table with a line on how they were taken."""
    head = ("what is trained", "tokens", "s a step", "x", "of", "memory beyond the model")
    rows = [
        (r["trained"], r["tokens"], r["seconds"], r["ratio"], r["against"], size_text(r["peak_bytes"]))
        for r in found["steps"]
    ]
    return "\n".join(
        [
            table(head, rows),
            "step      forward pass, backward pass and update; of the float weights without the update",
            f"memory    the model's weights take {size_text(found['weight_bytes'])} beside that",
            f"method    medians of {found['rounds']} rounds, one step of everything a round, same process and cores",
            f"machine   {found['threads']} of {found['cores']} cores, load before {found['load_before']:.1f}, "
            f"torch {found['torch']}; {found['model']}",
        ]
    )


def _rows(tasks: list[_Task], tokens: int, rounds: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    peaks, seconds = {}, {task.name: [] for task in tasks}  # type: dict[str, int], dict[str, list[float]]
    for task in tasks:
        give_back_memory()
        held = psutil.Process().memory_info().rss
        with PeakMemory() as peak:
            task.step()
        peaks[task.name] = max(0, peak.bytes - held)
    for done in range(rounds):
        note(f"{tokens} tokens, round {done + 1} of {rounds}")
        for task in tasks:
            seconds[task.name].append(task.step())
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return [
        {
            "trained": task.name,
            "tokens": tokens,
            "seconds": medians[task.name],
            "ratio": medians[task.name] / medians[task.against],
            "against": task.against,
            "peak_bytes": peaks[task.name],
        }
        for task in tasks
    ]


def _block_tasks(program: Program, tokens: int, note: Callable[[str], None]) -> Iterator[_Task]:
    ctx, group = _context(program, tokens, note), _group_of(program)
    walked, floats = _first(program.clone(), ctx), "float weights"
    yield _Task(floats, _float(walked), floats, updates=False)
    for name, coded, options in (
        ("clipping", False, {"sites": ()}),
        ("clipping and scales", False, {}),
        ("clipping and scales, 4-bit activations", True, {}),
    ):
        how = Omniquant(bits=4, group=group, **options)  # type: ignore[arg-type]
        yield _Task(name, _learned(program.clone(), ctx, how, coded), floats)
    yield _Task("scales of 4-bit codes", _tuned(program, ctx, group), floats)


def _whole_tasks(program: Program, tokens: int, note: Callable[[str], None]) -> Iterator[_Task]:
    ctx, lora = _context(program, tokens, note), "all blocks: LoRA"
    for name, how in (
        (lora, L4q(bits=16)),
        ("all blocks: L4Q, 3 bits", L4q(bits=3, group=_group_of(program), begin="l4q")),
    ):
        yield _Task(name, how.problem(program.clone(), ctx)[1], lora)


def _context(program: Program, tokens: int, note: Callable[[str], None]) -> Context:
    """Return a run whose calibration is one sample of random tokens."""
    note(f"prepare {tokens} tokens")
    vocabulary = int(program.outputs[0].meta["type"].dims[-1])
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    return Context(calibration=[ids])


def _group_of(program: Program) -> int:
    return math.gcd(_GROUP, *(site.inputs for site in linear_sites(program, program.graph.nodes)[0]))


def _bytes(program: Program) -> int:
    return sum(program.params.type_of(name).nbytes for name in program.params)


def _first(program: Program, ctx: Context, original: Program | None = None) -> Step:
    return next(walk(program, ctx, "both", "bench", original))


def _float(walked: Step) -> Problem:
    """Return training of all the float weights of a block."""
    original, targets = walked.original_block.region(walked.original), walked.float_exits()
    weights = {name: original.program.params.get(name) for name in original.params}
    block = walked.function(tuple(weights))
    return Problem(weights, dict.fromkeys(weights, 0.0), lambda s, b: token_loss(block(s, b), targets[b]), 1)


def _learned(program: Program, ctx: Context, how: Omniquant, coded: bool) -> Problem:
    groups, original = discover(program).of(*how.settled().sites), program.clone()
    if coded:
        Act(bits=4).run(program, ctx)
        Kv(bits=4).run(program, ctx)
    walked = _first(program, ctx, original)
    names = {node.name for node in walked.block.nodes}
    inside = [g for g in groups if all(slot.node in names for slot in g.slots)]
    parts = transforms(program, inside, how.shift, how.name)
    block = LearnedBlock(how, how.settled(), program, walked, parts, ctx)
    ones: dict[str, Tensor] = {g.site: torch.ones(g.size, dtype=torch.float64) for g in inside}
    return block.problem(ones, [walked.float_exits()])


def _tuned(program: Program, ctx: Context, group: int) -> Problem:
    coded = program.clone()
    Rtn(bits=4, group=group).run(coded, ctx)
    walked, how = _first(coded, ctx, program), TuneScales()
    nodes = [n for n in walked.block.nodes if "quant_linear" in str(n.target)]
    weights = tuned_weights(coded, nodes, ())
    return block_problem(weights, walked, dict.fromkeys(weights.start(), how.rate), "token")
