"""The verifier: sound programs pass, and one broken edge, type, shape, dtype or parameter is always reported."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from ir.checks import Diagnostic
from ir.errors import InvariantError, UsageError
from ir.levels import COMPRESSED, MODEL, MODEL_OPS, target_level
from ir.params import MemorySource, ParamStore
from ir.program import TYPE, Program
from ir.propagate import check_runs, evaluate
from ir.types import ScalarType, TensorType
from ir.verify import check_finite, diagnose, verify
from tests.programs import F32, I64, Sketch, aten, compressed_program, hidden, nomul, odd_program, tiny_mlp_program

SOUND = [tiny_mlp_program, odd_program, compressed_program]


def nodes(program: Program, *ops: str) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op in ops]


def only(found: list[Diagnostic], check: str, rule: str) -> None:
    assert [d.check for d in found] == [check], "\n".join(map(str, found))
    assert rule in found[0].rule, found[0].rule


@pytest.mark.parametrize("make", SOUND)
@pytest.mark.parametrize("full", [False, True])
def test_sound_programs_pass(make: Callable[[], Program], full: bool) -> None:
    verify(make(), full=full)


@pytest.mark.parametrize("make", SOUND)
def test_clones_of_sound_programs_pass(make: Callable[[], Program]) -> None:
    verify(make().clone())


# Mutations: each breaks one thing of a sound program; hypothesis draws which one, and where.


def break_type(program: Program, draw: Callable[..., Any]) -> None:
    """Change a number among the dims of a tensor that linear, norm, code or head reads or gives."""
    able = [n for n in nodes(program, "get_attr", "placeholder", "call_function") if _numbers(n)]
    node = draw(st.sampled_from(able))
    kind = node.meta[TYPE]
    place = draw(st.sampled_from(_numbers(node)))
    dims = list(kind.dims)
    dims[place] += draw(st.sampled_from([1, 2, 7]))
    node.meta[TYPE] = TensorType(kind.dtype, tuple(dims))


def _numbers(node: fx.Node) -> list[int]:
    # A placeholder's dim of 1 broadcasts, and another size of it is only seen when run.
    kind = node.meta[TYPE]
    return [k for k, d in enumerate(kind.dims) if isinstance(d, int) and d > 2] if isinstance(kind, TensorType) else []


def break_dtype(program: Program, draw: Callable[..., Any]) -> None:
    """Change the dtype recorded on a parameter."""
    node = draw(st.sampled_from(nodes(program, "get_attr")))
    node.meta[TYPE] = TensorType(torch.float64, node.meta[TYPE].dims)


def drop_type(program: Program, draw: Callable[..., Any]) -> None:
    """Forget a type, or make it none."""
    node = draw(st.sampled_from(nodes(program, "get_attr", "placeholder", "call_function")))
    del node.meta[TYPE]
    if draw(st.booleans()):
        node.meta[TYPE] = None


def break_edge(program: Program, draw: Callable[..., Any]) -> None:
    """Make a call read its own result or a later one."""
    calls = nodes(program, "call_function")
    node = draw(st.sampled_from(calls))
    later = draw(st.sampled_from(calls[calls.index(node) :]))
    source = draw(st.sampled_from(node.all_input_nodes))
    node.replace_input_with(source, later)


def break_param(program: Program, draw: Callable[..., Any]) -> None:
    """Make a parameter node name nothing in the store."""
    draw(st.sampled_from(nodes(program, "get_attr"))).target = "nowhere.weight"


def change_stored(program: Program, draw: Callable[..., Any]) -> None:
    """Write a parameter of another shape or dtype behind the graph's back."""
    name = str(draw(st.sampled_from(nodes(program, "get_attr"))).target)
    tensor = program.params.get(name)
    narrow = tensor.to(torch.int16) if draw(st.booleans()) else torch.cat([tensor, tensor])
    program.params.put(name, narrow, "meddler")


def change_code(program: Program, draw: Callable[..., Any]) -> None:
    """Write a parameter of another shape or dtype, with its node's type in step: only the call's rule can tell."""
    able = [n for n in nodes(program, "get_attr") if n.users and len(n.meta[TYPE].dims) > 1]
    node = draw(st.sampled_from(able))
    tensor = program.params.get(str(node.target))
    change = st.sampled_from(["dtype", "wider", "taller", "rank"])
    made = {
        "dtype": lambda: tensor.to(torch.float64),
        "wider": lambda: torch.cat([tensor, tensor], -1),
        "taller": lambda: torch.cat([tensor, tensor], -2),
        "rank": lambda: tensor[None],
    }[draw(change)]()
    program.params.put(str(node.target), made, "meddler")
    node.meta[TYPE] = program.params.type_of(str(node.target))


def rename_twice(program: Program, draw: Callable[..., Any]) -> None:
    """Give two values one name."""
    first, second = draw(
        st.lists(st.sampled_from(nodes(program, "call_function")), min_size=2, max_size=2, unique=True)
    )
    second.name = first.name


def wrong_arguments(program: Program, draw: Callable[..., Any]) -> None:
    """Give a call an argument its operator does not have."""
    node = draw(st.sampled_from([n for n in nodes(program, "call_function") if "operator" not in str(n.target)]))
    node.kwargs = {**node.kwargs, "colour": 3}


def lose_output(program: Program, draw: Callable[..., Any]) -> None:
    """Return nothing, or erase the output."""
    if draw(st.booleans()):
        program.graph.erase_node(program.output)
    else:
        program.output.args = ((),)


MUTATIONS = [
    break_type,
    break_dtype,
    drop_type,
    break_edge,
    break_param,
    change_stored,
    change_code,
    rename_twice,
    wrong_arguments,
    lose_output,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
@given(data=st.data())
def test_every_mutation_is_reported(mutate: Callable[..., None], data: st.DataObject) -> None:
    make = data.draw(st.sampled_from([tiny_mlp_program, compressed_program]))
    program = make()
    mutate(program, data.draw)
    with pytest.raises(InvariantError, match=r"breaks .* of level"):
        verify(program)


@given(data=st.data())
def test_wrong_symbols_and_dtypes_show_when_run(data: st.DataObject) -> None:
    program = data.draw(st.sampled_from([tiny_mlp_program, compressed_program]))()
    node = data.draw(st.sampled_from(nodes(program, "call_function")))
    kind = node.meta[TYPE]
    if data.draw(st.booleans()):
        swap = {"batch": "seq", "seq": "batch"}
        kind = TensorType(kind.dtype, tuple(swap.get(d, d) for d in kind.dims))
    else:
        kind = TensorType(torch.float64, kind.dims)
    node.meta[TYPE] = kind
    with pytest.raises(InvariantError):
        verify(program, full=True)


def _calling(target: Any, *more: Any, type: Any = None, **kwargs: Any) -> Program:
    sketch = Sketch()
    x = sketch.input("x", hidden(4))
    return sketch.program(sketch.call(target, x, *more, type=type or hidden(4), by="some pass", **kwargs))


@pytest.mark.parametrize(
    ("target", "more", "rule"),
    [
        (aten.relu_.default, (), "aten.relu_ writes into its arguments"),
        (aten.add_.Tensor, (1,), "aten.add_ writes into its arguments"),
        (aten.dropout.default, (0.1, True), "aten.dropout draws random numbers"),
        (aten.rand_like.default, (), "aten.rand_like draws random numbers"),
        (aten.digamma.default, (), "aten.digamma is not allowed at level model"),
        (aten.special_i0e.default, (), "aten.special_i0e is not allowed"),
        (torch.ops.higher_order.cond, (), "higher-order operators are not allowed"),
        (torch.nn.functional.silu, (), "a program cannot call"),
        (
            nomul.quant_linear.default,
            (None, None, None, None, 3, 8),
            "nomul.quant_linear is not allowed at level model",
        ),
    ],
)
def test_operators_outside_the_level_are_reported(target: Any, more: tuple[Any, ...], rule: str) -> None:
    found = [d for d in diagnose(_calling(target, *more)) if d.check == "ops"]
    only(found, "ops", rule)
    assert found[0].origin == "some pass"


def test_assertions_are_reported() -> None:
    found = diagnose(_calling(aten._assert_async.msg, "no", type=ScalarType("int", "1")))
    assert "is an assertion" in found[0].rule


def test_whitelist_names_exist() -> None:
    """A name that torch does not know is a slip of the pen that would never allow anything."""
    for name in MODEL_OPS:
        namespace, _, op = name.partition(".")
        if namespace in ("aten", "nomul"):
            packet = getattr(getattr(torch.ops, namespace), op)
            assert any(not getattr(packet, o)._schema.is_mutable for o in packet.overloads()), name


def test_levels_allow_what_they_say() -> None:
    assert MODEL.allows("nomul.rope") and not MODEL.allows("nomul.quant_linear")
    assert COMPRESSED.allows("nomul.quant_linear") and COMPRESSED.allows("aten.linear")
    packed = target_level(["aten.linear"], ["packed"])
    assert packed.allows("packed.anything") and not packed.allows("nomul.rope")


def test_target_level_is_the_backends() -> None:
    program = tiny_mlp_program()
    program.level = "target"
    with pytest.raises(UsageError, match="without its backend"):
        verify(program)
    verify(program, level=target_level(MODEL_OPS))
    with pytest.raises(InvariantError, match=r"aten\.embedding is not allowed at level target"):
        verify(program, level=target_level(MODEL_OPS - {"aten.embedding"}))


def test_diagnostic_says_line_type_maker_rule_and_cure() -> None:
    program = compressed_program()
    node = program.node("quant_linear")
    node.args = (*node.args[:6], 5)
    with pytest.raises(InvariantError) as caught:
        verify(program)
    text = str(caught.value)
    assert "nomul.quant_linear: the dims of scales must be [8,3], but it is [8,2]" in text
    assert "at: %quant_linear = nomul.quant_linear(%shiftadd_linear, @o.codes, @o.scales, @o.zeros, None, 3, 5)" in text
    assert "type: f32[batch,2,seq,8]; made by: quant" in text
    assert "try: " in text


def test_report_is_cut_after_ten() -> None:
    program = tiny_mlp_program(blocks=5)
    for node in nodes(program, "call_function"):
        node.meta.clear()
    with pytest.raises(InvariantError, match="and 28 more"):
        verify(program)


def test_tied_name_is_not_read() -> None:
    program = tiny_mlp_program()
    node = nodes(program, "get_attr")[0]
    node.target = "lm_head.weight"
    only(diagnose(program), "params", "@lm_head.weight is tied to @model.embed_tokens.weight")


def test_name_that_extends_another_is_reported() -> None:
    program = tiny_mlp_program()
    program.params.put("model.norm.weight.codes", torch.ones(2), "pass")
    only(diagnose(program), "params", "@model.norm.weight.codes extends the name of another parameter")


def test_non_finite_weights_are_counted() -> None:
    program = tiny_mlp_program()
    weight = program.params.get("model.norm.weight").clone()
    weight[:3], weight[5] = float("nan"), -float("inf")
    program.params.put("model.norm.weight", weight, "fold")
    verify(program)
    only(
        check_finite(program), "finite", "@model.norm.weight has 3 NaN and 1 infinite entries of 16; it comes from fold"
    )
    only(diagnose(program, full=True), "finite", "model.norm.weight")


@pytest.mark.parametrize(
    ("target", "more", "kind", "rule"),
    [
        (aten.add.Tensor, (), hidden(5), "the result's dims must be [batch,seq,4]"),
        (aten.transpose.int, (0, 3), hidden(4), "must lie within"),
        (aten.transpose.int, (-1, 0), hidden(4, 5), "the result's dims"),
        (aten.permute.default, ([0, 0, 1],), hidden(4), "must be an order of the 3 dims"),
        (aten._to_copy.default, (), hidden(4, dtype=I64), ""),
        (aten.to.dtype, (torch.float16,), hidden(4), "the result must be torch.float16"),
        (aten.topk.default, (2,), hidden(2), "aten.topk returns 2 values"),
        (aten.split.Tensor, (2,), hidden(2), "returns a list of tensors"),
        (aten.sym_size.int, (1,), hidden(2), "returns a number"),
        (aten.silu.default, (), ScalarType("int", "1"), "returns one tensor"),
        (operator.getitem, (0,), hidden(2), "only tuples have items"),
        (aten.softmax.int, (-1,), hidden(3), "the result's dims"),
        (aten.matmul.default, (), hidden(4), "the inner dims must agree"),
        (aten.rms_norm.default, ([5],), hidden(4), "the normalised shape must be [4], but it is [5]"),
        (aten.cat.default, (), hidden(9), "the result's dims must be [batch,seq,8]"),
        (aten.cat.default, (7,), hidden(8), "dim must lie within 3 dims"),
        (aten.embedding.default, (), hidden(4), "indices must be i64 or i32"),
        (aten.scaled_dot_product_attention.default, (None, 0.5), hidden(4), "dropout_p must be 0"),
    ],
)
def test_rows_of_operators(target: Any, more: tuple[Any, ...], kind: Any, rule: str) -> None:
    sketch = Sketch()
    x, y = sketch.input("x", hidden(4)), sketch.input("y", TensorType(F32, (6, 4)))
    operands: dict[Any, tuple[Any, ...]] = {
        aten.add.Tensor: (x, 1.0),
        aten.matmul.default: (x, y),
        aten.cat.default: ([x, x], -1) if not more else ([x, x],),
        aten.embedding.default: (y, x),
        aten.scaled_dot_product_attention.default: (x, x, x),
    }
    node = sketch.call(target, *operands.get(target, (x,)), *more, type=kind)
    rules = [d.rule for d in diagnose(sketch.program(node))]
    assert any(rule in r for r in rules) if rule else not rules, rules


def test_empty_piece_fits_any_concatenation() -> None:
    sketch = Sketch()
    x, empty = sketch.input("x", hidden(4)), sketch.input("e", TensorType(F32, (0,)))
    assert not diagnose(sketch.program(sketch.call(aten.cat.default, [empty, x], 1, type=hidden(4))))


def test_reshape_keeps_the_number_of_elements() -> None:
    sketch = Sketch()
    x = sketch.input("x", TensorType(F32, (4, 6)))
    only(
        diagnose(sketch.program(sketch.call(aten.view.default, x, [3, 7], type=TensorType(F32, (3, 7))))),
        "operands",
        "must have 24 elements",
    )


def test_item_index_and_type_are_checked() -> None:
    sketch = Sketch()
    x = sketch.input("x", hidden(4))
    top = sketch.call(aten.topk.default, x, 2, type=(hidden(2), hidden(2, dtype=I64)))
    wrong = sketch.call(operator.getitem, top, 1, type=hidden(2))
    beyond = sketch.call(operator.getitem, top, 2, type=hidden(2))
    rules = [d.rule for d in diagnose(sketch.program(wrong, beyond))]
    assert "value 1 of the source is i64[batch,seq,2], not f32[batch,seq,2]" in rules[0]
    assert "the index must lie within the 2 values" in rules[1]


def test_grouped_linear_row() -> None:
    sketch = Sketch()
    x, ends = sketch.input("x", TensorType(F32, ("n", 4))), sketch.input("ends", TensorType(torch.int32, (2,)))
    w = sketch.input("w", TensorType(F32, (2, 6, 4)))
    good = sketch.call(nomul.grouped_linear.default, x, w, ends, type=TensorType(F32, ("n", 6)))
    assert not diagnose(sketch.program(good, symbols=("n",)), full=True)
    w.meta[TYPE] = TensorType(F32, (3, 6, 5))
    rules = [d.rule for d in diagnose(Program(good.graph, ParamStore()))]
    assert any("last dim must be the weight's 5" in r for r in rules)
    assert any("the dims of ends must be [3]" in r for r in rules)


@pytest.mark.parametrize(
    ("dim", "value"),
    [(7, 7), ("seq", 5), ("past+seq", 12), ("2*(seq + 1)//3", 4), ("Max(1, seq)", 5), ("-seq", -5), ("seq**2", 25)],
)
def test_dims_are_evaluated(dim: Any, value: int) -> None:
    assert evaluate(dim, {"seq": 5, "past": 7}) == value


@pytest.mark.parametrize("dim", ["u0", "seq+u0", "f(seq)", "seq.real", "1 +", "seq//0", "9**9**9", "'a'", "[1][0]"])
def test_dims_that_cannot_be_evaluated_are_unknown(dim: str) -> None:
    assert evaluate(dim, {"seq": 5}) is None


def test_calls_that_fail_are_reported_once() -> None:
    program = tiny_mlp_program(blocks=1)
    node = next(program.calls(aten.embedding))
    node.args = (node.args[0], node.args[0])
    only(check_runs(program), "runs", "the call fails at batch=3, seq=5")


def test_values_that_depend_on_data_are_left_alone() -> None:
    sketch = Sketch()
    x = sketch.input("x", TensorType(F32, ("seq",)))
    rows = sketch.call(aten.nonzero.default, x, type=TensorType(I64, ("u0", 1)))
    more = sketch.call(aten.add.Tensor, rows, 1, type=TensorType(I64, ("u0", 1)))
    assert not diagnose(sketch.program(more), full=True)


def test_store_of_other_type_is_reported_as_such() -> None:
    program = tiny_mlp_program()
    store = ParamStore()
    store.add_source(MemorySource({n: program.params.get(n).double() for n in program.params}))
    program.params = store
    assert {d.check for d in diagnose(program)} == {"params"}
