"""Compressed models in ONNX Runtime: logits and cache of the reference backend on the same codes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.detours import detour_lines
from backends.onnxruntime import OnnxRuntime, OnnxRuntimeBackend, SessionOptions
from backends.onnxruntime.lowering import detours_of, emit_program, node_counts, write_model
from backends.onnxruntime.session import library_for
from backends.reference.runtime import ReferenceRuntime
from ir.program import Program
from passes.base import Context, Log
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from tests.architectures import ids_for, relative_error, traced
from tests.tiny_model import compressed_tiny

QUICK = "rounds=2 starts=1 iterations=1 polish=0 sweeps=0"
PIPELINES = {
    "rtn3": "rtn{bits=3 group=32}",
    "rtn8": "rtn{bits=8 group=64}",
    "shiftadd": "shiftadd{bits=3 group=32 " + QUICK + "}",
    "rows": "shiftadd{bits=2 group=0 terms=3 offset=false " + QUICK + "}",
    "trits": "shiftadd{bits=2 code=trits group=32 " + QUICK + "}",
    "nested": "shiftadd{nested=[2 3] group=32 " + QUICK + "}",
}
# Planes of passes that train or binarise, for one architecture each: what is stored is of kinds that are above.
RELATIVES = {
    "rabit": "rabit{warm=0 epochs=0}",
    "onebit": "svid,fold,onebit{warm=0 epochs=0 terms=2}",
    "billm": "billm{group=32 salient=0.5}",
    "svd": "svd{share=0.9 multiple=32},rtn{bits=4 group=32}",
    "lowrank": "rtn{bits=3 group=32},lowrank",
}
# Codes without a tile order, and what is said of them.
WITHOUT_KERNEL = {
    "lat": ("shiftadd{bits=3 group=64 mode=lat " + QUICK + "}", "groups of 8 inputs are smaller than the 32"),
    "acc": ("shiftadd{bits=2 group=16 mode=acc " + QUICK + "}", "groups of 1 inputs are smaller than the 32"),
    "trits31": ("shiftadd{bits=2 group=32 code=trits31 " + QUICK + "}", "trits that share one scale"),
}
# What logits and cache may differ by from the reference's on the same codes. Both are float32 in mode exact, and away
# from float64 by up to 2e-6 themselves on these small random models.
LIMITS = {"exact": 4e-6, "14bit": 5e-4}
# The normalised queries and keys of a random qwen3 give scores so large that they magnify what is rounded off.
MAGNIFIED = {"qwen3": {"exact": 2e-5, "14bit": 2e-3}}


@cache
def compressed(name: str, pipeline: str) -> Program:
    """Return a tiny model after a pipeline."""
    program, _ = traced(name)
    context = Context(0, Log(), (ids_for(4, 24), ids_for(4, 24, seed=2)), None, False, "float32")
    text = (PIPELINES | RELATIVES)[pipeline] if pipeline not in WITHOUT_KERNEL else WITHOUT_KERNEL[pipeline][0]
    run_pipeline(program, parse(text), context, Settings("off", False, "none", None))
    return program


def opened(program: Program, folder: Path, mode: str) -> OnnxRuntime:
    """Return the program in ONNX Runtime, on one thread."""
    write_model(emit_program(program, mode=mode), folder)
    return OnnxRuntime(program, folder, options=SessionOptions(threads=1, library=library_for(folder)))


def check(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]], limit: float) -> None:
    """Hold logits to a limit and each layer's keys and values, which nothing evens out, to twice that."""
    assert relative_error(ours[:1], theirs[:1]) <= limit
    assert relative_error(ours[1], theirs[1]) <= 2 * limit


@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_logits_and_cache_are_those_of_the_same_codes(name: str, pipeline: str, mode: str, tmp_path: Path) -> None:
    program = compressed(name, pipeline)
    reference, runtime = ReferenceRuntime(program), opened(program, tmp_path, mode)
    assert node_counts(emit_program(program))["nomul::TiledLinear"] >= 8
    limit = MAGNIFIED.get(name, {}).get(mode, LIMITS[mode])
    for batch, seq in ((1, 1), (1, 20), (3, 17)):
        ids, more = ids_for(batch, seq), ids_for(batch, 1, seed=3)
        theirs = reference.forward(ids)
        ours = runtime.forward(ids)
        check(ours, theirs, limit)
        check(runtime.forward(more, None, theirs[1]), reference.forward(more, None, theirs[1]), limit)


@pytest.mark.parametrize("pipeline", RELATIVES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_relatives_run_by_the_same_kernels(name: str, pipeline: str, tmp_path: Path) -> None:
    program = compressed(name, pipeline)
    model = emit_program(program, mode="exact")
    assert node_counts(model)["nomul::TiledLinear"] >= 8 and not detours_of(model)
    reference, runtime = ReferenceRuntime(program), opened(program, tmp_path, "exact")
    for batch, seq in ((1, 1), (3, 17)):
        ids = ids_for(batch, seq)
        check(runtime.forward(ids), reference.forward(ids), LIMITS["exact"])


@pytest.mark.parametrize("pipeline", ["rtn3", "shiftadd"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_mode_exact_is_as_close_to_float64_as_the_reference_is(name: str, pipeline: str, tmp_path: Path) -> None:
    program = compressed(name, pipeline)
    reference, runtime = ReferenceRuntime(program), opened(program, tmp_path, "exact")
    double = program.module(decode=True).double()
    for batch, seq in ((1, 1), (1, 7), (3, 17)):
        ids = ids_for(batch, seq)
        inputs = [t.double() if t.is_floating_point() else t for t in reference.interface.bind(ids, None, None)]
        with torch.no_grad():
            true = double(*inputs)[:1]
        theirs, ours = (relative_error(r.forward(ids)[:1], true) for r in (reference, runtime))
        assert ours <= max(1e-6, 1.6 * theirs)


@pytest.mark.parametrize("pipeline", WITHOUT_KERNEL)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_codes_without_a_kernel_run_by_standard_operators(name: str, pipeline: str, tmp_path: Path) -> None:
    program, reason = compressed(name, pipeline), WITHOUT_KERNEL[pipeline][1]
    model = emit_program(program)
    counts, detours = node_counts(model), detours_of(model)
    assert "nomul::TiledLinear" not in counts and counts["nomul::CodedLinear"] == len(detours) >= 8
    assert len({one.site for one in detours}) == len(detours)
    assert all(one.runs_by == "standard operators" and reason in one.reason for one in detours)
    runtime, reference = opened(program, tmp_path, "exact"), ReferenceRuntime(program)
    assert json.loads(runtime.session.get_modelmeta().custom_metadata_map["nomul.detours"])[0]["site"]
    for batch, seq in ((1, 1), (3, 17)):
        ids, more = ids_for(batch, seq), ids_for(batch, 1, seed=3)
        ours, theirs = runtime.forward(ids), reference.forward(ids)
        assert relative_error([ours[0], *ours[1]], [theirs[0], *theirs[1]]) <= LIMITS["exact"]
        ours, theirs = runtime.forward(more, None, theirs[1]), reference.forward(more, None, theirs[1])
        assert relative_error([ours[0], *ours[1]], [theirs[0], *theirs[1]]) <= LIMITS["exact"]


def test_only_sites_without_a_kernel_take_the_detour(tmp_path: Path) -> None:
    program = compressed_tiny()
    detours = OnnxRuntimeBackend().lower(program, tmp_path)
    assert len(detours) == 7 and all(".layers.0." in one.site for one in detours)
    (line,) = detour_lines(detours)
    assert line == (
        "7 sites run by standard operators: groups of 16 inputs are smaller than the 32 that a kernel takes at once"
    )
    assert node_counts(emit_program(program))["nomul::TiledLinear"] == 7
    assert OnnxRuntimeBackend().lower(compressed("llama", "rtn3"), tmp_path) == ()
