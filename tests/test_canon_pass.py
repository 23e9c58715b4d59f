"""`canon`: dead code, duplicates and constants go; the function and everything else stay."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ir.edit import Editor
from ir.program import Program
from ir.text import dump
from passes.base import Context, Log
from passes.canon import Canon
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from tests.golden import check_golden
from tests.watch import batches, values

aten = torch.ops.aten


def littered(program: Program) -> Program:
    """A copy with, per block, a call made twice and a call that nothing reads, and one constant expression."""
    program = program.clone()
    editor = Editor(program, "litter")
    for silu in list(program.calls(aten.silu)):
        product = next(iter(silu.users))
        twin = editor.before(product).call(aten.silu.default, silu.args[0], like=silu)
        editor.call(aten.neg.default, twin, like=silu)
        # Both are read, so that the second goes by merging alone.
        both = editor.call(aten.add.Tensor, product.args[1], twin, like=product)
        editor.set_args(product, (silu, both))
    norm = next(program.calls(aten.rms_norm))
    gain = norm.args[2]
    assert isinstance(gain, fx.Node)
    doubled = editor.before(norm).call(aten.mul.Tensor, gain, 2.0, type=gain.meta["type"])
    editor.set_args(norm, (*norm.args[:2], doubled, *norm.args[3:]))
    return program


def test_what_it_removes_and_what_it_keeps(tiny_model: Program) -> None:
    program, log, ids = littered(tiny_model), Log("canon"), batches((2, 7))[0]
    before = values(program, ids)[program.outputs[0].name]
    Canon().run(program, Context(log=log))
    assert torch.equal(values(program, ids)[program.outputs[0].name], before)
    assert len(list(program.calls(aten.silu))) == 2 and not list(program.calls(aten.neg))
    figures = log.reports[0].figures
    assert (figures["merged"], figures["removed"], figures["folded"]) == (2, 2, 1)
    gone = set(tiny_model.params) - set(program.params)
    new = set(program.params) - set(tiny_model.params)
    assert gone == {"model.layers.0.input_layernorm.weight"} and len(new) == 1
    assert torch.equal(program.params.get(new.pop()), 2 * tiny_model.params.get(gone.pop()))


def test_twice_is_once(tiny_model: Program) -> None:
    program = littered(tiny_model)
    first, second = run_pipeline(program, parse("canon,canon"), Context(), Settings())
    assert first.changed and not second.changed
    assert first.probe_error is not None and first.probe_error < 1e-12
    assert program.history == (*tiny_model.history, "canon")


def test_golden_dump(tiny_model: Program, request: pytest.FixtureRequest) -> None:
    program = littered(tiny_model)
    run_pipeline(program, parse("canon"), Context(), Settings())
    check_golden("canon.ir", dump(program), request)
