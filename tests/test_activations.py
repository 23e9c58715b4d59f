"""Activations beyond a budget go to files and come back the same; a walk leaves none behind, whatever ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ir.program import Program
from passes.activations import Room, Shelf, shelved
from passes.base import Context, Log
from passes.gptq import Gptq
from passes.omniquant import Omniquant
from passes.stream import walk
from tests.coded_sites import same_parts
from tests.shiftadd_runs import DATA, SITES
from tests.solver_problems import draw
from tools.compile import parser


def files(folder: Path) -> list[Path]:
    """All files under a folder."""
    return [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (1,), (0, 5), (2, 3, 4)])
def test_what_is_filed_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    shelf = Shelf(Room(-1, tmp_path))
    tensor = (draw(*shape) * 10).to(dtype)
    shelf.append(tensor.T if tensor.ndim == 2 else tensor)
    found = shelf[0]
    assert found.dtype == dtype and torch.equal(found, tensor.T if tensor.ndim == 2 else tensor)
    assert len(files(tmp_path)) == 1
    found.zero_()  # what was read is the reader's own


def test_the_budget_is_what_stays_in_memory(tmp_path: Path) -> None:
    room = Room(200, tmp_path)
    one, other = (shelved(room, [torch.ones(25) * i for i in range(2)]) for _ in range(2))
    assert room.used == 200 and len(files(tmp_path)) == 2
    one[0] = torch.zeros(10)
    assert room.used == 140
    other[0] = torch.zeros(12)
    assert room.used == 188 and len(files(tmp_path)) == 1
    assert [float(t.sum()) for t in (*one, *other)] == [0.0, 25.0, 0.0, 25.0]
    one.clear()
    other.clear()
    assert room.used == 0 and not files(tmp_path) and len(one) == 0
    room.close()
    assert not list(tmp_path.iterdir())


def test_without_a_limit_nothing_is_written(tmp_path: Path) -> None:
    shelf = shelved(Room(None, tmp_path), [torch.ones(100)])
    assert shelf[0] is shelf[0] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", [0, 20_000])
def test_a_pass_gives_the_same_bytes_within_any_budget(tiny_model: Program, tmp_path: Path, budget: int) -> None:
    for chosen in (Gptq(bits=3, group=16), Omniquant(bits=3, group=16, epochs=1, second=True)):
        found: list[Program] = []
        for limit in (None, budget):
            program = tiny_model.clone()
            work = tmp_path / f"{chosen.name}-{limit}"
            ctx = Context(log=Log(chosen.name), calibration=DATA, work=work, activation_budget=limit)
            chosen.run(program, ctx)
            assert not [p for p in files(work) if p.suffix == ".bin"]
            found.append(program)
        assert all(same_parts(*found, site) for site in SITES)


@pytest.mark.parametrize("end", ["close", "error"])
def test_a_walk_that_is_broken_off_leaves_no_files(tiny_model: Program, tmp_path: Path, end: str) -> None:
    steps = walk(tiny_model, Context(calibration=DATA, work=tmp_path, activation_budget=0), "both", "test")
    next(steps)
    assert files(tmp_path)
    if end == "close":
        steps.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(RuntimeError):
            steps.throw(RuntimeError("stop"))  # type: ignore[attr-defined]
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("512MiB", 512 * 2**20), ("0", 0), ("1.5k", 1500), ("7 B", 7)]
)
def test_sizes_on_the_command_line(text: str, size: int) -> None:
    found: Any = parser().parse_args(["model", "--out", "x", "--activation-budget", text])
    assert found.activation_budget == size


def test_a_size_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["model", "--out", "x", "--activation-budget", "much"])
    assert end.value.code == 2 and "much is no size" in capsys.readouterr().err
