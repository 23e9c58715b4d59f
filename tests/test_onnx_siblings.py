"""Compressed linears of one input are one operator, and give what each gives alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from backends.native.build import built_library
from backends.onnxruntime.lowering import emit_program, node_counts, write_model
from ir.ops.shiftcode import ShiftCodes
from ir.program import Program
from ir.types import TensorType
from tests.coded_weights import shift_codes
from tests.onnx_runs import function_program, session_outputs
from tests.test_onnx_compressed import compressed
from tools.site_kernels import kernel_lines, site_kernels

shiftadd_linear = torch.ops.nomul.shiftadd_linear.default
TILED = "nomul::TiledLinear"
PARTS = ("signs", "scales", "exponents", "offsets", "bias")
_codes = partial(shift_codes, inputs=96, group=32, terms=2, offset=False, spread=2)


def _linear(graph: fx.Graph, x: fx.Node, codes: ShiftCodes, name: str, params: dict[str, Tensor]) -> fx.Node:
    """Add a linear over x whose tensors go to `params` by name; with a bias where there is one of that name."""
    stored = codes.tensors()
    given = [params.get(f"bias_{name}") if part == "bias" else stored.get(part) for part in PARTS]
    params |= {f"{part}_{name}": t for part, t in zip(PARTS, given, strict=True) if t is not None}
    args = [None if t is None else graph.placeholder(f"{part}_{name}") for part, t in zip(PARTS, given, strict=True)]
    return graph.call_function(shiftadd_linear, (x, *args, codes.group, codes.terms, codes.row_group, codes.code))


def _program(all_codes: list[ShiftCodes], biased: tuple[bool, ...], chain: bool = False) -> Program:
    """Return a program of linears over the same activations, or each over what the one before gives."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    params = {f"bias_{i}": torch.arange(c.rows).float() for i, c in enumerate(all_codes) if biased[i]}
    found: list[fx.Node] = []
    for i, codes in enumerate(all_codes):
        found.append(_linear(graph, found[-1] if chain and found else x, codes, str(i), params))
    graph.output(tuple(found))
    return function_program(graph, {"x": TensorType(torch.float32, ("batch", "seq", 96))}, params)


@pytest.mark.parametrize(
    ("rows", "planes", "biased", "found"),
    [
        ((64, 32, 32), (3, 3, 3), (False, False, False), {TILED: 1}),
        ((64, 32), (3, 3), (True, True), {TILED: 1, "Concat": 1}),
        ((64, 32, 32), (3, 2, 3), (False, False, False), {TILED: 2}),
        ((64, 40), (3, 3), (False, False), {TILED: 2}),
        ((64, 32), (3, 3), (True, False), {TILED: 2}),
        ((64,), (3,), (False,), {TILED: 1}),
    ],
)
def test_linears_of_one_layout_are_one_operator(
    rows: tuple[int, ...], planes: tuple[int, ...], biased: tuple[bool, ...], found: dict[str, int], tmp_path: Path
) -> None:
    all_codes = [_codes(r, planes=p, seed=i) for i, (r, p) in enumerate(zip(rows, planes, strict=True))]
    program = _program(all_codes, biased)
    joined, alone = emit_program(program), emit_program(program, fuse=False)
    assert node_counts(joined) == found and node_counts(alone) == {TILED: len(rows)}
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    for library in (built_library(), None):
        results = []
        for model in (joined, alone):
            write_model(model, tmp_path)
            results.append(session_outputs(program, [x], tmp_path, library))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs) if library else torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_linears_of_different_inputs_stay_apart() -> None:
    program = _program([_codes(96, planes=3, seed=0)] * 2, (False, False), chain=True)
    assert node_counts(emit_program(program)) == {TILED: 2}


@pytest.mark.parametrize("pipeline", ["shiftadd", "rtn3", "nested"])
def test_queries_keys_and_values_are_one_operator_and_gate_and_up_another(pipeline: str) -> None:
    assert node_counts(emit_program(compressed("llama", pipeline)))[TILED] == 2 * 4


def test_the_kernel_of_every_linear_is_told(tmp_path: Path) -> None:
    write_model(emit_program(compressed("llama", "rtn3")), tmp_path)
    found = site_kernels(tmp_path)
    layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [one.site.rsplit(".", 1)[-1] for one in found] == [*layer, *layer, "lm_head"]
    assert kernel_lines(found[:-1]) == ["14 by nomul, 3 planes, 14bit"]


def test_uniform_codes_for_the_runtimes_operator_stay_apart() -> None:
    counts = node_counts(emit_program(compressed("llama", "rtn8"), uniform="contrib"))
    assert counts["com.microsoft::MatMulNBits"] == 14 and "Split" not in counts
