"""`canon`: dead code, duplicates and constants go; the function and everything else stay."""

from __future__ import annotations

import pytest
import torch

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
    """A copy with a call made twice, a call that nothing reads, and a sum of constants."""
    program = program.clone()
    editor = Editor(program, "litter")
    for silu in list(program.calls(aten.silu)):
        user = next(iter(silu.users))
        twin = editor.before(user).call(aten.silu.default, silu.args[0], like=silu)
        # Both are read, so that only merging them makes one go.
        editor.set_args(user, tuple(twin if a is silu else a for a in user.args))
        editor.call(aten.neg.default, twin, like=silu)
        other = editor.call(aten.mul.Tensor, silu, 1.0, like=silu)
        editor.set_args(user, (user.args[0], editor.before(user).call(aten.sub.Tensor, user.args[1], other, like=silu)))
    return program


def test_what_it_removes_and_what_it_keeps(tiny_model: Program) -> None:
    program, log, ids = littered(tiny_model), Log("canon"), batches((2, 7))[0]
    before = values(program, ids)[program.outputs[0].name]
    Canon().run(program, Context(log=log))
    assert torch.equal(values(program, ids)[program.outputs[0].name], before)
    assert len(list(program.calls(aten.silu))) == 2 and not list(program.calls(aten.neg))
    figures = log.reports[0].figures
    assert (figures["merged"], figures["removed"]) == (2, 2)
    assert set(program.params) == set(tiny_model.params)


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
