"""`shiftadd`: what is stored is what runs, siblings do not mix, nothing is left alone silently, and plans are exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.shiftadd
from ir.analysis import blocks, linear_sites
from ir.decode import arguments, codes_of
from ir.errors import UnsupportedError, UsageError
from ir.ops.nested import NestedCodes
from ir.params import Entry, MemorySource
from ir.precision import precisions, set_planes
from ir.program import Program, is_call
from ir.text import dump
from ir.verify import verify
from passes.base import Context, Diagnostic, Log, OptionError, PlanRow
from passes.pipeline import parse
from passes.quantize.hessian import Gram, empty_gram, update
from passes.quantize.salience import row_energy
from passes.quantize.targets import Moments
from passes.shiftadd import ShiftAdd, _rotated
from passes.shiftcode.siblings import Fitting, fit_siblings
from passes.shiftcode.solver import solve
from passes.widths import put_widths
from tests.coded_sites import coded, decoded, parts, same_parts, stored_bytes
from tests.golden import check_golden
from tests.watch import batches, values

DATA = batches((4, 32), (4, 32))
nomul = torch.ops.nomul
SITES = [
    f"model.layers.{k}.{part}"
    for k in range(2)
    for part in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]


def compress(program: Program, work: Path | None = None, data: Any = DATA, **options: Any) -> tuple[Program, Log]:
    """A compressed copy of a program and what the pass said; two planes of groups of 16 unless told otherwise."""
    program, log = program.clone(), Log("shiftadd")
    chosen = ShiftAdd(**{"bits": 2, "group": 16, "rounds": 2, **options})
    chosen.validate()
    chosen.run(program, Context(log=log, calibration=data, work=work))
    return program, log


@pytest.fixture(scope="module")
def plain(tiny_model: Program) -> tuple[Program, Log]:
    return compress(tiny_model)


def test_every_linear_of_the_blocks_is_coded(plain: tuple[Program, Log]) -> None:
    program, log = plain
    assert sorted(coded(program)) == sorted(SITES) == sorted(r.site for r in log.reports)
    assert {n.args[-2:] for n in coded(program).values()} == {(16, 2)}
    assert not any(f"{name}.weight" in program.params for name in SITES)
    verify(replace(program, level="compressed"), full=True)


def test_the_codes_that_are_stored_are_what_runs(plain: tuple[Program, Log], tiny_model: Program) -> None:
    program, _ = plain
    seen = values(program, DATA[0])
    originals = {s.name: tiny_model.params.get(s.weight) for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0]}
    for name, node in coded(program).items():
        weight = decoded(program, node)
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)
        assert weight.shape == originals[name].shape and not torch.equal(weight, originals[name].double())


def test_reported_figures_are_those_of_the_stored_codes(tiny_model: Program) -> None:
    program, log = compress(tiny_model, basis="plain", target="own")
    figures = {r.site: r.figures for r in log.reports}
    originals = {s.name: s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0]}
    for name, node in coded(program).items():
        rows, inputs = originals[name].rows, originals[name].inputs
        assert figures[name]["bytes"] == stored_bytes(program, node)
        assert figures[name]["bits"] == 8 * stored_bytes(program, node) / (rows * inputs)
    # The inputs of the first block's q_proj are the float model's own, so its error can be measured from outside.
    name = SITES[0]
    node, weight = originals[name].node, tiny_model.params.get(originals[name].weight).double()
    x = torch.cat([values(tiny_model, ids)[node.args[0].name].flatten(0, 1) for ids in DATA]).double()  # type: ignore[union-attr]
    error = x @ (weight - decoded(program, coded(program)[name])).T
    found = float(error.norm() / (x @ weight.T).norm())
    assert figures[name]["rel_error"] == pytest.approx(found, rel=1e-4)
    assert figures[name]["sqnr_db"] == pytest.approx(-20 * torch.log10(torch.tensor(found)).item(), abs=1e-3)


def test_blocks_stay_blocks_when_only_one_of_them_is_compressed(tiny_model: Program) -> None:
    program, _ = compress(tiny_model, skip=("model.layers.1.*",))
    assert sorted(coded(program)) == sorted(SITES[:7])
    assert len(blocks(program)) == len(blocks(tiny_model)) == 2


def test_siblings_solved_together_are_solved_as_if_alone(plain: tuple[Program, Log], tiny_model: Program) -> None:
    for name in (SITES[0], SITES[1], SITES[4]):
        others = tuple(s for s in SITES if s != name)
        alone, _ = compress(tiny_model, skip=others)
        assert list(coded(alone)) == [name] and same_parts(alone, plain[0], name)


def test_later_blocks_are_fitted_to_what_earlier_ones_left(plain: tuple[Program, Log], tiny_model: Program) -> None:
    name = "model.layers.1.self_attn.q_proj"
    first_float, _ = compress(tiny_model, skip=("model.layers.0.*",))
    assert not same_parts(first_float, plain[0], name)


def test_data_free_sites_do_not_depend_on_each_other_or_on_data(tiny_model: Program) -> None:
    free, _ = compress(tiny_model, calib="none", data=None)
    other, _ = compress(tiny_model, calib="none", skip=("model.layers.0.*",))
    assert sorted(coded(free)) == sorted(SITES)
    assert all(same_parts(free, other, name) for name in coded(other))
    assert ShiftAdd(calib="none").needs() is None and ShiftAdd().needs() is not None


def test_it_needs_text_unless_told_otherwise(tiny_model: Program) -> None:
    with pytest.raises(UsageError, match="needs calibration text"):
        compress(tiny_model, data=None)


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("v_proj", [s for s in SITES if "v_proj" in s]),
        ("model.layers.1.*", SITES[7:]),
        ("*.0.*_proj", SITES[:7]),
    ],
)
def test_sites_named_by_skip_stay_float_and_are_recorded(tiny_model: Program, pattern: str, left: list[str]) -> None:
    program, log = compress(tiny_model, skip=(pattern,), calib="none", rounds=0)
    found = {d.site: d for d in log.diagnostics if d.site != "lm_head"}
    assert found == {s: Diagnostic(s, f"skip={pattern} names it", "shiftadd", asked=True) for s in left}
    assert sorted(coded(program)) == sorted(set(SITES) - set(left))
    kept = {s.name for s in linear_sites(program, program.graph.nodes)[0]}
    assert kept == set(left)


def test_a_part_of_a_name_is_no_pattern(tiny_model: Program) -> None:
    with pytest.raises(OptionError, match="q matches none of the 15 linears"):
        compress(tiny_model, skip=("q",), calib="none", rounds=0)


def test_a_tied_head_is_recorded(plain: tuple[Program, Log]) -> None:
    reason = "its weight model.embed_tokens.weight is shared with another reader"
    assert plain[1].diagnostics == [Diagnostic("lm_head", reason, "shiftadd")]


def test_a_head_of_its_own_is_outside_the_blocks(untied_model: Program) -> None:
    program, log = compress(untied_model, calib="none", rounds=0)
    assert [d.site for d in log.diagnostics] == ["lm_head"]
    assert "outside the repeated blocks" in log.diagnostics[0].reason
    assert "lm_head" not in coded(program)


def error(found: Program, original: Program, data: Any = DATA) -> float:
    """The relative error of what the last block gives, over all batches."""
    name, off, size = blocks(original)[-1].exit.name, 0.0, 0.0
    for ids in data:
        wanted = values(original, ids)[name].double()
        off += float((values(found, ids)[name] - wanted).square().sum())
        size += float(wanted.square().sum())
    return (off / size) ** 0.5


def heavy_tailed(program: Program) -> Program:
    """A copy with weights of Student's t with four degrees of freedom."""
    program, generator = program.clone(), torch.Generator().manual_seed(1)
    for site in linear_sites(program, program.graph.nodes)[0]:
        normal, spread = (torch.randn(site.rows, site.inputs, n, generator=generator) for n in (1, 4))
        weight = 0.1 * normal[..., 0] / spread.square().mean(-1).sqrt()
        kind = program.params.type_of(site.weight)
        program.params.enter(site.weight, Entry(MemorySource({site.weight: weight}), site.weight, kind))
    return program


# What optimal scalar quantisers of the whole distribution reach on Gaussian weights: 4.4, 9.3, 14.6 dB and so on.
FLOORS = {
    ("gaussian", "none"): {1: 4.4, 2: 9.3, 3: 15.0, 4: 20.2},
    ("gaussian", "stream"): {2: 10.5, 3: 16.0},
    ("heavy", "none"): {2: 8.5, 4: 19.5},
}


@pytest.mark.parametrize(("shape", "calib"), FLOORS)
def test_signal_to_noise_grows_with_bits(tiny_model: Program, shape: str, calib: str) -> None:
    program = tiny_model if shape == "gaussian" else heavy_tailed(tiny_model)
    last: dict[str, float] = {}
    for bits, floor in FLOORS[shape, calib].items():
        _, log = compress(program, bits=bits, group=32, rounds=2, calib=calib, target="own")
        found = {r.site: r.figures["sqnr_db"] for r in log.reports}
        assert min(found.values()) >= floor
        assert all(found[site] > last.get(site, 0.0) + 3 for site in found)
        last = found


def test_looking_at_the_inputs_pays(tiny_model: Program) -> None:
    errors = [error(compress(tiny_model, **o)[0], tiny_model) for o in ({}, {"target": "own"}, {"calib": "none"})]
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[2]


@pytest.mark.parametrize("options", [{}, {"mode": "lat", "group": 64}, {"code": "trits", "bits": 1}])
def test_float_targets_bring_the_blocks_closer_to_the_float_model(tiny_model: Program, options: dict[str, Any]) -> None:
    own, half, full = (
        compress(tiny_model, **options, **o)[0] for o in ({"target": "own"}, {"share": 0.5}, {"share": 1.0})
    )
    errors = [error(p, tiny_model) for p in (own, half, full)]
    assert errors[2] < 0.95 * errors[0] and errors[1] < errors[0]
    assert all(same_parts(own, full, name) for name in SITES[:3])
    assert not any(same_parts(own, full, name) for name in SITES[7:])


def test_no_share_of_the_correction_is_the_weights_own_target(tiny_model: Program) -> None:
    own, none = compress(tiny_model, target="own")[0], compress(tiny_model, share=0.0)[0]
    assert all(same_parts(own, none, name) for name in SITES)
    needs = [ShiftAdd(**o).needs() for o in ({}, {"share": 0.0}, {"target": "own"})]  # type: ignore[arg-type]
    assert [n.stream for n in needs if n is not None] == ["both", "compressed", "compressed"]


QUICK = {"rounds": 1, "starts": 1, "iterations": 1, "polish": 0, "sweeps": 1}
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


def figures_of(rows: list[PlanRow]) -> dict[str, Any]:
    return {row.site: row.figures for row in rows if row.action == "shiftadd"}


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
    program, _ = compress(tiny_model, nested=(2, 3, 5), sweeps=1)
    plain, _ = compress(tiny_model, bits=2, sweeps=1)
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


def test_each_site_gets_the_width_chosen_for_it(tiny_model: Program) -> None:
    chosen = {SITES[0]: 3, SITES[1]: 1, SITES[5]: 4, SITES[9]: 3}
    program = tiny_model.clone()
    put_widths(program, chosen)
    rows = figures_of(ShiftAdd(bits=2, group=16).plan(program))
    found, _ = compress(program)
    for name, node in coded(found).items():
        assert parts(found, node)[0].shape[0] == chosen.get(name, 2)  # type: ignore[union-attr]
        assert rows[name]["bytes"] == stored_bytes(found, node)
    for name, bits in ((SITES[0], 3), (SITES[1], 1), (SITES[2], 2)):
        assert same_parts(found, compress(tiny_model, bits=bits)[0], name)
    trits, _ = compress(program, code="trits", bits=2, **QUICK, calib="none")
    assert {parts(trits, n)[0].shape[0] for n in coded(trits).values()} == {2}  # type: ignore[union-attr]


def silenced(program: Program, place: str) -> Program:
    """A copy in which a norm gives zeros."""
    program = program.clone()
    program.params.put(place, torch.zeros_like(program.params.get(place)), "test")
    return program


@pytest.mark.parametrize("options", [{}, {"target": "own", "mode": "lat"}, {"nested": (2, 3)}])
def test_sites_that_only_read_zeros_are_fitted_to_their_weights_and_named(
    tiny_model: Program, tmp_path: Path, options: dict[str, Any]
) -> None:
    program = silenced(tiny_model, "model.layers.0.post_attention_layernorm.weight")
    found, log = compress(program, work=tmp_path, **options)
    reasons = {d.site: d.reason for d in log.diagnostics if d.site != "lm_head"}
    assert sorted(reasons) == sorted(SITES[4:7])
    assert set(reasons.values()) == {"its inputs were zero for all 256 tokens, so it is fitted to its weights alone"}
    assert sorted(coded(found)) == sorted(SITES)
    if "nested" not in options:
        free, _ = compress(program, **{**options, "calib": "none"})
        assert [n for n in SITES if same_parts(found, free, n)] == SITES[4:7]
    again, log_again = compress(program, work=tmp_path, **options)
    assert log_again.diagnostics == log.diagnostics and all(same_parts(again, found, n) for n in SITES)


def test_a_hessian_that_cannot_be_factored_falls_back_to_the_weights(tiny_model: Program) -> None:
    site = linear_sites(tiny_model, tiny_model.graph.nodes)[0][0]
    weight = tiny_model.params.get(site.weight).double()
    spec = ShiftAdd(group=16).spec(site, 2)
    hopeless = torch.eye(site.inputs)
    hopeless[0, 1] = hopeless[1, 0] = 9.0
    how = Fitting(lambda _: spec)
    [row] = fit_siblings(weight, [site], Moments(Gram(hopeless, 77), None), how)
    assert "77 tokens" in row.fallback and "fitted to its weights alone" in row.fallback
    assert torch.equal(row.codes.signs, solve(weight, None, spec).signs)
    [fine] = fit_siblings(weight, [site], Moments(Gram(torch.eye(site.inputs), 77), None), how)
    assert fine.fallback == ""


def test_a_singular_hessian_is_damped_until_it_can_be_factored(tiny_model: Program) -> None:
    few = batches((1, 7))
    program, log = compress(tiny_model, data=few, damp=1e-14)
    assert [d.site for d in log.diagnostics] == ["lm_head"]
    assert sorted(coded(program)) == sorted(SITES)
    found = [r.figures["rel_error"] for r in log.reports]
    assert all(0 <= f < 0.5 for f in found[:3])
    free, _ = compress(tiny_model, calib="none")
    assert not any(same_parts(program, free, name) for name in SITES)


@pytest.mark.parametrize("options", [{}, {"mode": "lat", "group": 24}, {"mode": "acc", "group": 7}, {"terms": 0}])
@pytest.mark.parametrize("data", [False, True])
def test_trials_are_the_losses_and_bytes_of_real_codes(
    tiny_model: Program, options: dict[str, Any], data: bool
) -> None:
    quickly = {"rounds": 5, "starts": 1, "iterations": 0, "polish": 0, "sweeps": 0, "basis": "plain", "target": "own"}
    site = next(s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0] if s.name == SITES[0])
    weight = tiny_model.params.get(site.weight).double()
    gram = None
    if data:
        gram = empty_gram(site.inputs)
        for ids in DATA:
            update(gram, values(tiny_model, ids)[site.node.args[0].name])  # type: ignore[union-attr]
    coder = ShiftAdd(**{"group": 16, "basis": "plain", **options})
    found = coder.trial(weight, gram, (1, 2, 4), site, Context())
    assert [t.bits for t in found] == [1, 2, 4]
    losses = [float(t.row_loss.sum()) for t in found]
    assert losses[1] < 0.6 * losses[0] and losses[2] < 0.6 * losses[1]
    for trial in found:
        others = tuple(s for s in SITES if s != site.name)
        calib = "stream" if data else "none"
        run, _ = compress(tiny_model, bits=trial.bits, **{**quickly, **options}, skip=others, calib=calib)
        node = coded(run)[site.name]
        assert trial.stored_bytes == stored_bytes(run, node) == coder.stored_bytes(site, trial.bits)
        expected = row_energy(weight - decoded(run, node), gram)
        torch.testing.assert_close(trial.row_loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("data", [False, True])
def test_trials_of_rotated_weights_are_in_the_basis_of_the_codes(tiny_model: Program, data: bool) -> None:
    site = next(s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0] if s.name == SITES[0])
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(site.rows, site.inputs, generator=generator, dtype=torch.float64)
    weight[:, 3] *= 40  # one column governs the scales of its group, unless rotation spreads it
    x = torch.randn(300, site.inputs, generator=generator, dtype=torch.float64)
    gram = Gram(x.T @ x, 300) if data else None
    turned, metric = _rotated(weight, gram, seed=1)
    torch.testing.assert_close(row_energy(turned, metric), row_energy(weight, gram), rtol=1e-10, atol=0)
    assert float(turned.abs().max()) < 0.5 * float(weight.abs().max())
    plain, spread = (
        float(ShiftAdd(group=16, basis=basis).trial(weight, gram, (3,), site, Context())[0].row_loss.sum())  # type: ignore[arg-type]
        for basis in ("plain", "rotated")
    )
    assert spread < 0.8 * plain


def test_planning_changes_nothing(tiny_model: Program) -> None:
    program = tiny_model.clone()
    ShiftAdd(group=16).plan(program)
    assert program.version == tiny_model.version and dump(program) == dump(tiny_model)


def test_a_group_must_divide_every_input(tiny_model: Program) -> None:
    with pytest.raises(UnsupportedError, match="group 48 of pass shiftadd does not divide") as caught:
        compress(tiny_model, group=48)
    assert "has 32 inputs" in caught.value.where and "32, 16, 8" in caught.value.fix


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("bits", 0), ("bits", 9), ("terms", -1), ("terms", 5), ("group", -1), ("rounds", -1), ("damp", 0.0)),
        *(("damp", 1.5), ("damp", "nan"), ("starts", 0), ("starts", 5), ("iterations", -1), ("polish", -1)),
        *(("sweeps", -1), ("share", -0.1), ("share", 1.1), ("share", "nan"), ("mode", "column"), ("code", "levels")),
        *(("basis", "turned"), ("target", "other"), ("calib", "float"), ("nested", "[3 2]"), ("nested", "[2 2]")),
        *(("nested", "[0 2]"), ("nested", "[2 9]"), ("offset", "maybe")),
    ],
)
def test_options_out_of_range(option: str, value: float | str) -> None:
    with pytest.raises(UsageError, match=f"option {option} of pass shiftadd"):
        parse(f"shiftadd{{{option}={value}}}")


@pytest.mark.parametrize(
    "options",
    ["code=trits31 bits=3", "nested=[2 3] code=trits", "nested=[2 3] calib=none", "code=trits bits=6"],
)
def test_options_that_exclude_each_other(options: str) -> None:
    with pytest.raises(OptionError, match="shiftadd"):
        parse(f"shiftadd{{{options}}}")


@pytest.mark.parametrize("options", ["terms=0 group=0", "code=trits bits=5", "nested=[1 8] mode=lat", "share=0"])
def test_options_at_the_edge(options: str) -> None:
    assert str(parse(f"shiftadd{{{options}}}")).startswith("shiftadd{")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_model: Program, bad: float) -> None:
    program = tiny_model.clone()
    name = f"{SITES[9]}.weight"
    program.params.put(name, program.params.get(name).index_fill(0, torch.tensor([1]), bad), "test")
    with pytest.raises(UnsupportedError, match="not finite") as caught:
        compress(program, calib="none", rounds=0)
    assert caught.value.where == name and "32 of its" in caught.value.why


def test_the_result_is_the_same_every_time(plain: tuple[Program, Log], tiny_model: Program) -> None:
    again, log = compress(tiny_model)
    assert dump(again) == dump(plain[0]) and log.reports == plain[1].reports
    assert all(torch.equal(again.params.get(n), plain[0].params.get(n)) for n in again.params)


RESUMED: list[dict[str, Any]] = [
    {},
    {"mode": "acc", "group": 0, **QUICK},
    {"nested": (2, 3), **QUICK},
    {"nested": (2, 4), "terms": 0, "offset": False, **QUICK},
    {"code": "trits31", **QUICK},
    {"terms": 0, **QUICK},
]


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("options", RESUMED)
def test_finished_blocks_are_taken_from_the_work_folder(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int, options: dict[str, Any]
) -> None:
    first, first_log = compress(tiny_model, work=tmp_path, **options)
    for index in range(2 - lost, 2):
        (tmp_path / f"block-{index:04d}.json").unlink()
    solved: list[str] = []

    def fit(weight: Tensor, sites: Any, *rest: Any) -> Any:
        solved.extend(site.name for site in sites)
        return fit_siblings(weight, sites, *rest)

    monkeypatch.setattr(passes.shiftadd, "fit_siblings", fit)
    again, log = compress(tiny_model, work=tmp_path, **options)
    assert sorted(solved) == sorted(SITES[7 * (2 - lost) :])
    assert dump(again) == dump(first) and log.reports == first_log.reports
    assert all(torch.equal(again.params.get(n), first.params.get(n)) for n in again.params)


def test_two_sites_of_one_path_are_kept_apart_on_disk(tiny_model: Program, tmp_path: Path) -> None:
    program = tiny_model.clone()
    for site in linear_sites(program, program.graph.nodes)[0]:
        site.node.meta["path"] = site.name.rpartition(".")[0]
    first, _ = compress(program, work=tmp_path)
    again, _ = compress(program, work=tmp_path)
    assert dump(first) == dump(again)
    assert all(torch.equal(again.params.get(n), first.params.get(n)) for n in again.params)


def test_golden_dump(plain: tuple[Program, Log], request: pytest.FixtureRequest) -> None:
    program = plain[0].clone()
    program = replace(program, level="compressed", history=(*program.history, "shiftadd{bits=2 group=16 rounds=2}"))
    check_golden("shiftadd.ir", dump(program), request)
