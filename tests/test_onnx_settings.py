"""Settings of the ONNX Runtime backend: modes, uniform codes by `MatMulNBits`, and what commands and files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.onnxruntime import OnnxRuntime, OnnxRuntimeBackend, SessionOptions, session
from backends.onnxruntime.contrib import refuses_contrib
from backends.onnxruntime.lowering import MODEL_FILE, detours_of, emit_program, node_counts, write_model
from backends.onnxruntime.session import library_for
from backends.reference.runtime import ReferenceRuntime
from ir.errors import UnsupportedError, UsageError
from ir.ops.quant import QuantCodes
from ir.program import Program
from ir.text import op_name
from ir.types import TensorType
from passes.pipeline import parse, schedule
from tests.architectures import ids_for
from tests.architectures import relative_error as outputs_error
from tests.coded_weights import exact_product, quant_codes, relative_error, shift_codes
from tests.onnx_runs import function_program, sample, session_outputs
from tests.pipeline_runs import LONG
from tests.pipeline_runs import run as pipelined
from tests.test_onnx_compressed import compressed
from tools import compile
from tools.build import plan
from tools.entry import run
from tools.options import BuildOptions

# Pipelines after which a program calls what ONNX Runtime has no form of, and that.
LACKING = {
    "act": "nomul.encode_tokens",
    "kv{bits=4}": "nomul.encode_tokens",
    "omniquant{preset=w8a8 epochs=1}": "nomul.encode_tokens",
    "sparse": "nomul.sparse_linear",
    "gptq{bits=4 group=32 pattern=2:4}": "nomul.sparse_linear",
    "ast": "nomul.sparse_linear",
    "sparse,shiftadd{bits=2 group=32}": "nomul.sparse_linear",
}
FITTING = ["fold,rotate,rtn{bits=4 group=32}", "ast{pattern=none}", "omniquant{preset=w4a16g64 group=32 epochs=1}"]

quant_linear = torch.ops.nomul.quant_linear.default
CONTRIB = "com.microsoft::MatMulNBits"
# Level 4 rounds activations to 8 bits.
LIMITS = {0: 1e-5, 4: 2e-2}


def linear_program(codes: QuantCodes, bias: torch.Tensor | None) -> Program:
    """Return a program of one uniform linear over activations [batch, seq, inputs], with zeros and bias or none."""
    shape = codes.bits, codes.group
    params, function = {"codes": codes.codes, "scales": codes.scales}, _symmetric(shape)
    if codes.zeros is not None and bias is not None:
        params, function = params | {"zeros": codes.zeros, "bias": bias}, _shifted(shape)
    kinds = {"x": TensorType(torch.float32, ("batch", "seq", codes.in_features))}
    return function_program(function, kinds, params)


def _symmetric(shape: tuple[int, int]) -> Callable[..., Any]:
    return lambda x, codes, scales: quant_linear(x, codes, scales, None, None, *shape)


def _shifted(shape: tuple[int, int]) -> Callable[..., Any]:
    return lambda x, codes, scales, zeros, bias: quant_linear(x, codes, scales, zeros, bias, *shape)


@pytest.mark.parametrize("level", LIMITS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("inputs", "group"), [(192, 64), (200, 64), (144, 16), (90, 32), (300, 128), (40, 64)])
def test_uniform_codes_by_the_runtimes_operator(
    inputs: int, group: int, bits: int, zeros: bool, level: int, tmp_path: Path
) -> None:
    codes = quant_codes(70, inputs, bits, group, zeros, seed=bits)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(1)) * 0.1 if zeros else None
    program = linear_program(codes, bias)
    model = emit_program(program, uniform="contrib", accuracy_level=level)
    assert node_counts(model) == {CONTRIB: 1} and detours_of(model) == ()
    write_model(model, tmp_path)
    for sizes in ((1, 1, 0), (2, 20, 0)):
        x = sample(TensorType(torch.float32, ("batch", "seq", inputs)), 3, sizes)
        found = session_outputs(program, [x], tmp_path)[0]
        assert relative_error(found, exact_product(x, codes.dequantize(torch.float64), bias)) <= LIMITS[level]


@pytest.mark.parametrize(
    ("bits", "group", "reason"),
    [
        (3, 64, "takes 2, 4 or 8 bits, and these are 3"),
        (4, 8, "groups of a power of two from 16 on, and these are of 8 inputs"),
        (8, 48, "groups of a power of two from 16 on, and these are of 48 inputs"),
        (2, 512, "2 bits in groups of at most 256, and these are of 512"),
    ],
)
def test_what_it_does_not_take_stays_with_our_kernel_and_is_told(bits: int, group: int, reason: str) -> None:
    codes = quant_codes(40, 600, bits, group, True, seed=1)
    no = refuses_contrib(codes)
    assert no is not None and reason in no.reason
    model = emit_program(linear_program(codes, torch.zeros(40)), uniform="contrib")
    assert node_counts(model) == {"nomul::TiledLinear": 1}
    (detour,) = detours_of(model)
    assert detour.runs_by == "the kernel of nomul" and reason in detour.reason


@pytest.mark.parametrize("mode", ["exact", "14bit"])
def test_a_model_gives_what_the_reference_gives(mode: str, tmp_path: Path) -> None:
    program = compressed("llama", "rtn8")
    model = emit_program(program, mode=mode, uniform="contrib")
    assert node_counts(model)[CONTRIB] == 14
    levels = {n.attributes["accuracy_level"].value for n in model.graph if n.op_type == "MatMulNBits"}
    assert levels == {0 if mode == "exact" else 4}
    assert model.metadata_props["nomul.accuracy_level"] == str(*levels)
    write_model(model, tmp_path)
    runtime = OnnxRuntime(program, tmp_path, options=SessionOptions(threads=1, library=library_for(tmp_path)))
    reference = ReferenceRuntime(program)
    for ids in (ids_for(1, 1), ids_for(3, 17)):
        ours, theirs = runtime.forward(ids), reference.forward(ids)
        limit = 1e-5 if mode == "exact" else 0.1
        assert outputs_error([ours[0], *ours[1]], [theirs[0], *theirs[1]]) <= limit


def test_a_program_without_kernels_asks_for_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session, "built_library", lambda: tmp_path)
    small, large = (shift_codes(40, 64, 2, group, 2, True, seed=1, spread=2) for group in (8, 32))
    found = []
    for codes in (small, large):
        function = _planes(codes.group, codes.terms)
        program = function_program(function, {"x": TensorType(torch.float32, ("batch", "seq", 64))}, codes.tensors())
        write_model(model := emit_program(program), tmp_path)
        found.append(library_for(tmp_path))
        assert ("nomul::TiledLinear" in node_counts(model)) == (found[-1] is not None)
    assert found == [None, tmp_path]


def _planes(group: int, terms: int) -> Callable[..., Any]:
    op = torch.ops.nomul.shiftadd_linear.default
    return lambda x, signs, scales, exponents, offsets: op(x, signs, scales, exponents, offsets, None, group, terms)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "9bit"}, "kernel mode 9bit"),
        ({"uniform": "other"}, "uniform codes other"),
        ({"uniform": "contrib", "accuracy_level": 5}, "accuracy level 5"),
        ({"accuracy_level": 4}, "only MatMulNBits"),
    ],
)
def test_settings_that_there_are_not_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        OnnxRuntimeBackend(**settings)


def test_the_accuracy_level_fits_the_mode() -> None:
    found = [OnnxRuntimeBackend(mode=mode, uniform="contrib").settings() for mode in ("exact", "14bit")]
    assert [one["accuracy_level"] for one in found] == [0, 4]
    assert OnnxRuntimeBackend().settings()["accuracy_level"] is None


def _compile(model: Path, out: Path, passes: str, *options: str) -> int:
    command = [str(model), "--passes", passes, "--out", str(out), "--seqlen", "16", "--no-gate"]
    return run(compile.main, [*command, *options])


@pytest.mark.usefixtures("own_cache", "quick_builtin")
def test_an_artifact_records_its_settings_and_detours(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out", ("--target", "onnxruntime", "--uniform", "contrib", "--kernel-mode", "exact")
    assert _compile(tiny_hf, out, "rtn{bits=3 group=16}", *options) == 0
    line = "14 sites run by the kernel of nomul: MatMulNBits takes 2, 4 or 8 bits, and these are 3"
    assert line in capsys.readouterr().out
    manifest, report = (json.loads((out / name).read_text()) for name in ("manifest.json", "report.json"))
    assert manifest["target_settings"] == {
        "opset": 23, "fuse": True, "mode": "exact", "uniform": "contrib", "accuracy_level": 0, "narrow": True
    }  # fmt: skip
    assert line in report["notes"] and len(report["detours"]) == 14
    assert set(report["detours"][0]) == {"site", "runs_by", "reason"}
    assert line in (out / "report.html").read_text()
    import onnx

    found = {p.key: p.value for p in onnx.load(out / MODEL_FILE, load_external_data=False).metadata_props}
    assert found["nomul.mode"] == "exact" and json.loads(found["nomul.detours"]) == report["detours"]


@pytest.mark.usefixtures("own_cache", "quick_builtin")
def test_strict_refuses_detours_and_writes_nothing(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = "shiftadd{bits=2 group=16 mode=lat calib=none rounds=1 starts=1 skip=[lm_head]}"
    assert _compile(tiny_hf, tmp_path / "out", passes, "--target", "onnxruntime", "--strict") == 3
    assert "14 sites run by standard operators: groups of 8 inputs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("option", [("--kernel-mode", "exact"), ("--uniform", "contrib"), ("--accuracy-level", "0")])
def test_settings_of_another_target_are_refused(
    option: tuple[str, str], tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _compile(tiny_hf, tmp_path / "out", "fold", *option) == 2
    assert f"target reference has no {option[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("passes", LACKING)
def test_a_pipeline_that_ends_in_what_the_target_lacks_is_refused_before_a_model_is_opened(
    passes: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=f"onnxruntime lacks .*{LACKING[passes]}") as refused:
        plan(BuildOptions("no-such-model", passes, tmp_path / "out", target="onnxruntime"))
    assert refused.value.where == f"pass {passes.partition(',')[0].partition('{')[0]}"
    assert plan(BuildOptions("no-such-model", passes, tmp_path / "out")).pipeline


@pytest.mark.parametrize("passes", [*LACKING, *FITTING])
def test_programs_call_what_their_pipelines_said(passes: str, tiny_model: Program) -> None:
    pipeline, _ = schedule(parse(passes))
    said = frozenset[str]().union(*(pass_.inserts() for pass_ in pipeline.passes()))
    program, _ = pipelined(tiny_model, passes, LONG)
    called = {op_name(n.target) for n in program.graph.nodes if n.op == "call_function"}
    lacking = {n for n in called if not OnnxRuntimeBackend.level.allows(n)}
    assert bool(lacking) == bool(said) == (passes in LACKING)
    assert said <= lacking or lacking == {"nomul.sparse_shiftadd_linear"}
