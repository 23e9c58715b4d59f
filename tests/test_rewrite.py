"""The rewrite engine: what matches, what is refused and why, and what a rewritten program keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from ir.builder import Builder
from ir.errors import InvariantError
from ir.program import ORIGIN, PATH, TYPE, Program
from ir.rewrite import Hit, No, Refusal, Rules
from ir.types import TensorType
from tests.drafts import Draft, names, one, run

aten = torch.ops.aten


def gained(fan: int = 1, gain: torch.Tensor | None = None, swap: bool = False) -> Program:
    """A per-channel gain before `fan` linears."""
    generator = torch.Generator().manual_seed(1)
    weights = {f"w{i}": torch.randn(4, 4, generator=generator, dtype=torch.float64) for i in range(fan)}
    gain = torch.rand(4, generator=generator, dtype=torch.float64) if gain is None else gain
    draft = Draft(g=gain, **weights)
    x, g = draft.input("x"), draft.param("g")
    mul = draft.call(aten.mul.Tensor, *((g, x) if swap else (x, g)), name="scaled")
    return draft.program(
        *(draft.call(aten.linear.default, mul, draft.param(f"w{i}"), name=f"proj{i}") for i in range(fan))
    )


def gain_rules(sole: bool = False) -> Rules:
    rules = Rules("norms")

    @rules(lambda x, g, w: aten.linear(aten.mul(x, g), w), params="g w", sole=sole)
    def gain_into_linear(b: Builder, x: fx.Node, g: fx.Node, w: fx.Node) -> fx.Node | No:
        weight = b.param("folded", b.value(w) * b.value(g))
        if b.value(g).ndim != 1:
            return No("gain is not per channel", g)
        if b.shared(w):
            return No("weight is shared", w)
        del weight
        return b.call(aten.linear, x, b.param(w, b.value(w) * b.value(g)), like=b.root)

    return rules


# -- The worked example ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_gain_moves_into_every_linear_it_feeds(swap: bool) -> None:
    program = gained(fan=3, swap=swap)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = run(program, x)
    log = gain_rules().apply(program)
    assert log.hits == tuple(Hit("gain_into_linear", f"proj{i}") for i in range(3))
    assert log.refusals == () and log.counts() == {"gain_into_linear": 3}
    program.graph.lint()
    for a, b in zip(before, run(program, x), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)
    program.params.put("w0", program.params.get("w0") * (1 + 1e-9), "test")
    assert not torch.allclose(before[0], run(program, x)[0], rtol=0, atol=1e-14)


def test_replacement_keeps_name_type_path_and_tells_its_origin() -> None:
    program = gained()
    gain_rules().apply(program, by="canon")
    (node,) = program.calls(aten.linear)
    assert (node.name, node.meta[PATH], node.meta[ORIGIN]) == ("proj0", "model.proj0", "canon/gain_into_linear")
    assert node.target is aten.linear.default and node.meta[TYPE] == TensorType(torch.float64, (2, 4))
    assert program.params.entry("w0").written_by == "canon/gain_into_linear"
    again = gained()
    gain_rules().apply(again)
    assert again.node("proj0").meta[ORIGIN] == "norms/gain_into_linear"


def test_dead_nodes_and_unread_parameters_go() -> None:
    program = gained(fan=2)
    gain_rules().apply(program)
    assert names(program) == ["proj0", "proj1"]
    assert sorted(program.params) == ["w0", "w1"]


def test_refusal_is_recorded_and_leaves_no_trace() -> None:
    program = gained(gain=torch.ones(1, 4, dtype=torch.float64))
    before, version = str(program.graph), program.version
    log = gain_rules().apply(program)
    assert log.hits == ()
    assert log.refusals == (Refusal("gain_into_linear", "proj0", "gain is not per channel", "g"),)
    assert str(program.graph) == before and program.version == version
    assert "folded" not in program.params and program.params.writes == []


# -- Inner calls that others read --------------------------------------------------------------------------------------


def test_sole_refuses_a_match_whose_inside_is_read_elsewhere() -> None:
    program = gained(fan=2)
    log = gain_rules(sole=True).apply(program)
    assert log.hits == ()
    reason = "scaled is also read by"
    assert [(r.node, r.reason, r.culprit) for r in log.refusals] == [
        ("proj0", f"{reason} proj1", "scaled"),
        ("proj1", f"{reason} proj0", "scaled"),
    ]
    assert gain_rules(sole=True).apply(gained()).counts() == {"gain_into_linear": 1}


def test_sole_is_asked_again_when_the_other_reader_goes() -> None:
    draft = Draft()
    x = draft.input("x")
    inner = draft.call(aten.exp.default, x)
    program = draft.program(
        draft.call(aten.neg.default, inner, name="kept"),
        draft.call(aten.sigmoid.default, inner, name="goes"),
    )
    rules = Rules("r")

    @rules(lambda x: aten.neg(aten.exp(x)), sole=True)
    def alone(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.cos, x, like=b.root)

    @rules(lambda x: aten.sigmoid(aten.exp(x)))
    def free(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.sin, x, like=b.root)

    log = rules.apply(program)
    assert log.hits == (Hit("free", "goes"), Hit("alone", "kept")) and log.refusals == ()


# -- Explaining --------------------------------------------------------------------------------------------------------


def test_explain_tells_how_far_a_rule_gets_and_why_it_stops() -> None:
    program = gained(gain=torch.ones(1, 4, dtype=torch.float64))
    version = program.version
    rules = gain_rules()
    assert rules.explain(program, "proj0") == ["gain_into_linear: refuses: gain is not per channel (at g)"]
    assert rules.explain(program, "scaled") == ["gain_into_linear: scaled (aten.mul.Tensor) is not aten.linear"]
    assert rules.explain(gained(), "proj0") == ["gain_into_linear: fires"]
    assert program.version == version and program.params.writes == []
    with pytest.raises(KeyError, match="no node named nothing"):
        rules.explain(program, "nothing")
    (line,) = gain_rules(sole=True).explain(gained(fan=2), "proj0")
    assert "scaled is also read by proj1" in line


# -- The driver --------------------------------------------------------------------------------------------------------


def test_new_nodes_are_visited_until_nothing_fires() -> None:
    draft = Draft()
    x = node = draft.input("x")
    for i in range(7):
        node = draft.call(aten.neg.default, node, name=f"neg{i}")
    program = draft.program(node)
    rules = Rules("r")

    @rules(lambda x: aten.neg(aten.neg(x)))
    def twice(b: Builder, x: fx.Node) -> fx.Node:
        return x

    assert rules.apply(program).counts() == {"twice": 3}
    (left,) = program.calls(aten.neg)
    assert left.args == (x,) and x.name == "x"


def other_rules() -> Rules:
    rules = Rules("others")

    @rules(lambda x: aten.exp(aten.neg(x)), aten.exp)
    def drop(b: Builder, x: fx.Node) -> fx.Node:
        return x

    return rules


def test_the_first_picture_that_matches_is_used() -> None:
    for inner, left in ((aten.neg.default, []), (aten.cos.default, ["cos_default"])):
        draft = Draft()
        program = draft.program(draft.call(aten.exp.default, draft.call(inner, draft.input("x"))))
        assert other_rules().apply(program).counts() == {"drop": 1} and names(program) == left


def test_dead_code_is_not_rewritten() -> None:
    draft = Draft()
    x = draft.input("x")
    draft.call(aten.exp.default, x, name="dead")
    program = draft.program(draft.call(aten.neg.default, x))
    assert other_rules().apply(program).hits == () and names(program) == ["dead", "neg_default"]


def test_rules_that_undo_each_other_are_named() -> None:
    program, rules = one(aten.neg.default, "x"), Rules("war")

    @rules(aten.neg)
    def to_mul(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.mul, x, -1, like=b.root)

    @rules(lambda x: aten.mul(x, -1))
    def to_neg(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.neg, x, like=b.root)

    with pytest.raises(InvariantError, match=r"(?s)to_mul and to_neg keep firing.*node out of program"):
        rules.apply(program)


def test_rule_sets_add_up_and_share_no_names() -> None:
    both = other_rules() + gain_rules()
    assert [r.name for r in both.rules] == ["drop", "gain_into_linear"] and both.name == "others+norms"
    assert both.apply(gained()).counts() == {"gain_into_linear": 1}
    with pytest.raises(InvariantError, match=r"(?s)two rules are called gain_into_linear.*test_rewrite\.py:\d+"):
        gain_rules() + gain_rules()


# -- Random graphs -----------------------------------------------------------------------------------------------------


def confluent(order: list[int]) -> Rules:
    every = Rules("all")

    @every(lambda x: aten.neg(aten.neg(x)))
    def double_neg(b: Builder, x: fx.Node) -> fx.Node:
        return x

    @every(lambda x: aten.add(x, 0))
    def add_zero(b: Builder, x: fx.Node) -> fx.Node:
        return x

    @every(lambda x, y: aten.sub(x, aten.neg(y)))
    def sub_neg(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        return b.call(aten.add, x, y, like=b.root)

    @every(aten.sub)
    def sub_to_add(b: Builder, x: fx.Node, y: fx.Node) -> fx.Node:
        return b.call(aten.add, x, b.call(aten.neg, y, like=y), like=b.root)

    every.rules = [every.rules[i] for i in order]
    return every


def grow(steps: list[tuple[int, int, int]]) -> Program:
    draft = Draft()
    nodes = [draft.input("x"), draft.input("y")]
    for kind, i, j in steps:
        a, b = nodes[i % len(nodes)], nodes[j % len(nodes)]
        make = [
            (aten.neg.default, a),
            (aten.add.Tensor, a, 0),
            (aten.sub.Tensor, a, b),
            (aten.mul.Tensor, a, b),
        ]
        nodes.append(draft.call(*make[kind]))
    return draft.program(nodes[-1], nodes[len(nodes) // 2])


def picture_of(program: Program) -> list[Any]:
    """The outputs as numbered expressions, equal for equal graphs whatever the names."""
    numbers: dict[Any, int] = {}

    def number(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        key = value.name if value.op == "placeholder" else (str(value.target), *map(number, value.args))
        return numbers.setdefault(key, len(numbers))

    return [[number(n) for n in program.outputs], list(numbers)]


STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=25)


@settings(max_examples=50)
@given(STEPS, st.permutations(range(4)))
def test_confluent_rules_end_in_one_graph_whatever_their_order(steps: Any, order: list[int]) -> None:
    first, second, again = grow(steps), grow(steps), grow(steps)
    x, y = torch.arange(8.0, dtype=torch.float64).view(2, 4), torch.full((2, 4), 3.0, dtype=torch.float64)
    before = run(first, x, y)
    confluent([0, 1, 2, 3]).apply(first)
    log = confluent(order).apply(second)
    assert picture_of(first) == picture_of(second)
    assert confluent(order).apply(again) == log and str(again.graph) == str(second.graph)
    assert confluent(order).apply(second).hits == ()
    for p in (first, second):
        p.graph.lint()
        assert all(torch.equal(a, b) for a, b in zip(before, run(p, x, y), strict=True))
        assert all(TYPE in n.meta for n in p.graph.nodes)
