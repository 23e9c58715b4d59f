"""A graph for training: pairs that encode and decode tokens become one call that gradients pass through."""

from __future__ import annotations

import torch
from torch import fx

from ir import ops as _ops  # noqa: F401  (registers the nomul operators)
from ir.program import is_call

aten, nomul = torch.ops.aten, torch.ops.nomul


def pass_straight(graph: fx.Graph) -> None:
    """Put `nomul.straight_tokens` where rows are decoded that were encoded in the same graph, in place.

    Rows joined to those of a cache are taken for all there are: calibration has no past tokens.
    """
    for node in [n for n in graph.nodes if is_call(n, nomul.decode_tokens)]:
        encoded = _encoded(node.args[0])
        if encoded is None:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(nomul.straight_tokens.default, encoded.args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in reversed([n for n in graph.nodes if n.op == "call_function" and not n.users]):
        if is_call(node, nomul.encode_tokens, aten.cat):
            graph.erase_node(node)


def _encoded(rows: object) -> fx.Node | None:
    """Return the call that encoded rows, a cache they are joined to apart; None where they come from elsewhere."""
    if is_call(rows, aten.cat):
        parts = [p for p in rows.args[0] if p.op != "placeholder"]  # type: ignore[attr-defined]
        rows = parts[0] if len(parts) == 1 else None
    return rows if is_call(rows, nomul.encode_tokens) else None  # type: ignore[return-value]
