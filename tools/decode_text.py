"""The figures of whole models as tables."""

from __future__ import annotations

from typing import Any

from tools.console import size_text, table

_SHOWN = 6


def as_text(found: dict[str, Any]) -> str:
    """Return the figures as tables with a line on how they were taken."""
    parts = [_speeds(found), _memory(found), *(_step(step) for step in found["steps"])]
    if found["llama_cpp"]:
        parts.append(_llama(found))
    return "\n\n".join([*parts, _how(found)])


def _speeds(found: dict[str, Any]) -> str:
    short, long = found["prompts"]
    head = (
        "tokens/s", "threads", f"prefill {short}", "x float32", f"prefill {long}", "x float32", "first token ms",
        "decode", "x float32", "spread",
    )  # fmt: skip
    rows = [
        (
            r["name"], r["threads"], r["prefill_short"], r["prefill_short_to_float32"], r["prefill_long"],
            r["prefill_long_to_float32"], r["first_token_seconds"] * 1e3, r["decode"], r["decode_to_float32"],
            f"{r['spread']:.0%}",
        )
        for r in found["rows"]
    ]  # fmt: skip
    marks = sorted({mark for r in found["rows"] for mark in r["marks"]})
    return table(head, rows) + (f"\ndisturbed: {', '.join(marks)}" if marks else "")


def _memory(found: dict[str, Any]) -> str:
    sizes = {s["name"]: s for s in found["sizes"]}
    rows = [
        (
            m["name"], m["threads"], size_text(sizes[m["name"]]["model_bytes"]), _size(m["peak_bytes"]),
            _size(m["before_bytes"]),
        )
        for m in found["memory"]
    ]  # fmt: skip
    return table(("memory", "threads", "model files", "peak", "before opening"), rows)


def _step(step: dict[str, Any]) -> str:
    whole = step["seconds"]
    parts = [(name, seconds * 1e3, f"{seconds / whole:.0%}") for name, seconds in step["parts"].items()]
    operators = [(o["op"], o["nodes"], o["seconds"] * 1e3) for o in step["operators"][:_SHOWN]]
    title = f"one step of {step['name']}, {step['threads']} threads: {whole * 1e3:.2f} ms, traced"
    return f"{title}\n{table(('part', 'ms', 'share'), parts)}\n{table(('operator', 'nodes', 'ms'), operators)}"


def _llama(found: dict[str, Any]) -> str:
    short, long = found["prompts"]
    rows = [(r["name"], r["threads"], r["prefill_short"], r["prefill_long"], r["decode"]) for r in found["llama_cpp"]]
    return table(("llama.cpp, tokens/s", "threads", f"prefill {short}", f"prefill {long}", "decode"), rows)


def _how(found: dict[str, Any]) -> str:
    m, ours = found["machine"], found["sizes"][0]
    return "\n".join(
        [
            f"artifact  {found['artifact']}: {found['pipeline']}, {size_text(ours['folder_bytes'])} in all, of that "
            f"{size_text(ours['model_bytes'])} for onnxruntime; made from {found['source']}",
            f"decode    {found['new']} tokens after a prompt of {found['prompts'][0]}, greedy; medians of "
            f"{found['rounds']}, models in turn",
            "4-bit     MatMulNBits at accuracy level 4, rounded to nearest: for its speed, not for its text",
            "memory    of a process with ONNX Runtime alone, that prompt and those tokens",
            f"machine   {m['processor']}; {m['usable_cores']} of {m['cores']} cores, {m['scheduling']} scheduling, "
            f"load before {m['load_before']:.1f}; kernels {m['level']} of {', '.join(m['levels'])}; onnxruntime "
            f"{m['onnxruntime']}, torch {m['torch']}",
        ]
    )


def _size(count: int | None) -> str:
    return "-" if count is None else size_text(count)
