"""`act` and `kv`: linears and caches read codes, a cache is stored in rows of bytes, and decoding goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.reference.runtime import ReferenceRuntime
from ir.decode import is_coded
from ir.errors import UnsupportedError
from ir.execute import empty_inputs, next_inputs
from ir.ops.tokens import row_bytes
from ir.parse import parse as parse_ir
from ir.program import Program, is_call
from ir.text import dump
from ir.verify import verify
from passes.act import Act
from passes.base import Context, Log, OptionError
from passes.kv import Kv
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from tests.architectures import doubled, ids_for, relative_error, traced
from tests.golden import check_golden
from tests.tiny_model import compressed_tiny, tiny_program
from tests.watch import values

aten, nomul = torch.ops.aten, torch.ops.nomul
NAMES = ["llama", "qwen3", "gpt2", "opt", "gemma2", "mixtral", "bloom"]


def run(program: Program, pipeline: str) -> tuple[Program, Log]:
    """A copy of a program after a pipeline, and what was said."""
    program, log = program.clone(), Log()
    run_pipeline(program, parse(pipeline), Context(log=log), Settings(verify="full"))
    return program, log


def logits(program: Program, ids: Tensor) -> list[Tensor]:
    """The logits of a prefill and of a cached continuation."""
    with torch.no_grad():
        first = program.module()(*empty_inputs(program, ids[:, :-2]).values())
        then = program.module()(*next_inputs(program, ids[:, -2:], first).values())
    return [first[0], then[0]]


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_stay_near_and_fewer_do_not(name: str) -> None:
    program, ids = traced(name, 2)[0], ids_for()
    wanted = logits(program, ids)
    errors = [
        relative_error(logits(run(program, f"act{{bits={b}}},kv{{bits={b}}}")[0], ids), wanted) for b in (8, 4, 2)
    ]
    assert 0 < errors[0] < 0.12 and 2 * errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_cached_continuation_is_the_whole_run(name: str) -> None:
    """Tokens are coded one by one, so that it makes no difference when they come."""
    program, ids = run(doubled(traced(name, 2)[0]), "kv{bits=4}")[0], ids_for(2, 9)
    with torch.no_grad():
        whole = program.module()(*empty_inputs(program, ids, torch.float64).values())
        first = program.module()(*empty_inputs(program, ids[:, :5], torch.float64).values())
        then = program.module()(*next_inputs(program, ids[:, 5:], first).values())
    assert all(c.dtype == torch.uint8 for c in whole[1:])
    for a, b in zip(then[1:], whole[1:], strict=True):
        # A rounding may fall to the other side where sums are taken in another order.
        assert float((a != b).float().mean()) < 0.01
    assert relative_error([then[0]], [whole[0][:, 5:]]) < 0.05


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_cache_is_stored_in_rows_of_bytes(bits: int) -> None:
    program, ids = run(tiny_program(), f"kv{{bits={bits}}}")[0], ids_for(2, 7)
    with torch.no_grad():
        found = program.module()(*empty_inputs(program, ids).values())
    assert all(c.shape == (2, 2, 7, row_bytes(8, bits)) and c.dtype == torch.uint8 for c in found[1:])
    assert [n.name for n in program.outputs[1:]] == [n.name for n in tiny_program().outputs[1:]]
    assert dump(parse_ir(dump(program), program.params)) == dump(program)


def test_generation_goes_on_from_a_coded_cache() -> None:
    program, ids = run(compressed_tiny(), "kv{bits=8}")[0], ids_for(1, 6)
    runtime = ReferenceRuntime(program)
    first, past = runtime.forward(ids, None, None)
    assert all(p.dtype == torch.uint8 for p in past)
    again, _ = runtime.forward(ids[:, -1:], None, [p[:, :, :-1] for p in past])
    torch.testing.assert_close(again[:, -1], first[:, -1], rtol=1e-3, atol=1e-3)


def test_attention_reads_what_the_cache_holds() -> None:
    program, ids = run(tiny_program(), "kv{bits=2}")[0], ids_for(1, 5)
    seen = values(program, ids)
    for attention in program.calls(aten.scaled_dot_product_attention):
        for read, cache in zip(attention.args[1:3], program.outputs[1:], strict=False):
            assert is_call(read, nomul.decode_tokens)
            assert seen[read.args[0].name].dtype == torch.uint8 and cache.name in seen  # type: ignore[union-attr]


def test_siblings_read_the_same_codes() -> None:
    program, log = run(tiny_program(), "act")
    coded = list(program.calls(nomul.encode_tokens))
    assert len(coded) == 2 * 4
    linears = [n for n in program.calls(aten.linear) if is_call(n.args[0], nomul.decode_tokens)]
    assert len(linears) == 14 and sorted(r.site for r in log.reports) == sorted(str(n.meta["path"]) for n in linears)
    head = next(n for n in program.calls(aten.linear) if n not in linears)
    assert not is_call(head.args[0], nomul.decode_tokens)


def test_coded_linears_and_rotated_inputs_are_coded_too() -> None:
    program, _ = run(compressed_tiny(), "act{bits=8},kv")
    inside = [n for n in program.graph.nodes if is_coded(n)]
    assert len(inside) == 14 and all(is_call(n.args[0], nomul.decode_tokens) for n in inside)
    rotated, _ = run(tiny_program(), "shiftadd{bits=2 group=16 calib=none basis=rotated},act")
    read = [n.args[0].args[0].args[0] for n in rotated.graph.nodes if is_coded(n)]  # type: ignore[union-attr]
    assert any(is_call(x, nomul.hadamard) for x in read)


def test_what_is_skipped_reads_floats() -> None:
    program, log = run(tiny_program(), "act{skip=[down_proj]}")
    left = {str(n.meta["path"]) for n in program.calls(aten.linear) if not is_call(n.args[0], nomul.decode_tokens)}
    assert {f"model.layers.{k}.mlp.down_proj" for k in range(2)} < left
    assert all(d.asked for d in log.diagnostics)
    with pytest.raises(OptionError, match="matches none"):
        run(tiny_program(), "act{skip=[wrong_proj]}")


def test_experts_keep_their_inputs_and_are_named() -> None:
    _, log = run(traced("mixtral", 2)[0], "act")
    assert sum("by expert" in d.reason for d in log.diagnostics) >= 2


def test_twice_is_once_for_caches() -> None:
    once, _ = run(tiny_program(), "kv")
    twice, log = run(once, "kv")
    assert dump(twice).splitlines()[1:] == dump(once).splitlines()[1:]
    assert len(log.diagnostics) == 4


def test_plans_name_what_will_be_coded() -> None:
    program = tiny_program()
    assert len(Act(bits=4).plan(program)) == 14
    rows = Kv(bits=4).plan(program)
    assert [r.site for r in rows] == [n.name for n in program.inputs[2:]]
    assert rows[0].figures == {"cache_bits": 4.0, "stored_bits": 8 * row_bytes(8, 4) / 8}


@pytest.mark.parametrize("name", ["act", "kv"])
@pytest.mark.parametrize("bits", [1, 9])
def test_options_out_of_range(name: str, bits: int) -> None:
    with pytest.raises(OptionError, match=f"option bits of pass {name}"):
        parse(f"{name}{{bits={bits}}}")


def test_a_backend_that_cannot_says_so(tmp_path: Path) -> None:
    from backends import load_backend

    program, _ = run(compressed_tiny(), "act")
    with pytest.raises(UnsupportedError, match="encode_tokens"):
        load_backend("onnxruntime").require(program)


def test_the_text_of_a_program_with_coded_values(request: pytest.FixtureRequest) -> None:
    program, _ = run(tiny_program(), "act{bits=4},kv{bits=4}")
    verify(program)
    check_golden("act_kv.ir", dump(program), request)
