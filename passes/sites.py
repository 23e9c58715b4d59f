"""Putting codes where a float linear was: parameters beside the weight, the coded operator in the linear's place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, fx

from ir import ops as _ops  # noqa: F401  (registers the nomul operators)
from ir.analysis import LinearSite, is_branch, linear_sites, matches
from ir.edit import Editor
from ir.errors import UnsupportedError
from ir.ops.nested import NestedCodes, check_precision
from ir.ops.nm import kept_inputs
from ir.ops.packing import packed_length
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes
from ir.program import Program
from passes.base import Context, OptionError, Pass
from passes.sparsify.branches import branch_of
from passes.sparsify.masks import drop_mask, kept_group
from passes.sparsify.pattern import Pattern

nomul = torch.ops.nomul


def choose_sites(program: Program, nodes: Iterable[fx.Node], skip: Sequence[str], ctx: Context) -> list[LinearSite]:
    """Return the linears among `nodes` to compress; those left alone are recorded with their reason.

    skip: patterns of site names to leave in float. Branches beside sites are no sites of their own.
    """
    sites, left = linear_sites(program, nodes)
    for name, reason in left:
        _leave(ctx, name, reason, skip)
    chosen = []
    for site in sites:
        if is_branch(site.node):
            continue
        if _pattern(skip, site.name) is None:
            chosen.append(site)
        else:
            _leave(ctx, site.name, "", skip)
    return chosen


def outside_blocks(program: Program, block_nodes: Iterable[fx.Node], skip: Sequence[str], ctx: Context) -> None:
    """Record the linears outside the repeated blocks (a head, a projection of embeddings) as left in float."""
    inside = set(block_nodes)
    sites, left = linear_sites(program, (n for n in program.graph.nodes if n not in inside))
    for site in sites:
        _leave(ctx, site.name, "it is outside the repeated blocks, where errors reach the logits undamped", skip)
    for name, reason in left:
        _leave(ctx, name, reason, skip)


def check_skip(program: Program, skip: Sequence[str], by: str) -> None:
    """Raise OptionError for a pattern that names no linear: a misspelt one would compress what was to stay float."""
    sites, left = linear_sites(program, program.graph.nodes)
    check_patterns([s.name for s in sites] + [name for name, _ in left], skip, by)


def check_patterns(names: Sequence[str], skip: Sequence[str], by: str) -> None:
    """Raise OptionError for a pattern that names none of these linears."""
    for pattern in skip:
        if not any(matches(pattern, name) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise OptionError(
                by, "skip", f"{pattern} matches none of the {len(names)} linears", fix=f"they are {shown}"
            )


def _pattern(skip: Sequence[str], name: str) -> str | None:
    return next((p for p in skip if matches(p, name)), None)


def _leave(ctx: Context, name: str, reason: str, skip: Sequence[str]) -> None:
    pattern = _pattern(skip, name)
    ctx.log.skip(name, f"skip={pattern} names it" if pattern else reason, asked=pattern is not None)


def check_group(sites: Iterable[LinearSite], group: int, by: str) -> None:
    """Raise UnsupportedError when `group` does not divide the inputs of every site, naming groups that do."""
    sites = list(sites)
    bad = [s for s in sites if s.inputs % group]
    if bad:
        common = math.gcd(*(s.inputs for s in sites))
        fits = [d for d in range(common, 0, -1) if common % d == 0 and d >= min(8, common)]
        raise UnsupportedError(
            f"group {group} of pass {by} does not divide the inputs of {len(bad)} of {len(sites)} sites",
            where=f"{bad[0].name} has {bad[0].inputs} inputs",
            why="a ragged last group would need padding that kernels have to undo",
            fix=f"use a group that divides all: {', '.join(map(str, fits[:6]))}",
        )


def weights_of(program: Program, sites: Sequence[LinearSite], by: str) -> Tensor:
    """Return the weights of sites that share an input, stacked along the rows in float64.

    Raises UnsupportedError naming the parameter when a weight holds NaN or infinity.
    """
    stacked = []
    for site in sites:
        weight = program.params.get(site.weight)
        if not torch.isfinite(weight).all():
            count = int((~torch.isfinite(weight)).sum())
            raise UnsupportedError(
                f"pass {by} cannot compress a weight that is not finite",
                where=site.weight,
                why=f"{count} of its {weight.numel()} values are NaN or infinite",
                fix="check the checkpoint; nothing was written",
            )
        stacked.append(weight.double())
    return torch.cat(stacked)


def dense_weight(program: Program, floats: Program | None, site: LinearSite, by: str) -> Tensor:
    """Return the weight that a site's codes are to come close to, float64 [N, K].

    floats: the program before a mask took inputs from the weight, or None for the weight as it is; what a branch beside
    the site already gives is taken off it. Raises UnsupportedError as `weights_of`.
    """
    weight = weights_of(floats or program, [site], by)
    branch = branch_of(program, site) if floats is not None else None
    return weight if branch is None else weight - branch.weight.double()


def put_shift_codes(program: Program, site: LinearSite, codes: ShiftCodes, by: str) -> fx.Node:
    """Replace a linear by `nomul.shiftadd_linear` on stored codes; return the new node."""
    editor, stem = Editor(program, by).before(site.node), _stem(site)
    parts = {name: editor.param(f"{stem}.{name}", tensor) for name, tensor in codes.tensors().items()}
    stored = (parts["signs"], parts["scales"], parts.get("exponents"), parts.get("offsets"))
    layout: tuple[int | str, ...] = (codes.group, codes.terms, codes.row_group, codes.code)
    if layout[2:] == (1, "planes"):
        layout = layout[:2]
    return _replace(editor, site, nomul.shiftadd_linear, (site.node.args[0], *stored, site.bias, *layout))


def put_nested_codes(
    program: Program, site: LinearSite, codes: NestedCodes, by: str, precision: int | None = None
) -> fx.Node:
    """Replace a linear by `nomul.nested_linear` on stored codes; return the new node.

    precision: the number of planes it runs at (default: all of them); UsageError for one that the codes do not have.
    """
    chosen = codes.precisions[-1] if precision is None else precision
    check_precision(chosen, codes.precisions)
    editor, stem = Editor(program, by).before(site.node), _stem(site)
    lists = [
        [editor.param(f"{stem}.{name}.{p}", t) for p, t in zip(codes.precisions, getattr(codes, name), strict=False)]
        for name in ("scales", "exponents", "offsets")
    ]
    stored = (editor.param(f"{stem}.signs", codes.signs), *lists)
    layout = (codes.group, codes.terms, codes.row_group, list(codes.precisions), chosen)
    return _replace(editor, site, nomul.nested_linear, (site.node.args[0], *stored, site.bias, *layout))


def put_quant_codes(program: Program, site: LinearSite, codes: QuantCodes, by: str) -> fx.Node:
    """Replace a linear by `nomul.quant_linear` on stored codes; return the new node."""
    editor, stem = Editor(program, by).before(site.node), _stem(site)
    parts = [editor.param(f"{stem}.{n}", getattr(codes, n)) for n in ("codes", "scales")]
    zeros = None if codes.zeros is None else editor.param(f"{stem}.zeros", codes.zeros)
    args = (site.node.args[0], *parts, zeros, site.bias, codes.bits, codes.group)
    return _replace(editor, site, nomul.quant_linear, args)


def put_sparse_codes(program: Program, site: LinearSite, codes: SparseCodes, by: str) -> fx.Node:
    """Replace a linear by `nomul.sparse_linear` or `nomul.sparse_shiftadd_linear`, and let go of its mask."""
    editor, stem = Editor(program, by).before(site.node), _stem(site)
    x, kept, mask = site.node.args[0], codes.kept, editor.param(f"{stem}.mask", codes.mask)
    if isinstance(kept, ShiftCodes):
        parts = {name: editor.param(f"{stem}.{name}", tensor) for name, tensor in kept.tensors().items()}
        stored = (parts["signs"], parts["scales"], parts.get("exponents"), parts.get("offsets"), mask, site.bias)
        layout: tuple[int | str, ...] = (codes.n, codes.m, kept.group, kept.terms, kept.row_group, kept.code)
        new = _replace(editor, site, nomul.sparse_shiftadd_linear, (x, *stored, *layout))
    else:
        values = editor.param(f"{stem}.values", kept.codes if isinstance(kept, QuantCodes) else kept)
        scales = editor.param(f"{stem}.scales", kept.scales) if isinstance(kept, QuantCodes) else None
        layout = (codes.n, codes.m, kept.bits, kept.group) if isinstance(kept, QuantCodes) else (codes.n, codes.m)
        new = _replace(editor, site, nomul.sparse_linear, (x, values, mask, scales, site.bias, *layout))
    drop_mask(program, site.weight)
    return new


def _stem(site: LinearSite) -> str:
    """Return the name codes are siblings under; a name that extends the weight's would nest in fx."""
    return site.weight.rpartition(".")[0] or site.weight.replace(".", "_")


def _replace(editor: Editor, site: LinearSite, op: Any, args: tuple[Any, ...]) -> fx.Node:
    new = editor.call(op, *args, like=site.node)
    editor.replace(site.node, new, keep_name=True)
    editor.erase(site.node)
    editor.sweep()
    return new


def planned(pass_: Pass, site: LinearSite, bits: int, pattern: Pattern | None = None) -> dict[str, float]:
    """Return what a pass's codes of a site will take at a width; of the weights that a pattern keeps, and the mask."""
    size = pass_.stored_bytes(site, bits)
    if pattern is not None:
        options = {option.name for option in fields(pass_)}
        own: dict[str, Any] = {"symmetric": True} if "symmetric" in options else {}
        group = getattr(pass_, "group", 0)
        own |= {"group": kept_group(group, pattern, pass_.name)} if group else {}
        kept = replace(site, inputs=kept_inputs(site.inputs, pattern.n, pattern.m))
        size = replace(pass_, **own).stored_bytes(kept, bits) + mask_bytes(site)
    weights = site.rows * site.inputs
    return {"bits": 8 * size / weights, "bytes": float(size), "weights": float(weights)}


def mask_bytes(site: LinearSite) -> int:
    """Return the bytes of a site's mask."""
    return site.rows * packed_length(site.inputs, 1)


def figures(stored_bits: int, rows: int, inputs: int, loss: float) -> dict[str, float]:
    """Return the figures reported for a compressed site: stored bits a weight, relative output error, SQNR.

    loss: tr(E H E^T) / tr(W H W^T), the energy of the output error relative to the output's.
    """
    sqnr = -10 * math.log10(loss) if loss > 0 else float("inf")
    return {
        "bits": stored_bits / (rows * inputs),
        "bytes": stored_bits / 8,
        "weights": float(rows * inputs),
        "rel_error": math.sqrt(max(loss, 0.0)),
        "sqnr_db": sqnr,
    }
