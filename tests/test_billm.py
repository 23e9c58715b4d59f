"""`billm`: salient inputs, binarised parts, what they count, and how they compare with signs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.billm as module
from ir.analysis import blocks
from ir.decode import codes_of, is_coded
from ir.ops.shiftcode import ShiftCodes
from ir.program import Program, is_call
from ir.verify import verify
from passes.base import OptionError
from passes.pipeline import parse
from passes.quantize.bell import BellSpec, binarised, salient_inputs
from tests.architectures import ids_for, traced
from tests.pipeline_runs import run
from tests.shiftadd_runs import DATA, SITES, error
from tests.solver_problems import draw
from tools.storage import storage

SPEC = BellSpec(16, 0.25, 2)


def problem(rows: int = 24, inputs: int = 64) -> tuple[Tensor, Tensor]:
    x = draw(400, inputs, seed=2) @ draw(inputs, inputs, seed=3)
    x[:, 5] *= 20.0
    return draw(rows, inputs), x.T @ x


def lost(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    left = weight - found
    return float((left @ hessian * left).sum() / (weight @ hessian * weight).sum())


def test_inputs_that_matter_are_salient() -> None:
    weight, hessian = problem()
    chosen = salient_inputs([weight], hessian, SPEC)
    assert 5 in chosen.tolist() and len(chosen) % 8 == 0 and 8 <= len(chosen) <= 16
    assert chosen.tolist() == sorted(chosen.tolist())
    loud = weight.clone()
    loud[:, 11] *= 50.0
    assert 11 in salient_inputs([weight, loud], None, SPEC).tolist()


@pytest.mark.parametrize("rest", [1, 2])
@pytest.mark.parametrize(("rows", "inputs"), [(24, 64), (7, 50)])
def test_parts_hold_the_levels_that_were_laid(rest: int, rows: int, inputs: int) -> None:
    weight, hessian = problem(rows, inputs)
    spec = BellSpec(16, 0.25, rest)
    chosen = salient_inputs([weight], hessian, spec)
    found = binarised(weight, hessian, chosen, spec)
    assert sorted([*found.salient.tolist(), *found.rest.tolist()]) == list(range(inputs))
    first, second = found.codes
    assert (first.planes, second.planes) == (2, rest) and second.in_features == inputs - len(chosen)
    for codes in found.codes:
        part = codes.dequantize(torch.float64)
        for start in range(0, part.shape[1], codes.group):
            levels = [row.unique() for row in part[:, start : start + codes.group]]
            assert max(len(row) for row in levels) <= 2**codes.planes
    assert lost(weight, found.dequantize(), hessian) < (0.35 if rest == 1 else 0.15)


def test_errors_are_made_up_for() -> None:
    weight, hessian = problem()
    chosen = salient_inputs([weight], hessian, SPEC)
    together, alone = (binarised(weight, h, chosen, SPEC).dequantize() for h in (hessian, None))
    assert lost(weight, together, hessian) < 0.7 * lost(weight, alone, hessian)


def test_a_split_bell_and_salient_inputs_help() -> None:
    weight, hessian = problem()
    chosen = salient_inputs([weight], hessian, SPEC)
    split, plain = (
        lost(weight, binarised(weight, hessian, chosen, BellSpec(16, 0.25, rest)).dequantize(), hessian)
        for rest in (2, 1)
    )
    assert split < 0.6 * plain
    finer, same = (
        lost(weight, binarised(weight, hessian, chosen, BellSpec(16, 0.25, 1, salient)).dequantize(), hessian)
        for salient in (2, 1)
    )
    assert finer < same


@pytest.mark.parametrize("options", ["group=16", "group=16 split=false", "group=24 salient=0.3"])
def test_linears_become_two(tiny_model: Program, options: str) -> None:
    found, log = run(tiny_model, f"billm{{{options}}}", DATA)
    verify(found, full=True)
    inside = [n for b in blocks(found) for n in b.nodes]
    assert not any(is_call(n, torch.ops.aten.linear) for n in inside)
    coded = {str(n.meta["path"]): n for n in inside if is_coded(n)}
    assert sorted(coded) == sorted(f"{s}.{part}" for s in SITES for part in ("rest", "salient"))
    assert all(isinstance(codes_of(n, found.params.get), ShiftCodes) for n in coded.values())
    stored, before = storage(found, written=True), storage(tiny_model, written=True)
    assert stored.total_weights == before.total_weights
    said = sum(r.figures["bytes"] for r in log.reports if "bytes" in r.figures)
    assert sum(s.stored_bytes for s in stored.sites if s.compressed) == said
    assert error(found, tiny_model) < 1.0
    assert not any(n.endswith(".weight") and "proj" in n for n in found.params)


def test_two_sets_come_closer_than_one_and_cost_a_plane(tiny_model: Program) -> None:
    split, plain = (run(tiny_model, f"billm{{group=16 split={how}}}", DATA)[0] for how in ("true", "false"))
    assert error(split, tiny_model) < error(plain, tiny_model)
    bits = [storage(p, written=True).compressed_bits for p in (split, plain)]
    assert bits[0] is not None and bits[1] is not None and bits[0] > bits[1] + 0.7


def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, log = run(tiny_model, "billm{group=16}", DATA)
    seen, fit = 0, module.binarised

    def failing(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > 9:
            raise KeyboardInterrupt
        return fit(*args)

    with monkeypatch.context() as patched:
        patched.setattr(module, "binarised", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, "billm{group=16}", DATA, tmp_path)
    again, said = run(tiny_model, "billm{group=16}", DATA, tmp_path)
    assert set(again.params) == set(whole.params)
    assert all(torch.equal(again.params.get(n), whole.params.get(n)) for n in whole.params)
    assert [(r.site, r.figures) for r in said.reports] == [(r.site, r.figures) for r in log.reports]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_it_runs_on_many_architectures(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, "billm{group=16}", data)
    verify(found, full=True)
    assert log.reports


def test_inputs_never_seen_are_named(tiny_model: Program) -> None:
    program = tiny_model.clone()
    for name in [n for n in program.params if "norm" in n]:
        program.params.put(name, torch.zeros_like(program.params.get(name)), "t")
    _, log = run(program, "billm{group=16}", DATA)
    assert any("inputs were zero" in d.reason for d in log.diagnostics)


@pytest.mark.parametrize("options", ["group=4", "salient=0", "salient=0.9", "share=2", "damp=0"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(OptionError):
        parse(f"billm{{{options}}}")
