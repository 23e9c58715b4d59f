"""What a kernel costs beside its rows: making tables, rounding, and being an operator of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.native.layout import pack
from backends.native.library import load
from tools.bench_models import Layers, chain, random_codes, random_weight, tiled_op
from tools.bench_timing import Candidate, Plan, interleaved

WIDTH, ROWS, PLANES = 4096, 256, 3
# One token goes through tables, many through float products.
TOKENS = (1, 128)
_CHAIN, _QUICK_CHAIN, _NODE_WIDTH = 200, 20, 32
_BUILT_IN = ("Neg", "Relu", "Abs")
_ROUNDS = 7


def details(modes: tuple[str, ...], quick: bool) -> dict[str, Any]:
    """Return the table build, the relative errors and the cost of a node, one thread."""
    plan = Plan(_ROUNDS, 0.001 if quick else 0.005, True)
    return {
        "prepare": [_prepare(mode, plan) for mode in modes],
        "errors": [_error(mode, tokens) for mode in modes for tokens in TOKENS],
        "node": _node(_QUICK_CHAIN if quick else _CHAIN, plan),
    }


def _prepare(mode: str, plan: Plan) -> dict[str, Any]:
    x = torch.randn(1, WIDTH)
    call = load().prepare_call(x, random_weight(32, WIDTH, PLANES).layout, mode)
    timing = interleaved([Candidate(mode, _repeated(call))], plan)[mode]
    return {"mode": mode, "inputs": WIDTH, "seconds": timing.seconds, "spread": timing.spread}


def _error(mode: str, tokens: int) -> dict[str, Any]:
    """Return |y - exact| / |exact| with normal activations of which one in 200 is eight times as large."""
    codes = random_codes(ROWS, WIDTH, PLANES)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=generator)
    x *= 1 + 7 * (torch.rand(x.shape, generator=generator) < 0.005)
    got = torch.empty(tokens, ROWS)
    Layers(tiled_op(pack(codes), mode), 1, 1).bound(x, got)(1)
    exact: Tensor = x.double() @ codes.dequantize(torch.float64).T
    return {"mode": mode, "tokens": tokens, "error": float((got.double() - exact).norm() / exact.norm())}


def _node(length: int, plan: Plan) -> dict[str, Any]:
    """Return seconds a node in a chain: built-in elementwise ones, and ours beyond the work of its kernel."""
    weight = random_weight(_NODE_WIDTH, _NODE_WIDTH, PLANES)
    x, out = torch.ones(1, _NODE_WIDTH), torch.empty(1, _NODE_WIDTH)
    call, nothing = (load().linear_call(x[:tokens], weight, out, "14bit", 1) for tokens in (1, 0))
    candidates = [Candidate(op, chain(op, length, _NODE_WIDTH), length) for op in _BUILT_IN]
    candidates.append(Candidate("ours", chain("", length, _NODE_WIDTH, tiled_op(weight, "14bit")), length))
    candidates += [Candidate("kernel", _repeated(call)), Candidate("nothing", _repeated(nothing))]
    timings = interleaved(candidates, plan)
    built_in = {op: timings[op].seconds for op in _BUILT_IN}
    # Calls from here cost as much themselves; those on no tokens do nothing else.
    kernel = max(0.0, timings["kernel"].seconds - timings["nothing"].seconds)
    slowest = max(built_in.values())
    return {
        "nodes": length,
        "built_in_seconds": built_in,
        "our_seconds": timings["ours"].seconds,
        "kernel_seconds": kernel,
        "extra_seconds": timings["ours"].seconds - kernel - slowest,
    }


def _repeated(call: Callable[[], object]) -> Callable[[int], None]:
    def times(count: int) -> None:
        for _ in range(count):
            call()

    return times
