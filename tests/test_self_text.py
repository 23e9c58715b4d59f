"""Calibration that the model writes: it follows the model's own probabilities, and needs no text and no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ir.errors import UsageError
from ir.program import Program
from tests.hf_folder import write_folder
from tests.test_ast import logits
from tools.compile import main
from tools.entry import run
from tools.self_text import self_data

pytestmark = pytest.mark.usefixtures("own_cache")


def test_it_follows_the_model(tiny_model: Program) -> None:
    data = self_data(tiny_model, 40, 24, 0)
    ids = torch.cat(data.calibration)
    assert ids.shape == (40, 24) and data.held_out.shape == (8, 24) and data.counted is None
    likeliest = logits(tiny_model, ids)[:, :-1].argmax(-1)
    assert torch.equal(ids[:, 1:5], likeliest[:, :4])
    assert not torch.equal(ids[:, 5:], likeliest[:, 4:])
    assert len(ids[:, 0].unique()) > 10
    # Drawn tokens are more likely than tokens drawn from all alike.
    given = logits(tiny_model, ids)[:, 4:-1].log_softmax(-1)
    own = given.gather(-1, ids[:, 5:, None]).mean()
    assert float(own) > float(given.mean())


def test_seeds_write_their_own(tiny_model: Program) -> None:
    one, same, other = (self_data(tiny_model, 3, 12, seed) for seed in (1, 1, 2))
    assert one.digest == same.digest != other.digest
    assert torch.equal(one.held_out, same.held_out) and not torch.equal(one.held_out, other.held_out)
    assert not any(torch.equal(row, held) for row in one.calibration[0] for held in one.held_out)


def test_a_model_without_finite_logits_is_named(tiny_model: Program) -> None:
    program = tiny_model.clone()
    (name, *_) = (n for n in program.params if "embed" in n)
    program.params.put(name, torch.full_like(program.params.get(name), torch.nan), "t")
    with pytest.raises(UsageError, match="no finite logits"):
        self_data(program, 1, 8, 0)


def test_compile_needs_no_tokenizer_for_it(tmp_path: Path) -> None:
    model = write_folder(tmp_path / "model")
    for path in [*model.glob("tokenizer*"), *model.glob("vocab*"), *model.glob("special*")]:
        path.unlink()
    command = [str(model), "--passes", "gptq{bits=4 group=16}", "--samples", "3", "--seqlen", "16", "--out"]
    assert run(main, [*command, str(tmp_path / "out"), "--calib", "self"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["settings"]["calib"] == "self" and report["quality"]["tokens"] > 0
    assert run(main, [*command, str(tmp_path / "other")]) != 0
