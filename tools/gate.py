"""The quality gate: how far is what was compiled from the model that came in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ir.errors import GateError

if TYPE_CHECKING:
    import torch

    from ir.execute import Batch
    from ir.program import Program


@dataclass(frozen=True)
class Quality:
    """Measured on held-out text. kl: mean KL(before || after) in nats; top1: share of equal first choices.

    before, after: token-level perplexity; finite: whether every logit is; passed: kl is finite and at most `limit`.
    """

    tokens: int
    before: float
    after: float
    kl: float
    top1: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the program is kept unmarked."""
        return math.isfinite(self.kl) and self.kl <= self.limit

    @property
    def text(self) -> str:
        """What was measured, as a line for people."""
        return (
            f"perplexity {self.before:.2f} -> {self.after:.2f}, KL {self.kl:.4f}, top-1 "
            f"{self.top1:.1%} on {self.tokens} held-out tokens (not comparable between texts)"
        )

    @property
    def rule(self) -> str:
        """What the gate lets through."""
        return f"KL at most {self.limit:g}"

    @property
    def cards(self) -> list[tuple[str, str]]:
        """The figures one by one, with their names."""
        shift = ("perplexity", f"{self.before:.2f} to {self.after:.2f}")
        return [shift, ("KL", f"{self.kl:.4f}"), ("top-1", f"{self.top1:.1%}")]

    @property
    def failure(self) -> GateError:
        """The error of a program that did not pass."""
        return _failure(f"KL {self.kl:.3g} to the input model, allowed {self.limit:g}", "--max-kl")

    def as_json(self) -> dict[str, float | bool | int]:
        """Return the figures by name."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Fidelity:
    """Measured on held-out samples: how far a result's vectors, along its last dim, are from what they were.

    result: its name; cosine, least: mean and least cosine similarity of vectors; error: ||after - before|| / ||before||
    over all of them; passed: error is finite and at most `limit`.
    """

    result: str
    vectors: int
    cosine: float
    least: float
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the program is kept unmarked."""
        return math.isfinite(self.error) and self.error <= self.limit

    def as_json(self) -> dict[str, float | bool | int | str]:
        """Return the figures by name."""
        return {**asdict(self), "passed": self.passed}

    @property
    def text(self) -> str:
        """What was measured, as a line for people."""
        return (
            f"cosine {self.cosine:.4f} (least {self.least:.3f}), relative error {self.error:.3g} "
            f"on {self.vectors} vectors of {self.result}"
        )

    @property
    def rule(self) -> str:
        """What the gate lets through."""
        return f"relative error at most {self.limit:g}"

    @property
    def cards(self) -> list[tuple[str, str]]:
        """The figures one by one, with their names."""
        shift = f"{self.cosine:.4f} (least {self.least:.3f})"
        return [(f"cosine of {self.result}", shift), ("relative error", f"{self.error:.3g}")]

    @property
    def failure(self) -> GateError:
        """The error of a program that did not pass."""
        why = f"relative error {self.error:.3g} to the input model's {self.result}, allowed {self.limit:g}"
        return _failure(why, "--max-error")


def _failure(why: str, option: str) -> GateError:
    fix = f"the artifact is kept and marked; use more bits, or {option} / --no-gate to accept it"
    return GateError("the compiled program failed its quality gate", why=why, fix=fix)


def compared_result(program: Program) -> tuple[int, str] | None:
    """Return place and name of the first result of floats, None where there is none."""
    from ir.analysis import result_names
    from ir.program import tensor_type_of

    for index, (node, name) in enumerate(zip(program.outputs, result_names(program), strict=True)):
        if tensor_type_of(node).dtype.is_floating_point:
            return index, name
    return None


def judge_results(
    before: Program, after: Program, batches: Sequence[Batch], limit: float, step: Callable[[str], None]
) -> Fidelity:
    """Compare the first result of floats of two programs on batches; what a mask says is padding does not count."""
    import torch
    from torch.nn.functional import cosine_similarity

    from ir.execute import MASK, batch_inputs, run_in_parts

    found = compared_result(before)
    assert found is not None
    index, name = found
    cosines, wrong, energy = [], 0.0, 0.0
    for batch in batches:
        inputs = batch_inputs(before, batch)
        expected, ours = (_vectors(run_in_parts(p, inputs)[index], inputs.get(MASK)) for p in (before, after))
        cosines.append(cosine_similarity(expected, ours, -1))
        wrong, energy = wrong + float((ours - expected).square().sum()), energy + float(expected.square().sum())
        step("")
    every = torch.cat(cosines)
    error = math.sqrt(wrong / energy) if energy > 0 else 0.0 if wrong == 0 else math.inf
    mean, least = (float(every.mean()), float(every.min())) if len(every) else (math.nan, math.nan)
    return Fidelity(name, len(every), mean, least, error, limit)


def _vectors(result: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return a result as vectors along its last dim, float64 [n, width], without those that are masked."""
    if result.ndim < 2:
        return result.double().reshape(-1, 1)
    if mask is not None and mask.shape == result.shape[:-1]:
        return result[mask.bool()].double()
    return result.double().flatten(0, -2)


def judge(
    before: Program, after: Program, held_out: torch.Tensor, limit: float, step: Callable[[str], None]
) -> Quality:
    """Compare two programs on token windows i64[windows, length], one window's logits in memory at a time."""
    from ir.execute import logits_by_row
    from tools.perplexity import Tally

    student, teacher = Tally(), Tally()
    pairs = zip(logits_by_row(before, held_out), logits_by_row(after, held_out), strict=True)
    for index, (expected, found) in enumerate(pairs):
        ids = held_out[index : index + 1]
        teacher.add(expected, ids)
        student.add(found, ids, expected)
        step("")
    kl, top1 = student.kl, student.top1
    return Quality(
        held_out.numel() - len(held_out),
        teacher.perplexity,
        student.perplexity,
        math.nan if kl is None else kl,
        math.nan if top1 is None else top1,
        limit,
    )
