"""The kernels in eager torch: the operator, and whole models by reference, by this and by ONNX Runtime on one code."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from backends import backend_names, load_backend
from backends.native.backend import BACKEND, NativeRuntime
from backends.native.layout import pack
from backends.native.library import MODES
from backends.native.torch_ops import tiled_linear, with_kernels
from backends.onnxruntime import OnnxRuntime, SessionOptions
from backends.onnxruntime.lowering import emit_program, write_model
from backends.onnxruntime.session import library_for
from backends.reference.runtime import ReferenceRuntime
from ir.decode import is_coded
from ir.errors import UnsupportedError, UsageError
from ir.program import Program
from ir.text import dump
from tests.architectures import ids_for, relative_error
from tests.coded_weights import exact_product, quant_codes, shift_codes
from tests.hf_folder import some_text
from tests.test_onnx_compressed import PIPELINES, compressed
from tests.tiny_model import compressed_tiny, write_artifact
from tools import compile, evaluate, generate
from tools.entry import run
from tools.load import load

nomul = torch.ops.nomul
# A linear keeps within 1e-6. Of whole models in float32 the largest found was 7.6e-6, of qwen3 in ONNX Runtime, whose
# scores magnify what is rounded off.
LIMIT = 1.5e-5


def call(mode: str, tokens: int, bias: bool, codes=None) -> tuple:
    """Return arguments of the operator."""
    packed = pack(codes or shift_codes(70, 96, 3, 32, 2, True, seed=1, spread=2))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, tokens, 96, generator=generator)
    fields = list(packed.layout.attributes().values())
    return x, packed.data, torch.randn(70, generator=generator) if bias else None, fields, mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tokens", "bias"), [(1, True), (0, False), (3, False), (20, True)])
def test_the_operator_is_one_that_torch_can_trace(mode: str, tokens: int, bias: bool) -> None:
    torch.library.opcheck(nomul.tiled_linear.default, call(mode, tokens, bias))


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_the_operator_gives_the_product_on_any_number_of_threads(tokens: int) -> None:
    codes = quant_codes(3000, 96, 3, 32, True, seed=2)
    x, tiles, _, fields, mode = call("exact", tokens, False, codes)
    got, before = tiled_linear(x, tiles, None, fields, mode), torch.get_num_threads()
    assert relative_error([got], [exact_product(x, codes.dequantize(torch.float64), None)]) <= 1e-6
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(tiled_linear(x, tiles, None, fields, mode), got)
    finally:
        torch.set_num_threads(before)


def test_the_operator_is_exported_as_one_call() -> None:
    x, tiles, bias, fields, mode = call("exact", 3, True)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, tiles: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return nomul.tiled_linear(x, tiles, bias, fields, mode)

    exported = torch.export.export(Model(), (x, tiles, bias))
    targets = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert targets == [nomul.tiled_linear.default]
    assert torch.equal(exported.module()(x, tiles, bias), tiled_linear(x, tiles, bias, fields, mode))


def test_what_does_not_fit_the_operator_is_refused() -> None:
    x, tiles, bias, fields, mode = call("exact", 3, True)
    with pytest.raises(UsageError, match="activations do not fit"):
        tiled_linear(x[..., :95], tiles, bias, fields, mode)
    with pytest.raises(UsageError, match="bytes of its layout"):
        tiled_linear(x, tiles[:-1], bias, fields, mode)
    with pytest.raises(UsageError, match="there is no mode 3bit"):
        tiled_linear(x, tiles, bias, fields, "3bit")
    with pytest.raises(UnsupportedError, match="layout version 9"):
        tiled_linear(x, tiles, bias, [*fields[:-1], 9], mode)


def onnx_runtime(program: Program, folder: Path, threads: int = 1) -> OnnxRuntime:
    """Return a program in ONNX Runtime in mode exact."""
    folder.mkdir()
    write_model(emit_program(program, mode="exact"), folder)
    return OnnxRuntime(program, folder, options=SessionOptions(threads=threads, library=library_for(folder)))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_three_backends_agree_on_the_same_codes(name: str, pipeline: str, tmp_path: Path) -> None:
    program = compressed(name, pipeline)
    before = dump(program)
    reference, native = ReferenceRuntime(program), NativeRuntime(program, mode="exact")
    onnx = onnx_runtime(program, tmp_path / "onnx")
    for batch, seq in ((1, 1), (1, 7), (3, 17)):
        ids = ids_for(batch, seq)
        wanted, past = reference.forward(ids)
        for runtime in (native, onnx):
            logits, cache = runtime.forward(ids)
            assert relative_error([logits], [wanted]) <= LIMIT
            assert relative_error(cache, past) <= LIMIT
    assert dump(program) == before and any(is_coded(n) for n in program.graph.nodes)


def test_every_compressed_linear_becomes_a_kernel_and_keeps_its_name() -> None:
    program = compressed("llama", "nested")
    made = with_kernels(program)
    coded = [n.name for n in program.graph.nodes if is_coded(n)]
    assert coded and [n.name for n in made.calls(nomul.tiled_linear)] == coded
    assert not any(is_coded(n) for n in made.graph.nodes)
    assert not [name for name in made.params if name.endswith((".signs", ".scales", ".exponents", ".offsets"))]
    with pytest.raises(UsageError, match="there is no mode 1bit"):
        with_kernels(program, "1bit")


def test_runtimes_and_threads_at_the_same_time_give_the_same_bits(tmp_path: Path) -> None:
    program, ids = compressed("llama", "shiftadd"), [ids_for(2, n, seed=n) for n in (1, 5, 17)]
    native = [NativeRuntime(program, mode=mode) for mode in ("exact", "exact", "14bit")]
    onnx = [onnx_runtime(program, tmp_path / str(threads), threads) for threads in (1, 2)]
    alone = {(runtime, i): runtime.forward(x)[0] for runtime in (*native, *onnx) for i, x in enumerate(ids)}
    with ThreadPoolExecutor(8) as pool:
        runs = {(key, n): pool.submit(key[0].forward, ids[key[1]]) for n in range(4) for key in alone}
    for (key, _), result in runs.items():
        assert torch.equal(result.result()[0], alone[key]), key
    for i in range(len(ids)):
        assert torch.equal(alone[native[0], i], alone[native[1], i])
        assert torch.equal(alone[onnx[0], i], alone[onnx[1], i])
    # Few tokens are what the modes differ in at every level with tables of bytes.
    assert not torch.equal(alone[native[0], 0], alone[native[2], 0])


def test_it_is_a_target_that_generates_as_the_reference_does() -> None:
    assert "native" in backend_names() and load_backend("native") is BACKEND
    program = compressed("llama", "rtn8")
    reference, native = ReferenceRuntime(program), NativeRuntime(program, mode="exact")
    assert native.generate((5, 9, 12), 12).ids == reference.generate((5, 9, 12), 12).ids


def test_groups_without_a_kernel_are_refused(tmp_path: Path) -> None:
    program = compressed_tiny()
    for attempt in (lambda: BACKEND.lower(program, tmp_path), lambda: NativeRuntime(program)):
        with pytest.raises(UnsupportedError, match="groups of 16 inputs are smaller than the 32"):
            attempt()
    folder = write_artifact(tmp_path / "artifact", program)
    with pytest.raises(UnsupportedError, match="there is no kernel for a linear"):
        BACKEND.load(folder)


@pytest.mark.usefixtures("own_cache", "quick_builtin")
def test_the_commands_compile_evaluate_and_generate(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(some_text(), encoding="utf-8")
    command = [str(tiny_hf), "--passes", "rtn{group=32},fold", "--target", "native", "--out", str(out), "--json"]
    assert run(compile.main, [*command, "--seqlen", "16"]) == 0
    assert json.loads((out / "manifest.json").read_text())["target"] == "native"
    assert isinstance(load(out), NativeRuntime)
    capsys.readouterr()
    losses = {}
    for target in ("native", "reference"):
        options = ["--text", str(text), "--ctx", "16", "--windows", "3", "--target", target, "--json"]
        assert run(evaluate.main, [str(out), *options]) == 0
        losses[target] = json.loads(capsys.readouterr().out)["perplexity"]
    assert losses["native"] == pytest.approx(losses["reference"], rel=1e-4)
    assert run(generate.main, [str(out), "the", "-n", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) <= 4
