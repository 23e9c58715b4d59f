"""Nested weights: one set of planes, several precisions, each exactly what it would be by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nomul
from backends.reference.execute import executable
from ir.analysis import linear_sites
from ir.artifact import read_program
from ir.decode import arguments, code_nodes, codes_of
from ir.edit import Editor
from ir.errors import InvariantError, UsageError
from ir.ops.nested import NestedCodes, nest, nested_by_shifts, nested_cost, take_nested_rows
from ir.ops.shiftadd import shiftadd_cost
from ir.ops.shiftcode import ShiftCodes, encode, group_count
from ir.parse import parse
from ir.precision import precisions, set_planes
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from passes.sites import put_nested_codes
from tests.coded_sites import coded, decoded, stored_bytes
from tests.tiny_model import VOCAB, tiny_program, write_artifact
from tools import evaluate, generate

op = torch.ops.nomul.nested_linear
F64 = torch.float64


def levels(
    rows: int,
    inputs: int,
    group: int,
    terms: int,
    offsets: bool,
    row_group: int = 1,
    which: tuple[int, ...] = (2, 3, 4),
) -> list[ShiftCodes]:
    """Codes of 2, 3 and 4 planes, of which each has the planes of the one before and scales of its own."""
    generator = torch.Generator().manual_seed(rows + inputs)
    tiles, groups = group_count(rows, row_group), group_count(inputs, group)
    signs = torch.rand(max(which), rows, inputs, generator=generator) > 0.5
    found = []
    for planes in which:
        alpha = torch.rand(tiles, groups, planes, generator=generator, dtype=F64) * 4 + 2**-5
        z = torch.randn(tiles, groups, generator=generator, dtype=F64) if offsets else None
        found.append(encode(signs[:planes], alpha, z, group, terms, row_group))
    return found


def op_args(codes: NestedCodes, x: Tensor, precision: int, bias: Tensor | None = None) -> tuple[Any, ...]:
    lists = (list(codes.scales), list(codes.exponents), list(codes.offsets))
    layout = (codes.group, codes.terms, codes.row_group, list(codes.precisions), precision)
    return (x, codes.signs, *lists, bias, *layout)


LAYOUTS = pytest.mark.parametrize(
    ("rows", "inputs", "group", "terms", "offsets", "row_group"),
    [(5, 21, 8, 2, True, 1), (7, 33, 4, 0, False, 3), (4, 16, 1, 1, True, 4), (6, 9, 16, 3, False, 2)],
)


@LAYOUTS
def test_every_precision_is_bit_equal_to_its_own_codes(
    rows: int, inputs: int, group: int, terms: int, offsets: bool, row_group: int
) -> None:
    alone = levels(rows, inputs, group, terms, offsets, row_group)
    codes = nest(alone[::-1])
    x = torch.randint(-128, 128, (2, 3, inputs)).double()
    assert codes.precisions == (2, 3, 4)
    for one in alone:
        found = codes.at(one.planes)
        assert torch.equal(found.dequantize(F64), one.dequantize(F64))
        assert found.stored_bits == one.stored_bits
        args = op_args(codes, x, one.planes, torch.ones(rows, dtype=F64))
        assert torch.equal(op(*args), x @ one.dequantize(F64).T + 1)
        assert torch.equal(nested_by_shifts(*args), op(*args))
        assert nested_cost(codes, one.planes, 3) == shiftadd_cost(one, 3)
    assert not torch.equal(codes.at(2).dequantize(), codes.at(3).dequantize())


@pytest.mark.parametrize("run", [op, nested_by_shifts])
def test_only_the_first_planes_and_one_set_of_scales_are_read(run: Any) -> None:
    codes = nest(levels(5, 21, 8, 0, True))
    x = torch.randn(3, 21, dtype=F64)
    nan = float("nan")
    for which, precision in enumerate((2, 3, 4)):
        right = run(*op_args(codes, x, precision))
        signs = codes.signs.clone()
        signs[precision:] ^= 255
        scales = tuple(t if i == which else torch.full_like(t, nan) for i, t in enumerate(codes.scales))
        offsets = tuple(t if i == which else torch.full_like(t, nan) for i, t in enumerate(codes.offsets))
        poisoned = replace(codes, signs=signs, scales=scales, offsets=offsets)
        assert torch.equal(run(*op_args(poisoned, x, precision)), right)
        signs[0] ^= 255
        assert not torch.equal(run(*op_args(poisoned, x, precision)), right)


def test_a_prefix_of_planes_is_a_view_of_its_share_of_bytes() -> None:
    codes = nest(levels(5, 40, 8, 2, True))
    for precision in codes.precisions:
        signs = codes.at(precision).signs
        assert signs.is_contiguous() and signs.data_ptr() == codes.signs.data_ptr()
        assert signs.nbytes * 4 == codes.signs.nbytes * precision
    costs = [nested_cost(codes, p, 1).bytes for p in codes.precisions]
    assert costs == sorted(set(costs)) and costs[-1] < codes.stored_bits // 8


def test_stored_bits_are_the_bytes_of_all_tensors() -> None:
    codes = nest(levels(64, 256, 128, 0, True))
    assert codes.stored_bits / (64 * 256) == 5.5
    packed = nest(levels(6, 21, 8, 2, True, 3))
    tensors = (packed.signs, *packed.scales, *packed.exponents, *packed.offsets)
    assert packed.stored_bits == 8 * sum(t.nbytes for t in tensors) and len(tensors) == 10


def test_rows_are_taken_at_every_precision() -> None:
    codes = nest(levels(8, 21, 8, 2, True, 3))
    part = take_nested_rows(codes, 3, 8)
    for precision in codes.precisions:
        assert torch.equal(part.at(precision).dequantize(), codes.at(precision).dequantize()[3:])
    with pytest.raises(UsageError, match="3 rows share"):
        take_nested_rows(codes, 2, 8)


def test_what_does_not_nest_is_refused() -> None:
    two, three, _ = levels(5, 21, 8, 2, True)
    with pytest.raises(UsageError, match="not the first ones"):
        nest([replace(two, signs=two.signs ^ 1), three])
    with pytest.raises(UsageError, match="layouts"):
        nest([replace(two, offsets=None), three])
    with pytest.raises(UsageError, match="layouts"):
        nest([*levels(5, 21, 4, 2, True, which=(2,)), three])
    with pytest.raises(UsageError, match=r"no precision of 4 planes[\s\S]*2, 3"):
        nest([two, three]).at(4)


def nested_program(terms: int = 2, precision: int = 4) -> Program:
    """The tiny model with every linear nested at 2, 3 and 4 planes."""
    program = tiny_program()
    for site in linear_sites(program, program.graph.nodes)[0]:
        put_nested_codes(program, site, nest(levels(site.rows, site.inputs, 8, terms, True, 4)), "test", precision)
    program.level = "compressed"
    return program


def ids() -> Tensor:
    return torch.randint(2, VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))


def logits(program: Program, mode: str = "multiply") -> Tensor:
    found: Tensor = executable(program, mode)(
        ids(), torch.ones(1, 6, dtype=torch.long), *[torch.zeros(1, 2, 0, 8)] * 4
    )[0]
    return found


def test_text_form_holds_lists_and_reads_back() -> None:
    program = nested_program()
    verify(program, full=True)
    text = dump(program)
    assert "[2, 3, 4], 4)" in text
    again = parse(text, program.params)
    assert dump(again) == text
    assert torch.equal(logits(again), logits(program))


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_a_program_runs_at_the_planes_it_is_set_to_in_every_mode(planes: int) -> None:
    program = nested_program()
    version = program.version
    set_planes(program, planes)
    verify(program, full=True)
    assert program.version > version and precisions(program) == (2, 3, 4)
    for node in coded(program).values():
        codes = codes_of(node, program.params.get)
        assert isinstance(codes, NestedCodes) and stored_bytes(program, node) == codes.stored_bits // 8
        assert torch.equal(decoded(program, node), codes.at(planes).dequantize(F64))
        assert {name: len(nodes) for name, nodes in code_nodes(node).items()} == {
            "signs": 1,
            **dict.fromkeys(("scales", "exponents", "offsets"), 3),
        }
    want = logits(program)
    torch.testing.assert_close(want, logits(nested_program(precision=planes)), rtol=0, atol=0)
    for mode in ("shift", "codes"):
        torch.testing.assert_close(logits(program, mode), want, rtol=1e-4, atol=1e-4)
    set_planes(program, 5 - planes if planes != 4 else 3)
    assert not torch.equal(logits(program), want)


def test_planes_that_are_not_there_are_refused() -> None:
    program = nested_program()
    with pytest.raises(UsageError, match=r"cannot run at 5 planes[\s\S]*2 or 3 or 4"):
        set_planes(program, 5)
    assert {arguments(n)["precision"] for n in program.calls(op)} == {4}
    with pytest.raises(UsageError, match="no nested linears"):
        set_planes(tiny_program(), 2)


def test_planes_are_chosen_when_an_artifact_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_artifact(tmp_path / "a", nested_program())
    for planes in (2, 3):
        program = nested_program(precision=planes)
        torch.testing.assert_close(nomul.load(folder, planes=planes).forward(ids())[0], logits(program))
    assert {arguments(n)["precision"] for n in read_program(folder).calls(op)} == {4}
    with pytest.raises(UsageError, match="cannot run at 7"):
        nomul.load(folder, planes=7)
    text = tmp_path / "text"
    text.write_text(" ".join(f"w{i % 30 + 2}" for i in range(64)), encoding="utf-8")
    found = []
    for planes in ([], ["--planes", "2"]):
        assert evaluate.main([str(folder), "--text", str(text), "--ctx", "16", "--json", *planes]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[0] != found[1]
    assert generate.main([str(folder), "w5 w9", "-n", "2", "--planes", "3"]) == 0


MISTAKES: list[tuple[str, Any, str]] = [
    ("precisions", [2, 4, 3], "ascending"),
    ("precision", 5, "precision must be one of"),
    ("precisions", [2, 3], "exponents must be 2 tensors"),
    ("precisions", [2, 3, 5], "5 planes of the highest"),
    ("offsets", "drop one", "offsets must be 3 tensors"),
    ("scales", "swap", r"the dims of scales\[0\]"),
    ("row_group", 3, r"the dims of exponents\[0\]"),
    ("terms", 5, "terms must be 0 to 4"),
    ("exponents", [], "exponents must be 3 tensors"),
]


@pytest.mark.parametrize(("name", "value", "message"), MISTAKES)
def test_wrong_nested_calls_are_reported(name: str, value: Any, message: str) -> None:
    program = nested_program()
    node = next(program.calls(op))
    values = arguments(node)
    kept = values[name]
    values[name] = {"drop one": lambda: kept[1:], "swap": lambda: kept[::-1]}.get(str(value), lambda: value)()
    Editor(program, "test").set_args(node, tuple(values.values()))
    with pytest.raises(InvariantError, match=message):
        verify(program)
