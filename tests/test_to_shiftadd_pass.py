"""`to-shiftadd`: the same weights bit for bit as sign planes, and no multiply where scales are powers of two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ir.decode import arguments
from ir.edit import Editor
from ir.errors import InvariantError, UnsupportedError
from ir.ops.quant import QuantCodes
from ir.ops.shiftadd import shiftadd_cost
from ir.ops.shiftcode import ShiftCodes
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.manager import Settings, run_pipeline
from passes.pipeline import check, parse
from passes.rtn import Rtn
from passes.to_shiftadd import ToShiftadd, as_planes
from tests.coded_sites import coded, decoded, parts, stored_bytes
from tests.golden import check_golden
from tests.test_shiftcode import uniform
from tests.watch import batches, values

nomul = torch.ops.nomul


def rounded(program: Program, **options: Any) -> Program:
    """The program with its linears rounded to nearest in groups of 16."""
    program = program.clone()
    Rtn(**{"group": 16, **options}).run(program, Context(log=Log("rtn")))
    program.level, program.facts = "compressed", program.facts | Rtn.gives
    return program


def rewritten(program: Program, **options: Any) -> tuple[Program, Log]:
    program, log = program.clone(), Log("to-shiftadd")
    ToShiftadd(**options).run(program, Context(log=log))
    return program, log


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "terms"), [(2, 0), (3, 1), (4, 2), (8, 0)])
def test_every_weight_stays_as_it_was(tiny_model: Program, bits: int, terms: int, symmetric: bool) -> None:
    before = rounded(tiny_model, bits=bits, terms=terms, symmetric=symmetric)
    program, log = rewritten(before)
    verify(program, full=True)
    assert not list(program.calls(nomul.quant_linear)) and set(coded(program)) == set(coded(before))
    for name, node in coded(program).items():
        assert torch.equal(decoded(program, node), decoded(before, coded(before)[name]))
        assert node.args[7] == terms and node.args[-1] == "uniform"
    assert {r.site for r in log.reports} == set(coded(program))
    ids = batches((2, 9))[0]
    seen, wanted = values(program, ids), values(before, ids)
    for name in coded(program):
        assert torch.equal(seen[coded(program)[name].name], wanted[coded(before)[name].name])


@pytest.mark.parametrize("terms", [0, 1])
def test_reports_are_of_what_is_stored_and_name_the_multiplies_left(tiny_model: Program, terms: int) -> None:
    program, log = rewritten(rounded(tiny_model, bits=3, terms=terms))
    for row in log.reports:
        node = coded(program)[row.site]
        stored = parts(program, node)
        inputs = int(node.args[0].meta["type"].dims[-1])  # type: ignore[union-attr]
        codes = ShiftCodes(*stored, 16, terms, inputs, 1, "uniform")  # type: ignore[arg-type]
        assert row.figures["bytes"] == stored_bytes(program, node) == codes.stored_bits / 8
        assert row.figures["bits"] == codes.stored_bits / row.figures["weights"]
        assert row.figures["multiplies"] == shiftadd_cost(codes, 1).multiplies
        assert (row.figures["multiplies"] == 0) == (terms == 1)


def test_float16_scales_keep_their_parameters_and_their_size(tiny_model: Program) -> None:
    before = rounded(tiny_model, bits=4)
    program, _ = rewritten(before)
    for name, node in coded(program).items():
        old = coded(before)[name]
        assert str(node.args[2].target) == str(old.args[2].target)  # type: ignore[union-attr]
        assert str(node.args[4].target) == str(old.args[3].target)  # type: ignore[union-attr]
        assert node.args[3] is None and stored_bytes(program, node) == stored_bytes(before, old)
    assert not [name for name in program.params if name.endswith(".codes")]


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_terms_bound_what_a_scale_may_take(tiny_model: Program, allowed: int) -> None:
    _, log = rewritten(rounded(tiny_model, bits=3, terms=2), terms=allowed)
    for row in log.reports:
        assert row.figures["terms"] == (2 if allowed == 2 else 0)
        assert (row.figures["multiplies"] == 0) == (allowed == 2)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_negative_and_nasty_scales_stay_exact(bits: int, zeros: bool) -> None:
    for powers, terms in ((True, 1), (False, 0)):
        codes = uniform(7, 21, 8, bits, zeros, powers, seed=bits)
        found = as_planes(codes, 2)
        assert found.terms == terms and bool((codes.scales < 0).any())
        assert torch.equal(found.dequantize(torch.float64), codes.dequantize(torch.float64))


def test_scales_further_apart_than_a_rows_window_stay_float16() -> None:
    codes = uniform(3, 16, 8, 4, True, True, seed=0)
    near, far = torch.tensor([[1.0, 2.0**-14]]), torch.tensor([[1.0, 2.0**-15]])
    for scales, terms in ((near, 1), (far, 0)):
        spread = replace(codes, scales=scales.expand(3, 2).half())
        assert as_planes(spread, 2).terms == terms
        assert torch.equal(as_planes(spread, 2).dequantize(), spread.dequantize())


def test_scales_that_are_not_finite_are_named() -> None:
    codes: QuantCodes = uniform(3, 16, 8, 4, True, True, seed=0)
    with pytest.raises(UnsupportedError) as caught:
        as_planes(replace(codes, scales=codes.scales * float("inf")), 2, "a.b")
    assert caught.value.where == "a.b"


def test_a_pipeline_without_multiplies_passes_the_probe(tiny_model: Program) -> None:
    program = tiny_model.clone()
    pipeline = parse("rtn{bits=4 group=16 terms=1},to-shiftadd")
    reports = run_pipeline(program, pipeline, Context(), Settings(verify="full"))
    assert reports[1].probe_error is not None and reports[1].probe_error < 1e-12 and reports[1].changed
    assert {row.figures["multiplies"] for row in reports[1].sites} == {0.0}
    assert "shift-weights" in program.facts and program.history[-1] == "to-shiftadd"


def test_it_needs_quantised_weights_and_options_in_range(tiny_model: Program) -> None:
    with pytest.raises(UnsupportedError, match="takes level compressed"):
        check(parse("to-shiftadd"), tiny_model.level, tiny_model.facts)
    with pytest.raises(UnsupportedError, match=r"needs the fact quant-weights[\s\S]*put rtn"):
        check(parse("to-shiftadd"), "compressed", tiny_model.facts)
    after = ToShiftadd().facts_after(tiny_model.facts | {"quant-weights"})
    assert "shift-weights" in after and "quant-weights" not in after
    with pytest.raises(OptionError, match="option terms of pass to-shiftadd"):
        parse("to-shiftadd{terms=5}")


def test_golden_dump(tiny_model: Program, request: pytest.FixtureRequest) -> None:
    program, _ = rewritten(rounded(tiny_model, bits=3, terms=1))
    history = (*program.history, "rtn{bits=3 group=16 terms=1}", "to-shiftadd")
    check_golden("to_shiftadd.ir", dump(replace(program, history=history)), request)


MISTAKES: list[tuple[str, Any, str]] = [
    ("code", "binary", "there is no code binary"),
    ("code", "trits31", "cannot have 3 planes"),
    ("code", "trits", "the dims of signs"),
    ("code", "planes", "the dims of scales"),
    ("terms", 2, "the dims of scales"),
    ("terms", 0, "scales must be torch.float16"),
    ("row_group", 3, "the dims of exponents"),
    ("row_group", 0, "row_group must be a positive number"),
    ("exponents", None, "exponents belong to scales of one or more terms"),
    ("group", 8, "the dims of offsets"),
]


@pytest.mark.parametrize(("name", "value", "message"), MISTAKES)
def test_wrong_calls_are_reported(tiny_model: Program, name: str, value: Any, message: str) -> None:
    program, _ = rewritten(rounded(tiny_model, bits=3, terms=1))
    node = next(program.calls(nomul.shiftadd_linear))
    found = {**arguments(node), name: value}
    Editor(program, "test").set_args(node, tuple(found.values()))
    with pytest.raises(InvariantError, match=message):
        verify(program)
