"""Differences of programs: equal changes of repeated blocks show once, with a count, and others by themselves."""

from __future__ import annotations

from ir.diff import block_of, changes, diff
from ir.edit import Editor
from ir.program import Program
from ir.text import dump
from tests.programs import aten, tiny_mlp_program


def _with_relu(program: Program, but: int | None = None) -> Program:
    editor = Editor(program, "harden")
    for index, node in enumerate(list(program.calls(aten.silu))):
        if index != but:
            new = editor.before(node).call(aten.relu.default, node.args[0], like=node)
            editor.replace(node, new, keep_name=True)
            editor.erase(node)
    return program


def test_equal_programs_have_no_difference() -> None:
    assert diff(tiny_mlp_program(), tiny_mlp_program()) == ""


def test_change_of_every_block_shows_once() -> None:
    before, after = tiny_mlp_program(blocks=30), _with_relu(tiny_mlp_program(blocks=30))
    assert diff(before, after).splitlines() == [
        "@@ 30 blocks, model.layers.0 to model.layers.29: the same 2 lines",
        "- %silu = aten.silu(%linear) : f32[batch,seq,32]   # model.layers.0.act",
        "+ %silu = aten.relu(%linear) : f32[batch,seq,32]   # model.layers.0.act | by harden",
    ]


def test_block_left_out_is_not_counted() -> None:
    text = diff(tiny_mlp_program(blocks=5), _with_relu(tiny_mlp_program(blocks=5), but=2))
    assert text.startswith("@@ 4 blocks, model.layers.0 to model.layers.4: the same 2 lines\n")


def test_block_that_changes_otherwise_shows_by_itself() -> None:
    after = _with_relu(tiny_mlp_program(blocks=4))
    node = list(after.calls(aten.rms_norm))[2]
    Editor(after, "harden").set_args(node, (*node.args[:-1], 1e-05))
    titles = [x for x in diff(tiny_mlp_program(blocks=4), after).splitlines() if x.startswith("@@")]
    assert titles == ["@@ 3 blocks, model.layers.0 to model.layers.3: the same 2 lines", "@@ 1 block, model.layers.2"]


def test_wiring_distinguishes_blocks() -> None:
    def text(*pairs: tuple[int, int]) -> str:
        return "\n".join(f"%m_{k} = aten.mul.Tensor(%a_{k}, %a_{j}) : f32[2]   # layers.{k}" for k, j in pairs)

    assert "2 blocks" in diff("", text((1, 1), (2, 2)))
    assert "2 blocks" in diff("", text((1, 5), (2, 7)))
    assert "2 blocks" not in diff("", text((1, 1), (2, 7)))


def test_numbers_that_are_not_indices_distinguish_blocks() -> None:
    def text(*values: str) -> str:
        return "\n".join(f"%m_{k} = aten.mul.Tensor(%a_{k}, {v})   # layers.{k}" for k, v in enumerate(values))

    assert "2 blocks" in diff("", text("2", "2"))
    assert "2 blocks" not in diff("", text("2", "3"))


def test_header_and_parameters_are_shown() -> None:
    before, after = tiny_mlp_program(), tiny_mlp_program()
    after.facts = frozenset({"canonical"})
    after.params.drop("model.norm.weight")
    text = diff(before, after)
    assert "+ program tiny-mlp level=model facts=[canonical] symbols=[batch, seq]" in text
    # The graph still reads it, so its line stays; a reader of the text sees no change of the graph.
    assert "model.norm.weight" not in text


def test_loose_lines_repeated_are_counted() -> None:
    old = "%x = aten.silu(%i)\n%keep = 1\n%x_1 = aten.silu(%i)\n"
    new = "%x = aten.relu(%i)\n%keep = 1\n%x_1 = aten.relu(%i)\n"
    assert diff(old, new).splitlines()[0] == "@@ 2 places: the same 2 lines"


def test_lines_of_one_block_are_gathered_across_the_text() -> None:
    old = dump(tiny_mlp_program())
    new = old.replace("gate_proj", "gate").replace("aten.silu", "aten.relu")
    blocks = [c.block for c in changes(old, new)]
    assert blocks == [("model.layers", 0), ("model.layers", 1)]


def test_block_of_reads_path_before_parameter() -> None:
    assert block_of("%a = f(@x.7.w)   # m.layers.3.q") == ("m.layers", 3)
    assert block_of("%a = f(@x.7.w)") == ("x", 7)
    assert block_of("%a = f(@x.7.w)   # | by fold") == ("x", 7)
    assert block_of("%a = f(@conv1d.w)   # lm_head") is None


def test_long_texts_are_compared_quickly() -> None:
    before, after = tiny_mlp_program(blocks=200), _with_relu(tiny_mlp_program(blocks=200))
    assert "200 blocks" in diff(before, after)
