"""Which rotations pay: those under which weights and activations of a few bits leave less error (RoSTE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ir.analysis import LinearSite, blocks
from ir.ops.tokens import rounded
from ir.program import Program
from passes.base import Context
from passes.equiv.turns import Mix, Turn, turned_inputs, turned_weight
from passes.quantize.uniform import reconstruct, rtn
from passes.rotation import RotationPlan
from passes.stream import observe

# Tokens on which errors are compared.
_TOKENS = 256

Planned = Callable[[Mapping[str, str]], RotationPlan]


def idle_rotations(program: Program, planned: Planned, bits: int, ctx: Context, by: str) -> dict[str, str]:
    """Return what of a plan is not worth turning, with the reason, as `plan_rotation` takes it.

    planned: gives the plan without some of its parts. A part turns where the error of its linears' outputs, relative to
    their energy and summed, is lower with it than without when weights (a scale a row) and inputs (a scale a token) are
    rounded to nearest in `bits` bits. What a part that does not turn leaves to others is compared in its turn. Source:
    RoSTE (2502.09003, section 3.2), whose lower level this is, solved once before training.
    """
    inside = {node for block in blocks(program) for node in block.nodes}
    idle: dict[str, str] = {}
    seen = dict[fx.Node, Tensor]()
    done: set[str] = set()
    while True:
        plan = planned(idle)
        fresh = {name: pairs for name, pairs in plan.parts.items() if name not in done}
        if not fresh:
            return idle
        within = {name: [pair for pair in pairs if pair[0].node in inside] for name, pairs in fresh.items()}
        _keep_inputs(program, [site for pairs in within.values() for site, _ in pairs], seen, ctx, by)
        for name, pairs in within.items():
            done.add(name)
            before, after = _total(program, pairs, seen, bits)
            ctx.log.report(site=name, error_before=before, error_after=after)
            if after >= before:
                idle[name] = (
                    f"turning it does not lower the error of {bits} bits ({before:.3g} before, {after:.3g} after)"
                )


def _keep_inputs(
    program: Program,
    sites: Sequence[LinearSite],
    seen: dict[fx.Node, Tensor],
    ctx: Context,
    by: str,
) -> None:
    """Keep the first tokens that linears read, [tokens, K]."""

    def keeping(node: fx.Node) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            known = seen.get(node)
            rows = x.flatten(0, -2)[: _TOKENS - (0 if known is None else len(known))].clone()
            seen[node] = rows if known is None else torch.cat([known, rows])

        return keep

    read = dict.fromkeys(site.node.args[0] for site in sites)
    missing = [x for x in read if isinstance(x, fx.Node) and x not in seen]
    if missing:
        observe(program, ctx, {x: keeping(x) for x in missing}, by)


def _total(
    program: Program, pairs: Sequence[tuple[LinearSite, Turn | Mix]], seen: Mapping[fx.Node, Tensor], bits: int
) -> tuple[float, float]:
    """Return the errors of linears, summed, as they are and turned."""
    turns = {site: [turn for other, turn in pairs if other is site] for site, _ in pairs}
    found = [[_error(program, site, own, seen, bits) for own in ([], turns[site])] for site in turns]
    return sum(before for before, _ in found), sum(after for _, after in found)


def _error(
    program: Program, site: LinearSite, turns: Sequence[Turn | Mix], seen: Mapping[fx.Node, Tensor], bits: int
) -> float:
    """Return the energy of a linear's error relative to that of its outputs, 0 where calibration never reaches it."""
    x = seen.get(site.node.args[0])  # type: ignore[arg-type]
    if x is None:
        return 0.0
    weight = turned_weight(program.params.get(site.weight).float(), turns)
    x = turned_inputs(x.float(), turns)
    codes, zero, scale = rounded(x, bits, symmetric=False)
    exact = x @ weight.T
    found = ((codes - zero) * scale.float()) @ reconstruct(rtn(weight, bits, site.inputs, symmetric=False)).T
    return float((found - exact).square().sum() / exact.square().sum().clamp(min=1e-30))
