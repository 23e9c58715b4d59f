"""Where a step of a session goes, by operator, from ONNX Runtime's own trace."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

LINEARS = frozenset({"TiledLinear", "DenseLinear", "CodedLinear", "MatMulNBits", "FusedMatMul", "MatMul", "Gemm"})
ATTENTIONS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_HEAD, _KERNEL, _RUN = "logits", "_kernel_time", "SequentialExecutor::Execute"


def breakdown(trace: Path, steps: int) -> dict[str, Any]:
    """Return seconds a step of a trace that holds `steps` runs: by operator, and by what it is for.

    parts: linears, the head (the linear that makes the logits), attention, other nodes, and what lies between nodes.
    """
    events = json.loads(trace.read_text(encoding="utf-8"))
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    by_op: dict[str, list[float]] = defaultdict(list)
    parts = dict.fromkeys(("linears", "head", "attention", "others"), 0.0)
    for event in nodes:
        op, seconds = event["args"]["op_name"], event["dur"] / 1e6 / steps
        by_op[op].append(seconds)
        parts[_part(op, event["name"])] += seconds
    whole = sum(e["dur"] for e in events if e["name"] == _RUN) / 1e6 / steps
    parts["between nodes"] = max(0.0, whole - sum(parts.values()))
    operators = [
        {"op": op, "nodes": len(found) / steps, "seconds": sum(found)}
        for op, found in sorted(by_op.items(), key=lambda item: -sum(item[1]))
    ]
    return {"steps": steps, "seconds": whole, "parts": parts, "operators": operators}


def _part(op: str, name: str) -> str:
    if op in LINEARS:
        return "head" if name == _HEAD + _KERNEL else "linears"
    return "attention" if op in ATTENTIONS else "others"
