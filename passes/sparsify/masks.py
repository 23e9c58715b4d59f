"""Masks that a pass left on weights: which inputs of each row are kept, for the passes that store them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ir.analysis import LinearSite
from ir.errors import InvariantError
from ir.ops.nm import pack_mask, unpack_mask
from ir.program import HELD, Program
from passes.base import Context, OptionError
from passes.sparsify.pattern import Pattern

# Key of `Program.attributes`: {weight: {"n", "m", "param"}}.
MASKS = "masks"
# The fact that weights were trained under their masks.
TRAINED = "trained-weights"
# One of the operators that masked weights end in: a backend that has it has the others.
PACKED = frozenset({"nomul.sparse_linear"})


@dataclass(frozen=True, eq=False)
class Mask:
    """What of a weight [N, K] is kept: bool [N, K], under a pattern."""

    kept: Tensor
    pattern: Pattern


def put_mask(program: Program, site: LinearSite, mask: Mask, by: str) -> None:
    """Leave a mask on a site's weight, in place of one that is there; the weight is the caller's to multiply.

    Raises UsageError for a mask of another pattern than it says.
    """
    name = f"{MASKS}.{site.node.name}"
    program.params.put(name, pack_mask(mask.kept, mask.pattern.n, mask.pattern.m), by)
    record = {"n": mask.pattern.n, "m": mask.pattern.m, "param": name}
    program.attributes[MASKS] = {**program.attributes.get(MASKS, {}), site.weight: record}
    program.attributes[HELD] = sorted({*program.attributes.get(HELD, []), name})
    program.version += 1


def mask_of(program: Program, site: LinearSite) -> Mask | None:
    """Return the mask on a site's weight, or None.

    Raises InvariantError where it is gone, or where a weight that it does not keep is not zero.
    """
    record: dict[str, Any] | None = program.attributes.get(MASKS, {}).get(site.weight)
    if record is None:
        return None
    if record["param"] not in program.params:
        raise InvariantError(f"the mask @{record['param']} is gone", where=site.name)
    kept = unpack_mask(program.params.get(record["param"]), site.inputs)
    if bool((program.params.get(site.weight)[~kept] != 0).any()):
        raise InvariantError(
            "a weight is not zero where its mask keeps none", where=site.name, fix="run what changes weights before"
        )
    return Mask(kept, Pattern(record["n"], record["m"]))


def foresee_masks(program: Program, sites: Iterable[LinearSite], pattern: Pattern) -> None:
    """Note on an outline, whose weights are not read, which of them will have a mask."""
    found = {site.weight: {"n": pattern.n, "m": pattern.m} for site in sites}
    program.attributes[MASKS] = {**program.attributes.get(MASKS, {}), **found}


def pattern_at(program: Program, site: LinearSite) -> Pattern | None:
    """Return the pattern of a site's mask, one that is there or one foreseen."""
    record = program.attributes.get(MASKS, {}).get(site.weight)
    return None if record is None else Pattern(record["n"], record["m"])


def floats_behind(program: Program, ctx: Context) -> Program | None:
    """Return the program that codes of masked weights are to come close to, or None for this one as it is.

    One-shot masks took inputs from weights, so that it is the one before them; trained weights are not to be undone.
    """
    masked = bool(program.attributes.get(MASKS))
    return ctx.original if masked and TRAINED not in program.facts else None


def kept_group(group: int, pattern: Pattern, by: str) -> int:
    """Return how many kept weights a group of inputs has; OptionError where it cuts through a pattern."""
    if group % pattern.m:
        why = f"{group} inputs are no multiple of the {pattern.m} of the pattern {pattern}"
        raise OptionError(by, "group", why, fix=f"use a multiple of {pattern.m}")
    return group // pattern.m * pattern.n


def drop_mask(program: Program, weight: str) -> None:
    """Let go of a weight's mask, if it has one."""
    masks = dict(program.attributes.get(MASKS, {}))
    record = masks.pop(weight, None)
    if record is None:
        return
    program.params.drop(record["param"])
    held = [name for name in program.attributes.get(HELD, []) if name != record["param"]]
    for key, value in ((MASKS, masks), (HELD, held)):
        if value:
            program.attributes[key] = value
        else:
            program.attributes.pop(key, None)
    program.version += 1
