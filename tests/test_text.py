"""The text form: `parse(dump(p))` is the same program, and what is wrong in a text is pointed at."""

from __future__ import annotations

import json
import math
import operator
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from ir.errors import InvariantError, UnsupportedError, UsageError
from ir.params import MemorySource, ParamStore
from ir.parse import parse
from ir.program import ORIGIN, PATH, TYPE, Program
from ir.text import FUNCTIONS, dump, node_line, target_text, value_text
from ir.types import ScalarType, TensorType
from tests.programs import F32, Sketch, aten, odd_program, tiny_mlp_program

LINES = """program small level=model
param  @w : f32[4,4]
input  %x : f32[batch,4]
%y = aten.linear(%x, @w) : f32[batch,4]
return (%y,)
"""


def same(a: Any, b: Any) -> bool:
    """Return whether two arguments are equal in value and kind, nodes compared by name."""
    if isinstance(a, fx.Node):
        return isinstance(b, fx.Node) and (a.target == b.target if a.op == "get_attr" else a.name == b.name)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list if isinstance(a, list) else tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return type(b) is float and ((math.isnan(a) and math.isnan(b)) or a.hex() == b.hex())
    return type(a) is type(b) and a == b


def assert_same(a: Program, b: Program) -> None:
    """Check two programs equal: fields, calls in order with names, types and provenance, inputs and outputs."""
    for field in ("name", "level", "facts", "history", "symbols", "attributes"):
        assert getattr(a, field) == getattr(b, field)
    nodes = [[n for n in p.graph.nodes if n.op != "get_attr"] for p in (a, b)]
    assert len(nodes[0]) == len(nodes[1])
    for old, new in zip(*nodes, strict=True):
        assert (old.op, old.target if old.op != "output" else "") == (new.op, new.target if new.op != "output" else "")
        assert old.op == "output" or old.name == new.name
        assert same(old.args, new.args), (old.args, new.args)
        assert list(old.kwargs) == list(new.kwargs)
        assert same(tuple(old.kwargs.values()), tuple(new.kwargs.values()))
        assert {k: old.meta.get(k) for k in (TYPE, PATH, ORIGIN)} == {k: new.meta.get(k) for k in (TYPE, PATH, ORIGIN)}
    assert set(a.params) == set(b.params)
    assert a.params.aliases() == b.params.aliases()
    assert all(a.params.type_of(n) == b.params.type_of(n) for n in a.params)


@pytest.mark.parametrize("make", [tiny_mlp_program, odd_program])
@pytest.mark.parametrize("seeded", [True, False])
def test_dump_reads_back(make: Any, seeded: bool) -> None:
    program = make()
    text = dump(program)
    again = parse(text, None if seeded else program.params)
    assert dump(again) == text
    assert_same(program, again)


def test_parsed_program_computes_the_same() -> None:
    program = tiny_mlp_program()
    ids = torch.arange(6).view(2, 3)
    again = parse(dump(program), program.params)
    assert torch.equal(program.module()(ids)[0], again.module()(ids)[0])
    odd = odd_program()
    inputs = torch.randn(2, 3, 8), torch.randn(3)
    for old, new in zip(odd.module()(*inputs), parse(dump(odd), odd.params).module()(*inputs), strict=True):
        assert torch.equal(torch.as_tensor(old), torch.as_tensor(new))


def test_parse_leaves_the_given_store_alone() -> None:
    params = ParamStore()
    params.add_source(MemorySource({"w": torch.ones(4, 4)}))
    program = parse(LINES.replace("input", "tied @v = @w\ninput"), params)
    assert params.aliases() == {}
    assert program.params.aliases() == {"v": "w"}


def test_unknown_weights_are_seeded_by_name() -> None:
    first, second = parse(LINES).params.get("w"), parse(LINES).params.get("w")
    other = parse(LINES.replace("@w", "@v")).params.get("v")
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0.001 < float(first.std()) < 0.1
    text = "program x\nparam @c : u8[3]\nparam @h : bf16[2]\nparam @d : f64[2]\nreturn (@c, @h, @d)"
    loaded = [parse(text).params.get(n) for n in "chd"]
    assert [t.dtype for t in loaded] == [torch.uint8, torch.bfloat16, torch.float64]
    assert int(loaded[0].sum()) == 0


def _text(*lines: str) -> str:
    return "\n".join(["program x level=model", *lines, ""])


def test_parameters_keep_the_order_of_their_lines() -> None:
    text = _text(
        "param  @b : f32[2]", "param  @a : f32[2]", "param  @0 : f32[2]", "%s = aten.add.Tensor(@a, @b)", "return %s"
    )
    program = parse(text)
    assert [n.target for n in program.param_nodes()] == ["b", "a"]
    assert "0" in program.params
    assert dump(program) == text


def test_parameter_nodes_stay_clear_of_value_names() -> None:
    text = _text("param  @w : f32[2]", "%p_w = aten.silu(@w)", "%p_w_1 = aten.silu(%p_w)", "return %p_w_1")
    program = parse(text)
    assert dump(program) == text
    assert len({n.name for n in program.graph.nodes}) == len(program.graph.nodes)


def test_comments_blank_lines_and_spacing_are_free() -> None:
    text = LINES.replace("\n", "\r\n\r\n# golden file header\r\n").replace(", ", " ,  ").replace("(%x", "( %x")
    assert dump(parse(text)) == LINES


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_on_sizes_read_back(name: str) -> None:
    assert target_text(FUNCTIONS[name]) == name
    text = _text("input  %n : int(seq)", f"%v = {name}(%n) : int(seq)", "return (%v,)")
    program = parse(text)
    assert program.node("v").target is FUNCTIONS[name]
    assert dump(program) == text


def test_unknown_function_is_named() -> None:
    sketch = Sketch()
    x = sketch.input("x", TensorType(F32, (2,)))
    y = sketch.call(math.gamma, x, type=TensorType(F32, (2,)))
    with pytest.raises(UnsupportedError, match="gamma"):
        dump(sketch.program(y))


@pytest.mark.parametrize("value", [object(), 1j, {"a": 1}, torch.ones(2), torch.quint8])
def test_value_without_text_form_is_named(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot hold"):
        value_text([value])


def test_attributes_that_are_not_json_are_refused() -> None:
    program = tiny_mlp_program()
    program.attributes["x"] = object()
    with pytest.raises(InvariantError, match="JSON"):
        dump(program)


@pytest.mark.parametrize(
    ("old", "new", "place", "expected"),
    [
        ("%x, @w", "%z, @w", "line 4, column 18", "%z is not defined"),
        ("%x, @w", "%x, @v", "line 4, column 22", "@v is not declared"),
        ("aten.linear", "aten.linearr", "line 4, column 6", "no op aten.linearr"),
        ("aten.linear", "operator.gadd", "line 4, column 6", "no op operator.gadd"),
        ("@w) :", "@w :", "line 4, column 25", "`,`"),
        ("@w) : f32", "@w) : f33", "line 4, column 28", "a dtype and its dims"),
        ("[batch,4]\nreturn", "[batch,4\nreturn", "line 4, column 39", "closes the type"),
        ("(%y,)", "(%y", "line 5, column 11", "`,`"),
        ("(%y,)", "(%y,) extra", "line 5, column 14", "end of the line"),
        ("param  @w : f32[4,4]", "param  @w : f32[n,4]", "line 2, column 21", "dims are all numbers"),
        ("param  @w : f32[4,4]", "param  @w : f32[-4,4]", "line 2, column 22", "dims are all numbers"),
        ("input  %x", "inputs %x", "line 3, column 1", "param, tied, input"),
        ("return (%y,)\n", "", "line 4, column 40", "a `return` line"),
        ("program small", "program small colour=3", "line 1, column 22", "no field colour"),
        ("program small", "program small level=raw", "line 1, column 24", "one of the levels"),
        ("program small", "module small", "line 1, column 1", "the header"),
        ("program small", "program small history=[1", "line 1, column 23", "not JSON"),
        ("%y =", "%x =", "line 4", "%x is defined twice"),
        ("%y =", "%max =", "line 4", "cannot be the name"),
        ("@w)", "out=@w, %x)", "line 4, column 30", "named arguments come last"),
        ("@w)", "wat)", "line 4, column 22", "wat is no value"),
        ("@w)", "device(nowhere))", "line 4, column 22", "device is no value"),
        ("@w)", '"a\\q")', "line 4", "does not read"),
        ("@w)", "[" * 100 + ")", "line 4", "a value"),
        ("@w)", "slice(1, 2))", "line 4", "slice(start, stop, step)"),
        ("input", "param  @w : f32[2]\ninput", "line 3", "declared twice"),
    ],
)
def test_errors_point_at_the_place(old: str, new: str, place: str, expected: str) -> None:
    assert old in LINES
    text = LINES.replace(old, new)
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert place in message, message
    assert expected in message, message
    assert re.search(r"\n\s+\^\n", message), message


def test_weights_that_do_not_fit_are_named() -> None:
    params = ParamStore()
    params.add_source(MemorySource({"w": torch.ones(4, 5)}))
    with pytest.raises(UnsupportedError, match=r"@w: declared f32\[4,4\], the weights have f32\[4,5\]"):
        parse(LINES, params)
    with pytest.raises(UnsupportedError, match=r"@w: declared .*absent"):
        parse(LINES, ParamStore())


def test_empty_text_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        parse("\n \n# nothing\n")


@given(st.text(max_size=60), st.integers(0, len(LINES)), st.integers(0, 10))
def test_mutilated_text_never_fails_otherwise(piece: str, at: int, cut: int) -> None:
    try:
        program = parse(LINES[:at] + piece + LINES[at + cut :])
    except UsageError:
        return
    assert dump(parse(dump(program))) == dump(program)


symbolic = st.sampled_from(["batch", "past+seq", "Max(1, seq)", "(a+1)//2"])
dims = st.lists(st.integers(0, 9) | symbolic, max_size=3)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
tensors = st.builds(lambda d, n: TensorType(d, tuple(n)), dtypes, dims)
scalars = st.builds(ScalarType, st.sampled_from(["int", "float", "bool"]), st.sampled_from(["seq", "3", "f(a, (b))"]))
types = st.recursive(st.one_of(tensors, scalars), lambda t: st.lists(t, max_size=3).map(tuple), max_leaves=4)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 1e-300, 5e-324]),
    st.text(),
    dtypes,
    st.sampled_from([torch.device("cpu"), torch.device("cuda:1"), torch.strided, torch.preserve_format]),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers()),
)
words = st.text(min_size=1, max_size=8)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program whose calls need not make sense: the text form does not look at what they compute."""
    sketch = Sketch()
    pool = [sketch.input(f"in_{k}", draw(types)) for k in range(draw(st.integers(1, 2)))]
    names = draw(st.lists(words, max_size=3, unique=True))
    pool += [sketch.param(n, torch.ones(draw(st.integers(1, 3)))) for n in names]
    values = st.recursive(
        st.one_of(st.sampled_from(pool), plain), lambda v: st.lists(v, max_size=3) | st.lists(v, max_size=3).map(tuple)
    )
    for _ in range(draw(st.integers(0, 4))):
        target = draw(st.sampled_from([aten.add.Tensor, aten.silu.default, operator.floordiv, torch.sym_max]))
        args = draw(st.lists(values, max_size=3))
        kwargs = draw(st.dictionaries(st.sampled_from(["alpha", "dim", "dtype"]), values, max_size=2))
        path, by = draw(st.one_of(st.just(""), words)), draw(st.one_of(st.just(""), words))
        node = sketch.graph.call_function(target, tuple(args), kwargs)
        node.meta = {TYPE: draw(types), **({PATH: path} if path else {}), **({ORIGIN: by} if by else {})}
        pool.append(node)
    outputs = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
    return sketch.program(
        *outputs,
        ties={"tied": names[0]} if names and "tied" not in names else None,
        name=draw(words),
        level=draw(st.sampled_from(["model", "compressed", "target"])),
        facts=draw(st.frozensets(words, max_size=3)),
        symbols=tuple(draw(st.lists(words, max_size=3))),
        history=tuple(draw(st.lists(st.text(), max_size=2))),
        attributes=draw(st.dictionaries(words, st.none() | st.integers() | words, max_size=2)),
    )


@given(programs())
def test_any_program_reads_back(program: Program) -> None:
    text = dump(program)
    again = parse(text)
    assert dump(again) == text
    assert_same(program, again)
    assert all(ord(c) < 128 or not c.isspace() for c in text)
    assert json.loads(json.dumps(text)) == text


def test_node_lines_are_the_lines_of_the_dump() -> None:
    program = tiny_mlp_program()
    text = dump(program)
    assert all(node_line(n) in text for n in program.graph.nodes)
