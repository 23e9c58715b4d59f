"""`shiftadd` in all its forms: each has the layout it names, the bytes it planned, and runs as stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ir.analysis import linear_sites
from ir.decode import arguments, codes_of
from ir.errors import UsageError
from ir.ops.nested import NestedCodes
from ir.precision import precisions, set_planes
from ir.program import Program, is_call
from ir.verify import verify
from passes.base import Log
from passes.shiftadd import ShiftAdd
from tests.coded_sites import coded, decoded, parts, stored_bytes
from tests.shiftadd_runs import DATA, QUICK, SITES, compress, error, figures_of
from tests.watch import values

nomul = torch.ops.nomul


FORMS: dict[str, dict[str, Any]] = {
    "row": {"bits": 3, "group": 16},
    "whole rows": {"group": 0},
    "no offset": {"bits": 1, "group": 32, "terms": 1, "offset": False},
    "three terms": {"group": 8, "terms": 3},
    "float16": {"group": 32, "terms": 0},
    "some sites": {"bits": 5, "group": 32, "skip": ("v_proj", "model.layers.1.mlp.*")},
    "lat": {"mode": "lat", "group": 24},
    "lat of eight": {"mode": "lat", "group": 0},
    "acc": {"mode": "acc", "group": 0},
    "acc of five": {"mode": "acc", "group": 5, "terms": 4},
    "acc, plain": {"mode": "acc", "group": 16, "basis": "plain"},
    "rotated": {"basis": "rotated"},
    "trits": {"code": "trits", "bits": 1},
    "trits31": {"code": "trits31", "terms": 1},
    "trits, lat": {"code": "trits", "mode": "lat", "group": 32, "offset": False},
    "nested": {"nested": (2, 3, 4)},
    "nested, lat": {"nested": (1, 3), "mode": "lat", "group": 40, "terms": 0},
    "nested, rotated": {"nested": (2, 3), "basis": "rotated", "offset": False},
}
LAYOUTS = {
    "row": (16, 1),
    "lat": (8, 3),
    "acc of five": (1, 5),
    "acc, plain": (1, 16),
    "nested, lat": (8, 5),
    "trits, lat": (8, 4),
}


@pytest.fixture(scope="module", params=FORMS)
def formed(request: pytest.FixtureRequest, tiny_model: Program) -> tuple[str, Program, Log]:
    return request.param, *compress(tiny_model, data=DATA[:1], **{**QUICK, **FORMS[request.param]})


def test_planned_bytes_are_the_bytes_that_get_stored(formed: tuple[str, Program, Log], tiny_model: Program) -> None:
    form, program, log = formed
    rows = ShiftAdd(**{"bits": 2, "group": 16, **FORMS[form]}).plan(tiny_model)
    planned, reports = figures_of(rows), {r.site: r.figures for r in log.reports}
    assert len(rows) - len(planned) == len(list(program.calls(nomul.hadamard)))
    assert set(planned) == set(reports) == set(coded(program))
    for name, node in coded(program).items():
        assert planned[name]["bytes"] == reports[name]["bytes"] == stored_bytes(program, node)
        assert planned[name]["bits"] == reports[name]["bits"]
        assert planned[name]["weights"] == reports[name]["weights"]


def test_every_form_has_the_layout_it_names(formed: tuple[str, Program, Log], tiny_model: Program) -> None:
    form, program, _ = formed
    sizes = {s.name: s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0]}
    for name, node in coded(program).items():
        found, site = arguments(node), sizes[name]
        whole = {
            "whole rows": (site.inputs, 1),
            "lat of eight": (8, -(-site.rows // 8)),
            "acc": (1, site.rows),
        }
        expected = {**LAYOUTS, **whole}.get(form)
        assert expected in (None, (found["group"], found["row_group"]))
        assert bool(found["offsets"]) == FORMS[form].get("offset", True)
        assert found["terms"] == FORMS[form].get("terms", 2)


def test_what_every_form_stores_is_what_runs(formed: tuple[str, Program, Log], tiny_model: Program) -> None:
    _, program, _ = formed
    verify(replace(program, level="compressed"), full=True)
    seen = values(program, DATA[0])
    for node in coded(program).values():
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ decoded(program, node).T, rtol=1e-5, atol=1e-5)
    assert error(program, tiny_model, DATA[:1]) < 0.95


def test_acc_reads_rotated_inputs_and_the_float_function_stays(tiny_model: Program) -> None:
    program, _ = compress(tiny_model, mode="acc", group=0, bits=8, terms=4, calib="none")
    plain, _ = compress(tiny_model, mode="acc", group=0, bits=8, terms=4, calib="none", basis="plain")
    turned = list(program.calls(nomul.hadamard))
    assert turned and not list(plain.calls(nomul.hadamard))
    assert all(any(is_call(u, nomul.shiftadd_linear) for u in n.users) for n in turned)
    assert error(program, tiny_model) < 0.04 and error(plain, tiny_model) < 0.04
    for node in turned:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    program.graph.lint()
    assert error(program, tiny_model) > 0.3


def test_nested_weights_run_at_every_precision(tiny_model: Program) -> None:
    program, _ = compress(tiny_model, nested=(2, 3, 5), sweeps=1, sequential=False)
    plain, _ = compress(tiny_model, bits=2, sweeps=1, sequential=False)
    assert precisions(program) == (2, 3, 5)
    assert {arguments(n)["precision"] for n in coded(program).values()} == {5}
    errors = []
    for planes in (2, 3, 5):
        set_planes(program, planes)
        seen = values(program, DATA[0])
        for node in coded(program).values():
            x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
            torch.testing.assert_close(y, x @ decoded(program, node).T, rtol=1e-5, atol=1e-5)
        errors.append(error(program, tiny_model))
        if planes == 2:
            for name in SITES[:7]:
                assert torch.equal(decoded(program, coded(program)[name]), decoded(plain, coded(plain)[name]))
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.6 * errors[0]
    with pytest.raises(UsageError):
        set_planes(program, 4)


def test_nested_weights_keep_their_planes_once(tiny_model: Program) -> None:
    program, _ = compress(tiny_model, data=DATA[:1], nested=(2, 3, 4), **QUICK)
    wide, _ = compress(tiny_model, data=DATA[:1], bits=4, **QUICK)
    for name, node in coded(program).items():
        codes = codes_of(node, program.params.get)
        assert isinstance(codes, NestedCodes) and codes.precisions == (2, 3, 4)
        assert codes.signs.shape == parts(wide, coded(wide)[name])[0].shape  # type: ignore[union-attr]
        assert stored_bytes(program, node) < 2 * stored_bytes(wide, coded(wide)[name])
