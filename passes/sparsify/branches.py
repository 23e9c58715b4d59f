"""Branches beside linears: a small path from the same input whose output is added, and where they are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ir.analysis import BRANCH, LinearSite
from ir.edit import Editor
from ir.program import PATH, Program, tensor_type_of
from ir.types import TensorType
from passes.sparsify.lowrank import spread_sums

aten = torch.ops.aten
# Key of `Program.attributes`: {weight of the site: {"up", "down" or "sums"}}.
BRANCHES = "branches"


@dataclass(frozen=True, eq=False)
class Branch:
    """What is added to a linear: (x D^T) U^T; up: [N, r]; down: [r, K], or the number of neighbours that are summed."""

    up: Tensor
    down: Tensor | int

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] that the branch stands for."""
        return spread_sums(self.up, self.down) if isinstance(self.down, int) else self.up @ self.down


def put_branch(program: Program, site: LinearSite, branch: Branch, by: str) -> None:
    """Add a branch beside a linear, and record it by the linear's weight."""
    editor = Editor(program, by).before(_after(site))
    x, kind = site.node.args[0], tensor_type_of(site.node)
    read = tensor_type_of(x)  # type: ignore[arg-type]
    stem = site.weight.rpartition(".")[0] or site.weight.replace(".", "_")
    record: dict[str, Any] = {"up": f"{stem}.branch_up.weight"}
    rank = branch.up.shape[1]
    narrow = TensorType(kind.dtype, (*read.dims[:-1], rank))
    if isinstance(branch.down, int):
        record["sums"] = branch.down
        apart = TensorType(kind.dtype, (*read.dims[:-1], rank, branch.down))
        parts = editor.call(aten.unflatten, x, -1, [rank, branch.down], like=site.node, type=apart)
        inner = editor.call(aten.sum, parts, [-1], like=site.node, type=narrow)
    else:
        record["down"] = f"{stem}.branch_down.weight"
        down = editor.param(record["down"], branch.down.to(kind.dtype))
        inner = editor.call(aten.linear, x, down, like=site.node, type=narrow)
    up = editor.param(record["up"], branch.up.to(kind.dtype))
    added = editor.call(aten.linear, inner, up, like=site.node)
    total = editor.call(aten.add, site.node, added, like=site.node)
    editor.replace(site.node, total)
    editor.set_args(total, (site.node, added))
    for node in (*inner.all_input_nodes[:1], inner, added):
        if node.op == "call_function" and node is not x:
            node.meta[PATH] = f"{site.name}{BRANCH}"
    program.attributes[BRANCHES] = {**program.attributes.get(BRANCHES, {}), site.weight: record}
    program.version += 1


def branch_of(program: Program, site: LinearSite) -> Branch | None:
    """Return the branch beside a linear, or None."""
    record = program.attributes.get(BRANCHES, {}).get(site.weight)
    if record is None:
        return None
    up = program.params.get(record["up"])
    return Branch(up, record["sums"] if "sums" in record else program.params.get(record["down"]))


def branch_params(program: Program) -> frozenset[str]:
    """Return the names of the parameters of all branches."""
    records = program.attributes.get(BRANCHES, {}).values()
    return frozenset(str(record[key]) for record in records for key in ("up", "down") if key in record)


def _after(site: LinearSite) -> torch.fx.Node:
    after: torch.fx.Node = site.node.next
    return after
