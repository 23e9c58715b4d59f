"""Weights of 16-bit floats in ONNX files: half the bytes, the same values, with the library and without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from backends.onnxruntime import OnnxRuntime, SessionOptions
from backends.onnxruntime.lowering import emit_program, node_counts, write_model
from backends.onnxruntime.narrow import codes_of, consists_of_codes, scales_of
from backends.onnxruntime.session import library_for
from backends.reference.runtime import ReferenceRuntime
from frontend.canonical import canonicalise
from frontend.hf import trace
from ir.params import Entry, MemorySource
from ir.program import Program
from tests.architectures import ids_for
from tests.architectures import relative_error as outputs_error
from tools.site_kernels import site_kernels

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def traced() -> Program:
    """Return a model of one layer whose table and three linears are large enough for a kernel."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 1200, "hidden_size": 64, "intermediate_size": 1100, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    program = trace(LlamaConfig(**sizes, **heads), "wide")
    canonicalise(program)
    return program


def model_of(weights: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    """Return it with seeded random weights, changed by a function."""
    program, generator = traced().clone(), torch.Generator().manual_seed(0)
    for name in sorted({str(n.target) for n in program.param_nodes()}):
        kind = program.params.type_of(name)
        if name.endswith(".weight"):
            noise = torch.randn([int(d) for d in kind.dims], generator=generator)
            tensor = 1 + 0.1 * noise if len(kind.dims) == 1 else weights(0.1 * noise)
            program.params.enter(name, Entry(MemorySource({name: tensor}), name, kind))
    return program


def rounded(dtype: torch.dtype) -> Program:
    """Return it with weights rounded to 16-bit floats and held as float32."""
    return model_of(lambda weight: weight.to(dtype).float())


def check(program: Program, folder: Path) -> None:
    """Hold the file in a folder to the reference, with the library and by its twins."""
    library, reference = library_for(folder), ReferenceRuntime(program)
    assert library is not None
    for chosen in (library, None):
        runtime = OnnxRuntime(program, folder, options=SessionOptions(threads=1, library=chosen))
        for ids in (ids_for(1, 1), ids_for(3, 17)):
            ours, theirs = runtime.forward(ids), reference.forward(ids)
            assert outputs_error([ours[0], *ours[1]], [theirs[0], *theirs[1]]) <= 2e-6


@pytest.mark.parametrize("name", DTYPES)
def test_weights_that_fit_are_stored_narrow_and_give_the_same(name: str, tmp_path: Path) -> None:
    program = rounded(DTYPES[name])
    model = emit_program(program, mode="exact")
    stored = [i for i in model.graph.initializers if i.endswith(f".{name}")]
    assert len(stored) == 4 and node_counts(model)["nomul::DenseLinear"] == 4  # the tied table serves twice
    write_model(model, tmp_path)
    assert {one.kernel for one in site_kernels(tmp_path)} >= {f"nomul, {name} as stored"}
    check(program, tmp_path)


def coded(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight rounded to 8-bit codes with a float16 scale for 32 inputs, one block being zero."""
    blocks = weight.unflatten(-1, (-1, 32)).clone()
    blocks[0, 0] = 0
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    codes = torch.where(scales > 0, blocks / scales, 0.0).round().clamp(-127, 127)
    # The largest of a block is 127 also where rounding the scale would make it 126.
    largest = blocks.abs() == blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(largest & (scales > 0), 127 * blocks.sign(), codes)
    return (codes * scales).flatten(-2)


def test_weights_of_8_bit_codes_are_stored_as_these_and_give_the_same(tmp_path: Path) -> None:
    program = model_of(lambda w: coded(w) if w.shape[-1] % 32 == 0 else w)
    model = emit_program(program, mode="exact")
    assert sorted(i.rsplit(".", 1)[1] for i in model.graph.initializers if i.endswith((".codes", ".scales"))) == [
        *("codes",) * 3, *("scales",) * 3
    ]  # fmt: skip
    assert node_counts(model)["nomul::DenseLinear"] == 3
    write_model(model, tmp_path)
    check(program, tmp_path)


def test_codes_are_found_only_where_every_value_is_one() -> None:
    weight = coded(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)))
    assert consists_of_codes(weight)
    assert torch.equal(codes_of(weight).float() * scales_of(weight).repeat_interleave(32, 1), weight)
    for at, value in ((5, 7), 1.0001), ((39, 95), -(2.0**-20)):
        changed = weight.clone()
        changed[at] += value
        assert not consists_of_codes(changed)
    assert not consists_of_codes(weight[:, :80].contiguous()) and not consists_of_codes(weight * (1 + 2**-20))


def test_weights_that_do_not_fit_stay_as_they_are() -> None:
    program = model_of(lambda weight: weight)
    assert "nomul::DenseLinear" not in node_counts(emit_program(program))


def test_one_value_that_does_not_fit_keeps_a_weight_wide() -> None:
    def almost(weight: torch.Tensor) -> torch.Tensor:
        found = weight.bfloat16().float()
        found.view(-1)[-1] = 1 + 2**-20
        return found

    assert "nomul::DenseLinear" not in node_counts(emit_program(model_of(almost)))


def test_narrow_can_be_left_out() -> None:
    program = rounded(torch.bfloat16)
    assert "nomul::DenseLinear" not in node_counts(emit_program(program, narrow=False))
    # Without fused operators only the look-up of embeddings reads 16-bit floats.
    assert not any(op.startswith("nomul") for op in node_counts(emit_program(program, fuse=False)))
