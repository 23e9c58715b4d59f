"""Options within a budget of stored bits: within it, better than others, and refused by name where nothing fits."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ir.errors import UsageError
from ir.ops.codes import group_count
from ir.program import Program
from passes.base import Calib, Context, Log, Pass
from passes.pipeline import parse
from passes.shiftadd import ShiftAdd
from passes.shiftcode import budget
from passes.shiftcode.budget import choose
from passes.shiftcode.solver import solve
from passes.shiftcode.spec import ShiftSpec
from tests.coded_sites import coded, same_parts, stored_bytes
from tests.watch import batches
from tools.compile import main
from tools.entry import run

INPUTS = [576, 1536]
QUICK = ShiftSpec(rounds=2, starts=1)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rank by fewer rows than outside tests."""
    monkeypatch.setattr(budget, "_ROWS", 4)
    budget._typical_loss.cache_clear()
    yield
    budget._typical_loss.cache_clear()


def stored_bits(spec: ShiftSpec) -> float:
    """Return bits per weight by hand: planes, a nibble a term for every scale and offset, two exponents a row."""
    nibbles = sum(group_count(k, spec.group) * spec.terms * (spec.bits + spec.offset) for k in INPUTS)
    return spec.bits + (4 * nibbles + 16 * len(INPUTS)) / sum(INPUTS)


@pytest.mark.parametrize(("bpw", "rotated"), [(1.4, True), (2.75, False), (4.3, True)])
def test_the_budget_lies_between_the_planes_to_choose_from(bpw: float, rotated: bool) -> None:
    spec, planes = choose(bpw, QUICK, INPUTS, stored_bits, rotated=rotated)
    sizes = [stored_bits(replace(spec, bits=bits)) for bits in planes]
    assert sizes[0] <= bpw < sizes[-1] and list(planes) == list(range(planes[0], planes[-1] + 1))
    assert all(k % spec.group == 0 for k in INPUTS) or spec.group == max(INPUTS)


def test_what_is_chosen_loses_least_of_all_that_compete() -> None:
    spec, _ = choose(3.3, QUICK, INPUTS, stored_bits, rotated=True)

    def loss(options: ShiftSpec) -> float:
        """Two numbers of planes, each for the share of weights that makes the mean size the budget."""
        rows = torch.randn(16, 1536, generator=torch.Generator().manual_seed(7)).double()
        points = []
        for bits in (2, 3, 4):
            each = replace(options, bits=bits)
            error = rows - solve(rows, None, each).dequantize(torch.float64)
            points.append((stored_bits(each), float(error.square().sum() / rows.square().sum())))
        low, high = next((a, b) for a, b in pairwise(points) if a[0] <= 3.3 < b[0])
        share = (3.3 - low[0]) / (high[0] - low[0])
        return (1 - share) * low[1] + share * high[1]

    best = loss(spec)
    for group, terms, offset in ((32, 1, False), (64, 2, True), (96, 3, True), (192, 1, False)):
        assert best < loss(replace(spec, group=group, terms=terms, offset=offset))


def test_a_budget_below_one_plane_names_the_smallest() -> None:
    smallest = stored_bits(ShiftSpec(bits=1, group=max(INPUTS), terms=1, offset=False))
    with pytest.raises(UsageError, match=f"bpw={smallest:.3f}"):
        choose(1.0, QUICK, INPUTS, stored_bits, rotated=False)
    assert 1 in choose(smallest + 1e-9, QUICK, INPUTS, stored_bits, rotated=False)[1]


def compress(program: Program, chain: Sequence[Pass], work: Path | None = None) -> tuple[Program, Log]:
    """A copy of a program after some passes, and what they said."""
    program, log, data = program.clone(), Log(), batches((4, 32))
    for place, chosen in enumerate(chain):
        following = tuple(chain[place + 1 :])
        chosen.run(program, Context(log=log.of(chosen.name), calibration=data, work=work, following=following))
    return program, log


@pytest.mark.parametrize("calib", ["stream", "none"])
def test_the_pass_stays_within_its_budget_and_says_what_it_stands_for(tiny_model: Program, calib: Any) -> None:
    short = ShiftAdd(bpw=4.6, calib=calib, starts=1)
    found, log = compress(tiny_model, [short])
    sites = coded(found)
    rows = [row for row in log.reports if row.by == "shiftadd"]
    assert sorted(row.site for row in rows) == sorted(sites)
    size = sum(stored_bytes(found, node) for node in sites.values())
    assert 0.9 * 4.6 < 8 * size / sum(row.figures["weights"] for row in rows) <= 4.6
    [text] = [note.text.partition(" stands for ")[2] for note in log.notes if "stands for" in note.text]
    widths, coder = parse(text).passes()
    again, _ = compress(tiny_model, [widths, coder])
    assert all(same_parts(found, again, name) for name in sites)
    assert short.needs() == (None if calib == "none" else Calib("both", gradients=True, original=True, tokens=True))


def test_a_run_that_was_cut_goes_on_from_its_widths(tiny_model: Program, tmp_path: Path) -> None:
    whole, _ = compress(tiny_model, [ShiftAdd(bpw=4.6, starts=1)], tmp_path)
    kept = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert any("bits" in p.parts for p in kept)
    again, _ = compress(tiny_model, [ShiftAdd(bpw=4.6, starts=1)], tmp_path)
    assert all(same_parts(whole, again, name) for name in coded(whole))


@pytest.mark.usefixtures("own_cache", "quick_builtin")
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_budget_that_nothing_meets_ends_the_command(
    tiny_hf: Path, tmp_path: Path, dry: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [str(tiny_hf), "--passes", "shiftadd{bpw=1.1}", "--out", str(out), "--samples", "4", "--seqlen", "32", *dry]
    assert run(main, argv) == 2 and not out.exists()
    message = capsys.readouterr().err
    assert "no shift-add code takes 1.1 bits per weight or less" in message and "give bpw=" in message
