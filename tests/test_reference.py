"""The reference backend: every way of running agrees, the cache is exact, and inputs that do not fit are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backends import backend_names, load_backend
from backends.reference import BACKEND
from backends.reference.execute import MODES, executable
from backends.reference.runtime import ReferenceRuntime
from ir.errors import UnsupportedError, UsageError
from ir.ops.shiftadd import shiftadd_by_shifts
from ir.program import Program
from ir.text import dump
from ir.types import TensorType
from tests.programs import Sketch, hidden, odd_program, tiny_mlp_program
from tests.tiny_model import (
    GROUP,
    TERMS,
    VOCAB,
    compressed_tiny,
    plane_codes,
    tiny_config,
    tiny_program,
    write_artifact,
)
from tools.load import load

aten, nomul = torch.ops.aten, torch.ops.nomul


@pytest.fixture(scope="module")
def program() -> Program:
    return compressed_tiny()


def ids(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def test_float_program_gives_the_logits_of_transformers() -> None:
    from transformers import LlamaForCausalLM

    program = tiny_program()
    model = LlamaForCausalLM(tiny_config()).eval()
    weights = {n: program.params.get(n) for n, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    logits, past = ReferenceRuntime(program).forward(ids(2, 7))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids(2, 7)).logits, rtol=1e-4, atol=1e-5)
    assert [tuple(p.shape) for p in past] == [(2, 2, 7, 8)] * 4


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_gives_the_same_logits_and_leaves_the_program_alone(program: Program, mode: str) -> None:
    before, version = dump(program), program.version
    want = program.module()(ids(2, 6), torch.ones(2, 6, dtype=torch.long), *[torch.zeros(2, 2, 0, 8)] * 4)[0]
    logits, _ = ReferenceRuntime(program, mode=mode).forward(ids(2, 6))
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert dump(program) == before and program.version == version


def test_multiply_mode_calls_float_linears_only_and_forgets_the_codes(program: Program) -> None:
    module = executable(program, "multiply")
    targets = {str(n.target) for n in module.graph.nodes}
    assert not [t for t in targets if "shiftadd" in t or "quant" in t]
    assert not [name for name, _ in module.named_buffers() if "signs" in name or "codes" in name]


def single_site(codes: int = 8) -> Program:
    """A shift-add linear in float64 from [batch, seq, 32] to [batch, seq, codes]."""
    s = Sketch(3)
    c = plane_codes(s.random(codes, 2 * GROUP))
    assert c.offsets is not None
    tensors = {"signs": c.signs, "scales": c.scales, "exponents": c.exponents, "offsets": c.offsets}
    params = [s.param(f"q.{key}", tensor) for key, tensor in tensors.items()]
    x = s.input("x", hidden(2 * GROUP, dtype=torch.float64))
    kind = TensorType(torch.float64, ("batch", "seq", codes))
    out = s.call(nomul.shiftadd_linear.default, x, *params, None, GROUP, TERMS, type=kind, path="q")
    return s.program(out, level="compressed")


def test_shifts_equal_multiplies_bit_for_bit_on_integers_in_float64() -> None:
    program = single_site()
    x = torch.randint(-128, 128, (2, 5, 2 * GROUP), dtype=torch.float64)
    results = [executable(program, mode)(x)[0] for mode in ("multiply", "shift", "codes")]
    assert results[0].dtype == torch.float64
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_shift_evaluation_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    c = plane_codes(torch.randn(8, 2 * GROUP))
    arguments = (c.signs, c.scales, c.exponents, c.offsets, torch.randn(8), GROUP, TERMS)
    x = torch.randn(3, 5, 2 * GROUP)
    whole = shiftadd_by_shifts(x, *arguments)
    monkeypatch.setattr("ir.ops.shiftadd._SHIFTED_AT_ONCE", 8 * 2 * 4)
    pieces = shiftadd_by_shifts(x, *arguments)
    assert pieces.shape == (3, 5, 8)
    torch.testing.assert_close(pieces, whole)


def test_cached_decoding_equals_the_full_forward(program: Program) -> None:
    runtime, tokens = ReferenceRuntime(program), ids(2, 9)
    full, _ = runtime.forward(tokens)
    logits, past = runtime.forward(tokens[:, :4])
    parts = [logits]
    for t in range(4, 9):
        logits, past = runtime.forward(tokens[:, t : t + 1], None, past)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
    assert past[0].shape[2] == 9


def test_left_padding_gives_the_logits_without_it(program: Program) -> None:
    runtime, long, short = ReferenceRuntime(program), ids(1, 8), ids(1, 5, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    logits, past = runtime.forward(batch, mask)
    torch.testing.assert_close(logits[0], runtime.forward(long)[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 3:], runtime.forward(short)[0][0], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(logits).all()
    step, _ = runtime.forward(ids(2, 1), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1), past)
    alone, _ = runtime.forward(torch.cat([short, ids(2, 1)[1:]], 1))
    torch.testing.assert_close(step[1, -1], alone[0, -1], rtol=1e-4, atol=1e-4)


def test_left_padding_is_refused_where_positions_count_it() -> None:
    s = Sketch()
    words, places = s.param("wte", s.random(40, 8)), s.param("wpe", s.random(16, 8))
    tokens, mask = s.input("input_ids", hidden(dtype=torch.int64)), s.input("attention_mask", hidden(dtype=torch.int64))
    size = s.call(aten.sym_size.int, tokens, 1, type=hidden())
    positions = s.call(aten.arange.default, size, type=TensorType(torch.int64, ("seq",)))
    a = s.call(aten.embedding.default, words, tokens, type=hidden(8))
    b = s.call(aten.embedding.default, places, positions, type=TensorType(torch.float32, ("seq", 8)))
    runtime = ReferenceRuntime(s.program(s.call(aten.add.Tensor, a, b, type=hidden(8)), s.call(aten.neg, mask, type=1)))
    assert runtime.interface.counts_padding
    right, left = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]])
    runtime.forward(torch.tensor([[3, 4, 0]]), right)
    with pytest.raises(UnsupportedError, match="padding on the left"):
        runtime.forward(torch.tensor([[0, 3, 4]]), left)


def test_positions_that_come_from_the_values_do_not_count_padding(program: Program) -> None:
    assert not ReferenceRuntime(program).interface.counts_padding


def test_inputs_that_do_not_fit_are_refused(program: Program) -> None:
    runtime = ReferenceRuntime(program)
    past = runtime.interface.empty_cache(1)
    wrong = [
        ((torch.tensor([3, 4]), None, None), "input_ids"),
        ((torch.tensor([[0.5]]), None, None), "input_ids"),
        ((torch.empty(1, 0, dtype=torch.long), None, None), "input_ids"),
        ((torch.tensor([[VOCAB]]), None, None), "vocabulary"),
        ((torch.tensor([[-1]]), None, None), "vocabulary"),
        ((ids(2, 3), torch.ones(2, 4), None), "attention_mask"),
        ((ids(1, 3), None, past[:-1]), "past"),
        ((ids(2, 3), None, past), "past"),
        ((ids(1, 3), None, [torch.zeros(1, 2, 1, 8), *past[1:]]), "past"),
        ((ids(1, 3), None, [p.double() for p in past]), "past"),
    ]
    for (tokens, mask, cache), message in wrong:
        with pytest.raises(UsageError, match=message):
            runtime.forward(tokens, mask, cache)


def test_a_program_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no language model"):
        ReferenceRuntime(odd_program())


def test_an_unknown_mode_is_refused(program: Program) -> None:
    with pytest.raises(UsageError, match="multiply"):
        ReferenceRuntime(program, mode="divide")


def test_a_program_without_cache_runs() -> None:
    runtime = ReferenceRuntime(tiny_mlp_program())
    logits, past = runtime.forward(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 40) and past == [] and not runtime.interface.cached


def test_artifacts_load_with_their_tokenizer(tmp_path: Path, program: Program) -> None:
    folder = write_artifact(tmp_path / "a", program)
    runtime = BACKEND.load(folder)
    assert runtime.tokenizer("w5 w9")["input_ids"] == [5, 9]
    assert runtime.end_tokens == {1}
    again = load(folder, mode="codes")
    torch.testing.assert_close(runtime.forward(ids(1, 4))[0], again.forward(ids(1, 4))[0], rtol=1e-4, atol=1e-4)
    assert again.tokenizer("w5 w9")["input_ids"] == [5, 9]


def test_a_missing_or_damaged_tokenizer_is_unsupported(tmp_path: Path, program: Program) -> None:
    bare = BACKEND.load(write_artifact(tmp_path / "a", program, tokenizer=False))
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        _ = bare.tokenizer
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        _ = ReferenceRuntime(program).tokenizer
    damaged = write_artifact(tmp_path / "b", program)
    (damaged / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        _ = BACKEND.load(damaged).tokenizer


def test_backends_are_known_by_name(tmp_path: Path, program: Program) -> None:
    assert backend_names()[0] == "reference" and load_backend("reference") is BACKEND
    with pytest.raises(UsageError, match="did you mean `reference`"):
        load_backend("referense")
    BACKEND.lower(program, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_run_is_refused_with_its_reason() -> None:
    s = Sketch()
    x = s.input("input_ids", hidden(8))
    program = s.program(s.call(aten.dropout.default, x, 0.5, True, type=hidden(8)))
    with pytest.raises(UnsupportedError, match=r"reference cannot run.*\n.*\n.*aten.dropout"):
        BACKEND.require(program)
