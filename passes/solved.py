"""Solved codes of a block: put into the program, and kept on disk for a run that resumes this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ir.analysis import LinearSite, sibling_sites
from ir.ops.nested import NestedCodes
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes
from ir.program import Program
from passes.base import Context, Event
from passes.checkpoint import as_json, load_block, replay, save_block
from passes.sites import put_nested_codes, put_quant_codes, put_shift_codes, put_sparse_codes

Codes = ShiftCodes | NestedCodes | QuantCodes | SparseCodes
# Before the names of parameters that stay float, in a finished block's file.
_FLOAT = "float:"
# The key of what a pass recorded of a block, beside those of its nodes.
_SAID = "said:"
# Between the name of codes within codes and those of their parts.
_WITHIN = ">"
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (ShiftCodes, NestedCodes, QuantCodes, SparseCodes)}


@dataclass(frozen=True, eq=False)
class Solved:
    """A site with its codes and the figures to report; fallback: why it was fitted without data, or empty."""

    site: LinearSite
    codes: Codes
    figures: Mapping[str, float]
    fallback: str = ""


def put_solved(program: Program, row: Solved, pass_name: str, ctx: Context) -> None:
    """Put a site's codes in place of its weight and report them; pass_name: of the pass, for the program's record."""
    _put_codes(program, row, pass_name)
    if row.fallback:
        ctx.log.skip(row.site.name, row.fallback)
    ctx.log.report(site=row.site.name, **row.figures)


def _put_codes(program: Program, row: Solved, pass_name: str) -> None:
    if isinstance(row.codes, NestedCodes):
        put_nested_codes(program, row.site, row.codes, pass_name)
    elif isinstance(row.codes, SparseCodes):
        put_sparse_codes(program, row.site, row.codes, pass_name)
    elif isinstance(row.codes, QuantCodes):
        put_quant_codes(program, row.site, row.codes, pass_name)
    else:
        put_shift_codes(program, row.site, row.codes, pass_name)


def save_solved(
    ctx: Context,
    index: int,
    solved: Mapping[str, Solved],
    floats: Mapping[str, Tensor] | None = None,
    said: Sequence[Event] = (),
) -> None:
    """Keep a block's codes, by the name of the node they replaced, for a run that resumes this one.

    floats: parameters that the pass changed and that stay float, by name; said: what the pass recorded of the block,
    where that is more than its sites.
    """
    tensors: dict[str, Tensor] = {f"{_FLOAT}{name}": tensor for name, tensor in (floats or {}).items()}
    facts: dict[str, object] = {_SAID: as_json(said)} if said else {}
    for stem, row in solved.items():
        parts, rest = _kept(row.codes)
        tensors.update({f"{stem}/{name}": tensor for name, tensor in parts.items()})
        facts[stem] = {"codes": rest, "figures": row.figures, "fallback": row.fallback}
    save_block(ctx.work, index, tensors, facts)


def restore_floats(program: Program, pass_name: str, ctx: Context, index: int) -> None:
    """Put the parameters of a finished block that stay float in place, as the earlier run changed them."""
    tensors, _ = load_block(ctx.work, index) or ({}, {})
    for name, tensor in tensors.items():
        if name.startswith(_FLOAT):
            program.params.put(name.removeprefix(_FLOAT), tensor, pass_name)


def restore_solved(program: Program, sites: list[LinearSite], pass_name: str, ctx: Context, index: int) -> bool:
    """Put a block's codes from an earlier run in place, as that run did; return whether there were any."""
    found = load_block(ctx.work, index)
    if found is None:
        return False
    tensors, facts = found
    replay(ctx.log, facts.get(_SAID, []))
    for site in (site for group in sibling_sites(sites) for site in group):
        fact, stem = facts[site.node.name], f"{site.node.name}/"
        assert isinstance(fact, dict)
        parts = {name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)}
        row = Solved(site, _restored(parts, fact["codes"]), fact["figures"], fact["fallback"])
        if _SAID in facts:
            _put_codes(program, row, pass_name)
        else:
            put_solved(program, row, pass_name, ctx)
    return True


def _kept(codes: Codes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON-able rest of codes, from which `_restored` makes them again.

    Tensors of a tuple are numbered, those of codes within go by their prefix; the rest names the kind of codes and the
    lengths of its tuples.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"kind": type(codes).__name__, "lengths": {}}
    for f in fields(codes):
        value = getattr(codes, f.name)
        if isinstance(value, Tensor):
            tensors[f.name] = value
        elif type(value).__name__ in _KINDS:
            inner, facts[f.name] = _kept(value)
            tensors.update({f"{f.name}{_WITHIN}{name}": t for name, t in inner.items()})
        elif isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
            tensors.update({f"{f.name}.{i}": t for i, t in enumerate(value)})
            facts["lengths"][f.name] = len(value)
        else:
            facts[f.name] = value
    return tensors, facts


def _restored(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Codes:
    """Return the codes that `_kept` took apart."""
    inside = {name: v for name, v in facts.items() if isinstance(v, dict) and name != "lengths"}
    plain = {name: v for name, v in facts.items() if name not in ("kind", "lengths", *inside)}
    rest = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
    parts: dict[str, Any] = {n: t for n, t in tensors.items() if "." not in n and _WITHIN not in n}
    for name, within in inside.items():
        inner = {n.removeprefix(name + _WITHIN): t for n, t in tensors.items() if n.startswith(name + _WITHIN)}
        parts[name] = _restored(inner, within)
    for name, length in facts["lengths"].items():
        parts[name] = tuple(tensors[f"{name}.{i}"] for i in range(length))
    found: Codes = _KINDS[facts["kind"]](**parts, **rest)
    return found
