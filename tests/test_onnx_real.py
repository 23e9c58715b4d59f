"""Real models as exporters write them: the numbers of ONNX Runtime, all blocks, exact folds, the original's codes."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from frontend.open import Model, open_model
from frontend.tokenizer import load_tokenizer
from ir.analysis import blocks, linear_sites
from ir.decode import codes_of
from ir.execute import empty_inputs, next_inputs
from ir.program import Program
from passes.base import Context
from passes.equiv.discover import discover
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse, schedule
from tests.genai_models import build, computed
from tests.onnx_exports import export_causal, export_minilm, smollm2, smollm2_folder

pytestmark = [pytest.mark.real, pytest.mark.slow]

TEXT = "The assembler turns a program into the numbers that a machine runs, one line after another."
SHIFTADD = "fold,shiftadd{basis=plain bits=3 starts=1 rounds=2 iterations=1 polish=0 sweeps=0}"
OMNIQUANT = "omniquant{bits=4 epochs=1}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """SmolLM2 through the builder."""
    folder = tmp_path_factory.mktemp("whole")
    path = build(smollm2_folder(folder / "hf"), folder / "onnx")
    return path, open_model(str(path))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The first two layers of SmolLM2: the original, through the builder, through torch's exporter."""
    folder = tmp_path_factory.mktemp("short")
    source = smollm2_folder(folder / "hf", 2)
    exported = export_causal(smollm2(open_model("smollm2-135m"), 2), folder / "exported.onnx")
    paths = {"original": source, "built": build(source, folder / "onnx"), "exported": exported}
    return {name: open_model(str(path)) for name, path in paths.items()}


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    path = export_minilm(tmp_path_factory.mktemp("minilm"))
    return path, open_model(str(path))


def run(program: Program, pipeline: str, calibration: list[Tensor]) -> Program:
    clone = program.clone()
    scheduled, _ = schedule(parse(pipeline))
    run_pipeline(clone, scheduled, Context(calibration=calibration), Settings())
    return clone


@cache
def tokens(model: str) -> Tensor:
    return torch.tensor([load_tokenizer(open_model(model).path)(TEXT)["input_ids"]])


def test_the_builders_model_computes_what_the_runtime_does(whole: tuple[Path, Model]) -> None:
    """First a prompt, then a token on the cache that the runtime gave."""
    path, model = whole
    program = model.program
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    module, ids = program.module(), tokens("smollm2-135m")
    given = list(empty_inputs(program, ids[:, :-1]).values())
    expected = computed(session, given)
    with torch.no_grad():
        found = module(*given)
    _compare(found, expected)
    given = list(next_inputs(program, ids[:, -1:], expected).values())
    with torch.no_grad():
        _compare(module(*given), computed(session, given))


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_all_blocks_and_groups_are_found(whole: tuple[Path, Model]) -> None:
    program = whole[1].program
    found = blocks(program)
    assert len(found) == 30 and len({len(b.nodes) for b in found}) == 1
    assert sum(len(linear_sites(program, b.nodes)[0]) for b in found) == 30 * 7
    kinds = Counter(g.kind for g in discover(program).groups)
    assert kinds == {"norm->linears": 60, "q<->k": 30, "v->o": 30, "up->down": 30}


def test_fold_is_exact(whole: tuple[Path, Model]) -> None:
    """In float64, before and after, on real text."""
    program, ids = whole[1].program, tokens("smollm2-135m")
    folded = run(program, "fold", [])
    values = list(empty_inputs(program, ids, torch.float64).values())
    with torch.no_grad():
        before, after = (_wide(p).module()(*values)[0] for p in (program, folded))
    assert float((before - after).norm() / before.norm()) < 1e-6


def _wide(program: Program) -> Program:
    from ir.execute import with_positions_in

    clone = with_positions_in(program, torch.float64)
    for name in clone.params:
        if clone.params.type_of(name).dtype == torch.float32:
            clone.params.put(name, clone.params.get(name).double(), "test")
    return clone


@pytest.mark.parametrize("name", ["built", "exported"])
@pytest.mark.parametrize(("pipeline", "equal"), [(SHIFTADD, 0.9999), (OMNIQUANT, 0.99)], ids=["shiftadd", "omniquant"])
def test_codes_are_those_of_the_original(short: dict[str, Model], name: str, pipeline: str, equal: float) -> None:
    """The share of decoded weights that are the same: what runs in another order rounds activations otherwise."""
    ids = tokens("smollm2-135m").repeat(2, 8)
    original, ours = (run(short[n].program, pipeline, [ids]) for n in ("original", name))
    a, b = _decoded(original), _decoded(ours)
    assert len(a) == len(b) == 2
    total = sum(w.numel() for layer in a for w in layer)
    same = sum(int((x == y).sum()) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))
    assert same / total >= equal


def _decoded(program: Program) -> list[list[Tensor]]:
    """Return by layer the decoded weights of its linears."""
    found = []
    for block in blocks(program):
        coded = [n for n in block.nodes if "nomul" in str(n.target) and "_linear" in str(n.target)]
        found.append([codes_of(n, program.params.get).dequantize(torch.float64) for n in coded])
    return found


def test_the_sentence_encoder_computes_what_the_runtime_does(minilm: tuple[Path, Model]) -> None:
    path, model = minilm
    given = load_tokenizer(path.parent)([TEXT, "Short."], padding=True, return_tensors="pt")
    names = ("input_ids", "attention_mask", "token_type_ids")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {n: given[n].numpy() for n in names})[0])
    with torch.no_grad():
        found = model.program.module()(*(given[n] for n in names))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_all_blocks_of_the_sentence_encoder_are_found(minilm: tuple[Path, Model]) -> None:
    program = minilm[1].program
    found = blocks(program)
    assert len(found) == 6 and sum(len(linear_sites(program, b.nodes)[0]) for b in found) == 36
    assert Counter(g.kind for g in discover(program).groups) == {"q<->k": 6, "v->o": 6}


@pytest.mark.parametrize(("pipeline", "equal"), [(SHIFTADD, 0.9999), (OMNIQUANT, 0.99)], ids=["shiftadd", "omniquant"])
def test_codes_of_the_sentence_encoder_are_those_of_the_original(
    minilm: tuple[Path, Model], pipeline: str, equal: float
) -> None:
    ids = torch.tensor([load_tokenizer(minilm[0].parent)(TEXT)["input_ids"]]).repeat(2, 4)
    original, ours = (run(m.program, pipeline, [ids]) for m in (open_model("all-minilm-l6-v2"), minilm[1]))
    pairs = [(x, y) for a, b in zip(_decoded(original), _decoded(ours), strict=True) for x, y in zip(a, b, strict=True)]
    same = sum(int((x == y).sum()) for x, y in pairs)
    assert same / sum(x.numel() for x, _ in pairs) >= equal
