"""The matcher: which calls a picture fits, how arguments are compared, and what a miss says."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import pytest
import torch
from torch import fx

from ir.errors import InvariantError
from ir.pattern import Demands, Match, Miss, draw, match
from ir.program import Program
from ir.rewrite import Rules
from tests.drafts import Draft, one

aten = torch.ops.aten


def find(picture: Any, program: Program, explain: bool = False, **words: str) -> Match | Miss:
    """Look for a picture at the only output; words: names under `params`, `optional`, `consts`."""
    given = tuple(inspect.signature(picture).parameters)
    demands = Demands(**{demand: frozenset(names.split()) for demand, names in words.items()})
    return match(draw(picture, given, "here"), program.outputs[0], demands, explain)


def bound(picture: Any, program: Program, **words: str) -> dict[str, Any] | None:
    """Return what a picture binds, nodes by name, or None for a miss."""
    found = find(picture, program, **words)
    if isinstance(found, Miss):
        return None
    return {k: v.name if isinstance(v, fx.Node) else v for k, v in found.values.items()}


@pytest.mark.parametrize(
    ("picture", "call", "wanted"),
    [
        (lambda x, d: aten.mean(x, dim=d), (aten.mean.dim, ["x", [-1]], {}), {"x": "x", "d": [-1]}),
        (lambda x: aten.mean(x, -1), (aten.mean.dim, ["x", [-1]], {}), {"x": "x"}),
        (lambda x: aten.mean(x, dim=[-1], keepdim=False), (aten.mean.dim, ["x", [-1]], {}), {"x": "x"}),
        (lambda x: aten.mean(x, -1), (aten.mean.dim, ["x", [-1], False], {}), {"x": "x"}),
        (lambda x: aten.mean(x, -1), (aten.mean.dim, ["x", [-1], True], {}), None),
        (lambda x: aten.mean(x, -1), (aten.mean.dim, ["x", [-1]], {"dtype": torch.float32}), None),
        (lambda x: aten.mean(x, dtype=None), (aten.mean.dim, ["x", [-1]], {}), None),
        (lambda x, t: aten.mean(x, -1, dtype=t), (aten.mean.dim, ["x", [-1]], {}), {"x": "x", "t": None}),
        (lambda x: aten.to(x, torch.float32), (aten.to.dtype, ["x", torch.float32], {}), {"x": "x"}),
        (lambda x: aten.to(x, torch.float32), (aten.to.dtype, ["x", torch.float16], {}), None),
        (lambda x, t: aten.to(x, dtype=t), (aten.to.dtype, ["x", torch.half], {}), {"x": "x", "t": torch.half}),
        (lambda x: aten.pow(x, 2), (aten.pow.Tensor_Scalar, ["x", 2.0], {}), {"x": "x"}),
        (lambda x: aten.pow(x, 2), (aten.pow.Tensor_Scalar, ["x", 3], {}), None),
        (lambda x: aten.pow(x, 1), (aten.pow.Tensor_Scalar, ["x", True], {}), None),
        (lambda x: aten.pow(x, 2), (aten.pow.Tensor_Tensor, ["x", "y"], {}), None),
        (lambda x, n: aten.view(x, [2, n]), (aten.view.default, ["x", [2, 4]], {}), {"x": "x", "n": 4}),
        (lambda x, n: aten.view(x, [2, n]), (aten.view.default, ["x", [2, 2, 2]], {}), None),
        (lambda x: aten.mul.Scalar(x, 2), (aten.mul.Tensor, ["x", 2], {}), None),
        (lambda x: aten.mul.Tensor(x, 2), (aten.mul.Tensor, ["x", 2], {}), {"x": "x"}),
        (lambda x, y: aten.mul(x, x), (aten.mul.Tensor, ["x", "y"], {}), None),
        (lambda x, y: aten.mul(x, x), (aten.mul.Tensor, ["x", "x"], {}), {"x": "x", "y": None}),
        (lambda x: x[:, 1], (operator.getitem, ["x", (slice(None), 1)], {}), {"x": "x"}),
        (lambda x: x[0], (operator.getitem, ["x", 1], {}), None),
    ],
)
def test_arguments_are_compared_in_full_positional_form(picture: Any, call: Any, wanted: Any) -> None:
    target, args, kwargs = call
    assert bound(picture, one(target, *args, **kwargs)) == wanted


@pytest.mark.parametrize(
    ("target", "extra", "commutes"),
    [
        (aten.mul.Tensor, {}, True),
        (aten.add.Tensor, {}, True),
        (aten.add.Tensor, {"alpha": 2}, False),
        (aten.eq.Tensor, {}, True),
        (aten.maximum.default, {}, True),
        (aten.logical_and.default, {}, True),
        (operator.mul, {}, True),
        (aten.sub.Tensor, {}, False),
        (aten.div.Tensor, {}, False),
    ],
)
def test_commutative_operands_match_in_either_order(target: Any, extra: Any, commutes: bool) -> None:
    packet = getattr(target, "overloadpacket", target)

    def picture(x: Any, w: Any) -> Any:
        return packet(x, w, **extra)

    wanted = {"x": "x", "w": "p"}
    assert bound(picture, one(target, "x", "p", **extra), params="w") == wanted
    assert bound(picture, one(target, "p", "x", **extra), params="w") == (wanted if commutes else None)


def test_order_as_written_is_tried_first_and_demands_settle_it() -> None:
    def add(a: Any, b: Any) -> Any:
        return aten.add(b, a)

    assert bound(add, one(aten.add.Tensor, "p", "x")) == {"a": "x", "b": "p"}
    assert bound(add, one(aten.add.Tensor, "p", "x"), params="a") == {"a": "p", "b": "x"}
    assert bound(add, one(aten.add.Tensor, "x", 1e-5), consts="b") == {"a": "x", "b": 1e-5}
    assert bound(add, one(aten.add.Tensor, "p", "x"), optional="a") == {"a": "p", "b": "x"}
    assert bound(add, one(aten.add.Tensor, "x", "y"), params="a") is None


def test_backtracking_reorders_an_outer_call_when_an_inner_one_does_not_fit() -> None:
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    left = draft.call(aten.mul.Tensor, y, draft.call(aten.neg.default, x), name="left")
    right = draft.call(aten.mul.Tensor, draft.call(aten.exp.default, x), y, name="right")
    program = draft.program(draft.call(aten.add.Tensor, left, right))
    picture = lambda x, y: aten.add(aten.mul(aten.exp(x), y), aten.mul(aten.neg(x), y))  # noqa: E731
    assert bound(picture, program) == {"x": "x", "y": "y"}


def test_optional_parameter_may_be_absent_but_not_computed() -> None:
    def linear(*bias: str) -> Program:
        draft = Draft(p=torch.ones(4, dtype=torch.float64), w=torch.ones(4, 4, dtype=torch.float64))
        nodes = {"x": draft.input("x"), "p": draft.param("p")}
        return draft.program(draft.call(aten.linear.default, nodes["x"], draft.param("w"), *(nodes[b] for b in bias)))

    def picture(x: Any, w: Any, bias: Any) -> Any:
        return aten.linear(x, w, bias)

    for given_bias, wanted in (((), None), (("p",), "p")):
        values = bound(picture, linear(*given_bias), params="w", optional="bias")
        assert values is not None and values["bias"] == wanted
    assert bound(picture, linear("x"), params="w", optional="bias") is None


def test_one_drawn_call_read_twice_is_one_call_in_the_graph() -> None:
    def silu(x: Any) -> Any:
        y = aten.neg(x)
        return aten.mul(y, aten.sigmoid(y))

    for same in (True, False):
        draft = Draft()
        x = draft.input("x")
        y = draft.call(aten.neg.default, x)
        z = y if same else draft.call(aten.neg.default, x)
        program = draft.program(draft.call(aten.mul.Tensor, draft.call(aten.sigmoid.default, y), z))
        assert (bound(silu, program) is not None) == same


def test_outputs_of_a_call_are_told_apart_by_getitem() -> None:
    draft = Draft()
    x = draft.input("x")
    pair = draft.call(aten.split.Tensor, x, 2, -1, kind=(draft.kind, draft.kind))
    a, b = (draft.call(operator.getitem, pair, i, name=f"half{i}") for i in range(2))
    program = draft.program(draft.call(aten.cat.default, [a, b], -1, name="whole"))

    def halves(x: Any, n: Any, d: Any) -> Any:
        return aten.cat([aten.split(x, n, d)[0], aten.split(x, n, d)[1]], d)

    def swapped(x: Any, n: Any, d: Any) -> Any:
        return aten.cat([aten.split(x, n, d)[1], aten.split(x, n, d)[0]], d)

    assert bound(halves, program) == {"x": "x", "n": 2, "d": -1}
    assert bound(swapped, program) is None
    found = find(halves, program)
    assert isinstance(found, Match) and {n.name for n in found.nodes} == {"whole", "half0", "half1", pair.name}
    assert found.nodes[0].name == "whole"


def reason(picture: Any, program: Program, **words: str) -> str:
    found = find(picture, program, explain=True, **words)
    assert isinstance(found, Miss)
    return found.reason


def test_a_miss_names_what_differs() -> None:
    draft = Draft(p=torch.ones(4, dtype=torch.float64))
    x, p = draft.input("x"), draft.param("p")
    mean = draft.call(aten.mean.dim, x, [-1], name="mean")
    program = draft.program(draft.call(aten.add.Tensor, mean, p, name="out"))
    assert (
        reason(lambda x, w: aten.add(aten.mean(x, -1, True), w), program)
        == "keepdim of mean (aten.mean.dim) is False, not True"
    )
    assert reason(lambda x, w: aten.add(aten.exp(x), w), program) == "mean (aten.mean.dim) is not aten.exp"
    sums = one(aten.add.Tensor, "x", "y")
    assert reason(lambda x, w: aten.add(w, x), sums, params="w") == "w must be a parameter and is x (placeholder)"
    assert reason(lambda x: aten.add(x, x), sums) == "x is x (placeholder), and here y (placeholder)"
    lists = one(aten.view.default, "x", [2, 4])
    assert reason(lambda x: aten.view(x, [8]), lists) == "[2, 4] has 2 items, the picture 1"
    assert "are not of the kind drawn" in reason(lambda x: aten.view(x, dtype=torch.int8), lists)
    assert find(lambda x: aten.add(x, x), sums) == Miss()


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (lambda x: x, "is x, not a call"),
        (lambda x: x.float(), "call_method float"),
        (lambda y: aten.neg(aten.neg(y)), r"takes \(x\) but its pictures bind \(y\)"),
    ],
)
def test_a_wrong_picture_is_named_when_the_rule_is_entered(picture: Any, words: str) -> None:
    with pytest.raises(InvariantError, match=words):
        Rules("r")(picture)(lambda b, x: x)
    with pytest.raises(InvariantError, match="demands something of z"):
        Rules("r")(aten.neg, params="z")(lambda b, x: x)
