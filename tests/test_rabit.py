"""`rabit`, `onebit` and `svid`: planes end as they were trained, come closer by training, and columns fold away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ir.analysis import blocks
from ir.decode import codes_of, is_coded
from ir.errors import UnsupportedError
from ir.ops.shiftcode import ShiftCodes
from ir.program import Program, is_call
from ir.verify import verify
from passes.base import Log, OptionError
from passes.equiv.discover import discover
from passes.equiv.transfer import expand
from passes.pipeline import parse
from passes.svid import column_factors
from tests.architectures import ids_for, traced
from tests.coded_sites import coded, same_parts
from tests.pipeline_runs import LONG, resumed, run
from tests.shiftadd_runs import SITES
from tests.test_ast import logits
from tests.test_l4q import distance, losses_of

QUICK = "rate=1e-3 scale_rate=3e-3 warm=2 epochs=4"


@pytest.mark.parametrize(
    "options", ["", "planes=1", "planes=3 group=16 rate=1e-4 scale_rate=3e-4", "terms=1", "terms=3 group=8", "warm=0"]
)
def test_the_program_is_what_training_ran(tiny_model: Program, options: str) -> None:
    text = " ".join(f"{name}={value}" for name, value in dict(_pairs(QUICK) + _pairs(options)).items())
    found, log = run(tiny_model, f"rabit{{{text}}}", LONG)
    verify(found, full=True)
    before, after = losses_of(log)
    assert after < before
    assert distance(found, tiny_model) == pytest.approx(after, rel=1e-6)
    assert sorted(coded(found)) == sorted(SITES)
    inside = [n for block in blocks(found) for n in block.nodes]
    assert not any(is_call(n, torch.ops.aten.linear) for n in inside)
    planes = dict(_pairs(options)).get("planes", "2")
    for node in (n for n in inside if is_coded(n)):
        codes = codes_of(node, found.params.get)
        assert isinstance(codes, ShiftCodes) and codes.planes == int(planes) and codes.offsets is None
    (pass_,) = parse(f"rabit{{{text}}}").passes()
    planned = {row.site: row.figures["bytes"] for row in pass_.plan(tiny_model)}
    assert planned == {s: codes_of(n, found.params.get).stored_bits // 8 for s, n in coded(found).items()}


def _pairs(text: str) -> list[Any]:
    return [part.split("=") for part in text.split()]


def test_training_and_a_second_plane_come_closer(tiny_model: Program) -> None:
    texts = [f"rabit{{{QUICK}}}", "rabit{warm=2 epochs=0 rate=1e-3}", "rabit{warm=0 epochs=0}"]
    distances = [distance(run(tiny_model, text, LONG)[0], tiny_model) for text in texts]
    assert distances == sorted(distances) and distances[0] < 0.9 * distances[2]
    one = distance(run(tiny_model, f"onebit{{{QUICK}}}", LONG)[0], tiny_model)
    assert distances[0] < one


def test_onebit_is_one_plane(tiny_model: Program) -> None:
    one, other = (run(tiny_model, f"{name}{{{QUICK}}}", LONG)[0] for name in ("onebit", "rabit"))
    same, _ = run(tiny_model, f"rabit{{planes=1 {QUICK}}}", LONG)
    assert all(same_parts(one, same, site) for site in SITES)
    assert not any(same_parts(one, other, site) for site in SITES)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = resumed(tiny_model, "rabit{warm=0 epochs=4 rate=1e-3}", LONG, tmp_path, stop, monkeypatch)
    assert all(same_parts(runs.again, runs.whole, site) for site in SITES)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_it_runs_on_many_architectures(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, "svid,fold,rabit{epochs=1 warm=1}", data)
    verify(found, full=True)
    before, after = losses_of(log)
    assert after <= before and coded(found)


def test_columns_fold_away_exactly(tiny_model: Program) -> None:
    ids = LONG[0][:2]
    found, log = run(tiny_model, "svid,fold", LONG)
    torch.testing.assert_close(logits(found, ids), logits(tiny_model, ids), rtol=1e-4, atol=1e-5)
    moved = [n for n in found.params if not torch.equal(found.params.get(n), tiny_model.params.get(n))]
    assert moved
    left = [r.figures["error_left"] for r in log.reports if r.by == "svid"]
    assert left and all(share <= 1 + 1e-9 for share in left) and min(left) < 0.99


def test_column_factors_are_those_of_a_product(tiny_model: Program) -> None:
    """Weights that are a product of a row, a column and signs have no error left, and give their columns back."""
    program = tiny_model.clone()
    for group in discover(program).of("norm->linears", "v->o", "up->down"):
        columns = 1.0 + draw_positive(group.size)
        for i, slot in enumerate(group.sinks):
            shape = program.params.type_of(slot.weight).dims
            rows, signs = draw_positive(int(shape[0])), torch.randn(*map(int, shape)).sign()
            program.params.put(slot.weight, (rows[:, None] * expand(slot.tie, columns) * signs).float() * (i + 1), "t")
        found, left = column_factors(program, group, 4)
        torch.testing.assert_close(found, columns / columns.log().mean().exp(), rtol=1e-5, atol=0)
        assert left < 1e-10


def draw_positive(count: int) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) + 0.1


def test_columns_of_zeros_have_factor_one(tiny_model: Program) -> None:
    program = tiny_model.clone()
    (group, *_) = discover(program).of("norm->linears")
    for slot in group.sinks:
        weight = program.params.get(slot.weight).clone()
        weight[:, 3] = 0
        program.params.put(slot.weight, weight, "t")
    columns, _ = column_factors(program, group, 8)
    assert bool(torch.isfinite(columns).all()) and bool((columns > 0).all())


def test_uneven_columns_are_where_it_helps(tiny_model: Program) -> None:
    """Columns of other sizes are what scales of rows cannot follow."""
    program = tiny_model.clone()
    (group, *_) = discover(program).of("norm->linears")
    for slot in group.sinks:
        weight = program.params.get(slot.weight)
        uneven = torch.linspace(-1.5, 1.5, weight.shape[1]).exp()
        program.params.put(slot.weight, weight * uneven, "t")
    plain, evened = (
        distance(run(program, f"{before}onebit{{warm=0 epochs=0}}", LONG)[0], program) for before in ("", "svid,fold,")
    )
    assert evened < plain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rabit{planes=5}", "outside"),
        ("rabit{terms=4}", "outside"),
        ("onebit{planes=0}", "outside"),
        ("rabit{batch=0}", "outside"),
        ("svid{rounds=0}", "outside"),
    ],
)
def test_options_out_of_range(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse(text)


def test_what_does_not_fit_is_refused(tiny_model: Program) -> None:
    with pytest.raises(UnsupportedError, match="does not divide"):
        run(tiny_model, "rabit{group=24}", LONG)
    with pytest.raises(UnsupportedError, match="no linear"):
        run(tiny_model, "rabit{skip=*}", LONG)
    with pytest.raises(UnsupportedError, match="mask"):
        run(tiny_model, "sparse{method=magnitude},rabit", LONG)


def test_sites_left_in_float_stay(tiny_model: Program) -> None:
    found, log = run(tiny_model, f"rabit{{{QUICK} skip=*down_proj}}", LONG)
    assert sorted(coded(found)) == sorted(s for s in SITES if "down_proj" not in s)
    assert isinstance(log, Log) and any("down_proj" in d.site for d in log.diagnostics)
