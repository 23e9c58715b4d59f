"""The builder of rewrite rules: parameters it writes, overloads it picks, and how it is undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from ir.builder import Builder
from ir.errors import InvariantError
from ir.program import PATH, TYPE
from ir.rewrite import No, Refusal, Rules
from ir.types import ScalarType, TensorType, tensor_type
from tests.drafts import Draft, one, run

aten = torch.ops.aten


def test_refused_overwrite_of_a_parameter_is_taken_back() -> None:
    program, rules = one(aten.mul.Tensor, "x", "p"), Rules("r")

    @rules(aten.mul, params="p")
    def widen(b: Builder, x: fx.Node, p: fx.Node) -> No:
        b.param(p, torch.zeros(7, 7))
        b.call(aten.mul, x, b.param(b.fresh("q"), torch.zeros(3)), like=x)
        return No("changed its mind")

    old, before, version = program.params.get("p"), str(program.graph), program.version
    assert rules.apply(program).refusals == (Refusal("widen", "out", "changed its mind"),)
    assert program.params.get("p") is old and program.node("p").meta[TYPE] == tensor_type(old)
    assert program.params.entry("p").written_by == "" and "q" not in program.params
    assert str(program.graph) == before and program.version == version


def test_shared_parameter_is_seen_by_users_by_twin_nodes_and_by_ties() -> None:
    rules, seen = Rules("r"), []

    @rules(aten.mul, params="p")
    def look(b: Builder, x: fx.Node, p: fx.Node) -> No:
        seen.append((b.shared(p), len(b.users(p))))
        with pytest.raises(TypeError, match="x is computed, not a parameter"):
            b.shared(x)
        return No("looked")

    for case in ("alone", "users", "twins", "tied"):
        draft = Draft(p=torch.ones(2, 4, dtype=torch.float64))
        x, p = draft.input("x"), draft.param("p")
        y = draft.call(aten.mul.Tensor, x, p)
        other = {"users": p, "twins": draft.param("p")}.get(case, x)
        program = draft.program(y, draft.call(aten.neg.default, other))
        if case == "tied":
            program.params.tie("head", "p")
        rules.apply(program)
    assert seen == [(False, 1), (True, 2), (True, 1), (True, 1)]


def test_rewriting_a_shared_parameter_makes_a_fresh_one() -> None:
    draft = Draft(w=torch.ones(4, dtype=torch.float64))
    x, w = draft.input("x"), draft.param("w")
    program = draft.program(draft.call(aten.mul.Tensor, x, w), draft.call(aten.add.Tensor, x, w))
    rules = Rules("r")

    @rules(aten.mul, params="w")
    def square(b: Builder, x: fx.Node, w: fx.Node) -> fx.Node | No:
        return No("done") if str(w.target) == "w2" else b.call(aten.mul, x, b.param(w, b.value(w) * 3), like=b.root)

    rules.apply(program)
    out = run(program, torch.ones(2, 4, dtype=torch.float64))
    assert out[0].eq(3).all() and out[1].eq(2).all() and sorted(program.params) == ["w", "w2"]


def test_multi_node_replacement_and_overloads_by_kind() -> None:
    program, rules = one(aten.neg.default, "x"), Rules("r")

    @rules(aten.neg)
    def spell(b: Builder, x: fx.Node) -> fx.Node:
        size = b.call(aten.sym_size, x, 0, type=ScalarType("int", "2"))
        y = b.call(aten.sub, b.call(aten.mul, x, size, like=x), b.call(aten.mul, x, x, like=x), like=x)
        return b.call(aten.mean, b.call(aten.stack, [y, y], like=b.root), [0], like=b.root)

    rules.apply(program)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets == [
        *("aten.sym_size.int", "aten.mul.Tensor", "aten.mul.Tensor", "aten.sub.Tensor"),
        *("aten.stack.default", "aten.mean.dim"),
    ]
    assert {n.meta[PATH] for n in program.graph.nodes if n.op == "call_function"} == {"model.out"}
    x = torch.arange(8, dtype=torch.float64).view(2, 4)
    assert torch.equal(run(program, x, x)[0], 2 * x - x * x)


def broken(body: Any) -> str:
    program, rules = one(aten.neg.default, "x"), Rules("r")
    rules(aten.neg)(body)
    before = str(program.graph)
    with pytest.raises(InvariantError) as caught:
        rules.apply(program)
    assert str(program.graph) == before
    return str(caught.value)


def test_a_wrong_body_is_named_with_file_and_line_and_undone() -> None:
    def returns_none(b: Builder, x: fx.Node) -> None:
        b.call(aten.exp, x, like=x)

    def returns_root(b: Builder, x: fx.Node) -> fx.Node:
        return b.root

    def reads_root(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.exp, b.root, like=x)

    def changes_dtype(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.exp, x, type=TensorType(torch.float32, (2, 4)))

    def untyped(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.exp, x)

    def no_overload(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.mean, x, "rows", like=x)

    for body, words in (
        (returns_none, "neither a node nor No"),
        (returns_root, "returned the root unchanged"),
        (reads_root, "out is not computed before out"),
        (changes_dtype, "is f32[2,4], but out is f64[2,4]"),
        (untyped, "without a type"),
        (no_overload, "no overload of aten.mean"),
    ):
        message = broken(body)
        assert words in message and "test_builder.py:" in message and f"rule {body.__name__}" in message


def test_an_exception_in_a_body_passes_with_a_note_of_the_rule() -> None:
    program, rules = one(aten.neg.default, "x"), Rules("r")

    @rules(aten.neg)
    def crash(b: Builder, x: fx.Node) -> fx.Node:
        b.call(aten.exp, x, like=x)
        raise ZeroDivisionError("by zero")

    before = str(program.graph)
    with pytest.raises(ZeroDivisionError) as caught:
        rules.apply(program)
    assert "rule crash (" in caught.value.__notes__[0] and "at out" in caught.value.__notes__[0]
    assert str(program.graph) == before
