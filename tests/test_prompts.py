"""Prompts with responses: read from files, packed one after another, and trained on by their responses alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ir.errors import UsageError
from ir.program import Program
from passes.base import Context, Log
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from passes.training.loss import next_token_loss
from tests.pipeline_runs import LONG
from tests.test_ast import logits
from tools.calibration import token_data
from tools.text import load_pieces, load_text

PAIRS = [{"prompt": f"ask {i}? ", "response": f"say {i}." * (1 + i % 3)} for i in range(40)]


class Letters:
    """A tokenizer of letters, with an end token."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def lines(folder: Path, *rows: Any) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_responses_count_and_prompts_do_not(tmp_path: Path) -> None:
    data = token_data(Letters(), lines(tmp_path, *PAIRS), 8, 32, 0)
    assert data.counted is not None
    ids, counted = torch.cat(data.calibration), torch.cat(data.counted)
    assert ids.shape == counted.shape == (8, 32) and counted.dtype == torch.bool
    whole = "".join(p["prompt"] + p["response"] + "\1" for p in PAIRS)
    marks = "".join("." * len(p["prompt"]) + "x" * (len(p["response"]) + 1) for p in PAIRS)
    for row, flags in zip(ids, counted, strict=True):
        at = whole.index("".join(map(chr, row.tolist())))
        assert [c == "x" for c in marks[at : at + 32]] == flags.tolist()
    assert 0 < int(counted.sum()) < counted.numel()


def test_texts_count_as_a_whole_and_are_the_windows_they_were(tmp_path: Path) -> None:
    rows = lines(tmp_path, *({"text": f"line {i} of a text"} for i in range(40)))
    assert [p.text for p in load_pieces(rows)] == [load_text(rows)]
    data = token_data(Letters(), rows, 4, 32, 0)
    assert data.counted is None and data.calibration[0].shape == (4, 32)
    other = token_data(Letters(), lines(tmp_path, *PAIRS), 4, 32, 0)
    assert data.digest != other.digest


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a"}], "prompt"),
        ([{"prompt": "a", "response": 3}], "not a string"),
        ([{"text": "a"}, {"prompt": "a", "response": "b"}], "not both"),
        ([{"prompt": "only read", "response": " "}], "empty"),
        (["text"], "no object"),
    ],
)
def test_lines_that_are_neither_are_named(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_pieces(lines(tmp_path, *rows))


@pytest.mark.parametrize("passes", ["l4q{bits=3 group=16 epochs=3 loss=ce}", "ast{epochs=3 teacher=0 pattern=none}"])
def test_what_is_trained_is_the_loss_of_what_counts(tiny_model: Program, passes: str) -> None:
    few = (LONG[0][:3],)
    counted = (torch.arange(few[0].shape[1]).expand(3, -1) % 5 == 0,)
    program, log = tiny_model.clone(), Log()
    run_pipeline(program, parse(passes), Context(log=log, calibration=few, counted=counted), Settings())
    *_, row = (r.figures for r in log.reports if "loss_after" in r.figures)
    ids = [i[None] for i in few[0]]
    losses = [float(next_token_loss(logits(program, i), i, counted[0][:1])) for i in ids]
    assert row["loss_after"] == pytest.approx(sum(losses) / 3, rel=1e-4) and row["loss_after"] < row["loss_before"]
