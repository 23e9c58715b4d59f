"""The activations that passes are shown: equal to what a run of the whole program would show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from ir.analysis import blocks, linear_sites
from ir.edit import Editor
from ir.errors import UnsupportedError, UsageError
from ir.ops.packing import pack_bits
from ir.ops.quant import QuantCodes
from ir.program import Program, is_call
from passes.base import Context, Event, Log, Progress
from passes.quantize.uniform import rtn
from passes.sites import put_quant_codes
from passes.stream import Step, observe, walk
from tests.programs import I64, Sketch, aten, hidden
from tests.watch import batches, values

SHAPES = ((2, 8), (1, 5), (2, 8), (3, 1))


def keep(into: list[Tensor]) -> Callable[[Tensor], None]:
    return lambda value: into.append(value.clone())


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def coarse(program: Program, step: Step) -> None:
    """Replace the linears of a block by 2-bit codes, as a compressing pass does."""
    for site in linear_sites(program, step.block.nodes)[0]:
        codes = rtn(program.params.get(site.weight), 2, 16)
        packed, zeros = pack_bits(codes.codes, 2), pack_bits(codes.zeros, 2)
        put_quant_codes(program, site, QuantCodes(packed, codes.scales, zeros, 2, 16, site.inputs), "coarse")


def seen_by_hooks(folder: Path, suffix: str, data: list[Tensor]) -> list[list[Tensor]]:
    """Inputs of the modules of every layer of the original model that end in `suffix`, layer by layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    found: list[list[Tensor]] = []
    for layer in model.model.layers:
        rows: list[Tensor] = []
        found.append(rows)
        module = layer.get_submodule(suffix)
        module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].clone()))
    with torch.no_grad():
        for ids in data:
            model(ids)
    return found


@pytest.mark.parametrize("suffix", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_float_stream_shows_what_hooks_on_the_model_see(tiny_model: Program, tiny_hf: Path, suffix: str) -> None:
    program, data = tiny_model.clone(), batches(*SHAPES)
    expected = seen_by_hooks(tiny_hf, suffix, data)
    for step in walk(program, Context(calibration=data), "float", "test"):
        site = next(s for s in linear_sites(program, step.block.nodes)[0] if s.name.endswith(suffix))
        found: list[Tensor] = []
        step.observe_float({site.node.args[0].name: keep(found)})  # type: ignore[union-attr]
        assert len(found) == len(data)
        for have, want in zip(found, expected[step.block.index], strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_float_stream_does_not_see_what_the_pass_changes(tiny_model: Program) -> None:
    program, data = tiny_model.clone(), batches((2, 8))
    original = values(tiny_model, data[0])
    for step in walk(program, Context(calibration=data), "float", "test"):
        coarse(program, step)
        entry: list[Tensor] = []
        step.observe_float({step.block.entry.name: keep(entry)})
        assert equal(entry, [original[step.block.entry.name]])


def test_compressed_stream_is_the_compressed_prefix(tiny_model: Program) -> None:
    program, data = tiny_model.clone(), batches(*SHAPES)
    differs = []
    for step in walk(program, Context(calibration=data), "compressed", "test"):
        entry: list[Tensor] = []
        step.observe({step.block.entry: keep(entry)})
        # The program as it is now: all earlier blocks compressed, this one and later ones not.
        assert equal(entry, [values(program, ids)[step.block.entry.name] for ids in data])
        differs.append(not equal(entry, [values(tiny_model, ids)[step.block.entry.name] for ids in data]))
        coarse(program, step)
    assert differs == [False, True]


def test_both_streams_in_one_walk(tiny_model: Program) -> None:
    program, data = tiny_model.clone(), batches(*SHAPES)
    for step in walk(program, Context(calibration=data), "both", "test"):
        name = step.block.exit.name
        coarse(program, step)
        compressed: list[Tensor] = []
        floating: list[Tensor] = []
        step.observe({step.block.exit: keep(compressed)})
        step.observe_float({name: keep(floating)})
        assert equal(compressed, [values(program, ids)[name] for ids in data])
        assert equal(floating, [values(tiny_model, ids)[name] for ids in data])
        assert not equal(compressed, floating)


def test_pairs_are_the_same_tokens_of_both_streams(tiny_model: Program) -> None:
    program, data = tiny_model.clone(), batches(*SHAPES)
    for step in walk(program, Context(calibration=data), "both", "test"):
        sites = {s.name.rpartition(".")[2]: s.node for s in linear_sites(program, step.block.nodes)[0]}
        wanted = [sites["down_proj"].args[0], step.block.entry, sites["o_proj"], step.block.exit]
        pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in wanted]
        calls = [lambda a, b, rows=rows: rows.append((a.clone(), b.clone())) for rows in pairs]
        step.observe_pairs(dict(zip(wanted, calls, strict=True)))  # type: ignore[arg-type]
        for node, rows in zip(wanted, pairs, strict=True):
            assert isinstance(node, fx.Node)
            compressed: list[Tensor] = []
            floating: list[Tensor] = []
            step.observe({node: keep(compressed)})
            step.observe_float({node.name: keep(floating)})
            assert equal([a for a, _ in rows], compressed) and equal([b for _, b in rows], floating)
            assert equal(floating, [values(tiny_model, ids)[node.name] for ids in data])
            assert equal(compressed, floating) == (step.block.index == 0)
        coarse(program, step)


def test_the_entry_is_the_same_for_both_at_first(tiny_model: Program) -> None:
    data, found = batches((2, 3), (1, 4)), []
    step = next(iter(walk(tiny_model.clone(), Context(calibration=data), "both", "test")))
    step.observe_pairs({step.block.entry: lambda a, b: found.append((a, b))})
    assert [a.shape[:2] for a, _ in found] == [(2, 3), (1, 4)] and all(torch.equal(a, b) for a, b in found)


def test_values_inside_a_block_that_the_pass_is_halfway_through(tiny_model: Program) -> None:
    program, data = tiny_model.clone(), batches((2, 8), (1, 3))
    for step in walk(program, Context(calibration=data), "compressed", "test"):
        sites = {s.name.rpartition(".")[2]: s for s in linear_sites(program, step.block.nodes)[0]}
        before: list[Tensor] = []
        after: list[Tensor] = []
        into_down = sites["down_proj"].node.args[0]
        assert isinstance(into_down, fx.Node)
        step.observe({into_down: keep(before)})
        codes = rtn(program.params.get(sites["q_proj"].weight), 2, 16)
        packed, zeros = pack_bits(codes.codes, 2), pack_bits(codes.zeros, 2)
        put_quant_codes(program, sites["q_proj"], QuantCodes(packed, codes.scales, zeros, 2, 16, 32), "half")
        step.observe({into_down: keep(after)})
        assert equal(after, [values(program, ids)[into_down.name] for ids in data])
        assert not equal(after, before)


def test_several_values_at_once_in_batch_order(tiny_model: Program) -> None:
    program, data = tiny_model.clone(), batches(*SHAPES)
    for step in walk(program, Context(calibration=data), "compressed", "test"):
        wanted = [step.block.entry, *(s.node for s in linear_sites(program, step.block.nodes)[0])]
        found: dict[str, list[Tensor]] = {n.name: [] for n in wanted}
        step.observe({n: keep(found[n.name]) for n in wanted})
        whole = [values(program, ids) for ids in data]
        for name, rows in found.items():
            assert equal(rows, [seen[name] for seen in whole])


def side_program() -> Program:
    """Two residual blocks whose side outputs also read the token ids and a value made of them before the blocks."""
    s = Sketch(3)
    embed = s.param("embed", s.random(40, 8))
    weights = [s.param(f"layers.{k}.weight", s.random(8, 8)) for k in range(2)]
    head = s.param("head", s.random(40, 8))
    ids, mask = s.input("input_ids", hidden(dtype=I64)), s.input("attention_mask", hidden(dtype=I64))
    h = s.call(aten.embedding.default, embed, ids, type=hidden(8))
    token = s.call(aten.to.dtype, ids, torch.float32, type=hidden())
    length = s.call(aten.sum.dim_IntList, mask, [1], True, type=hidden(dtype=I64))
    sides = []
    for k, weight in enumerate(weights):
        d = s.call(aten.linear.default, h, weight, type=hidden(8), path=f"layers.{k}")
        flat = s.call(aten.sum.dim_IntList, d, [2], type=hidden())
        side = s.call(aten.mul.Tensor, flat, token, type=hidden())
        sides.append(s.call(aten.add.Tensor, side, ids, type=hidden()))
        scaled = s.call(aten.div.Tensor, d, s.call(aten.unsqueeze.default, length, 2, type=hidden(1)), type=hidden(8))
        h = s.call(aten.add.Tensor, h, scaled, type=hidden(8), path=f"layers.{k}")
    logits = s.call(aten.linear.default, h, head, type=hidden(40))
    return s.program(logits, *sides, name="side")


def test_carried_and_ambient_values_belong_to_their_batch() -> None:
    program, data = side_program(), batches((2, 4), (2, 4), (1, 6), vocab=40)
    assert len(blocks(program)) == 2
    for index, step in enumerate(walk(program, Context(calibration=data), "compressed", "test")):
        side = program.outputs[1 + index]
        found: list[Tensor] = []
        step.observe({side: keep(found), step.block.exit: (exits := []).append})
        assert equal(found, [values(program, ids)[side.name] for ids in data])
        assert equal(exits, [values(program, ids)[step.block.exit.name] for ids in data])
        assert not torch.equal(found[0], found[1])


def test_observe_hands_out_nodes_of_all_blocks(tiny_model: Program) -> None:
    program, data = tiny_model.clone(), batches((2, 8), (1, 5))
    wanted = [n for block in blocks(program) for n in block.nodes if is_call(n, aten.silu)]
    found: dict[fx.Node, list[Tensor]] = {n: [] for n in wanted}
    assert len(wanted) == 2
    observe(program, Context(calibration=data), {n: keep(rows) for n, rows in found.items()}, "test")
    for node, rows in found.items():
        assert equal(rows, [values(program, ids)[node.name] for ids in data])


def test_observe_hands_out_nothing_that_lies_in_no_block(tiny_model: Program) -> None:
    program, found = tiny_model.clone(), []
    observe(program, Context(calibration=batches((1, 4))), {program.outputs[0]: found.append}, "test")
    assert not found


def test_a_walk_tells_how_far_it_is(tiny_model: Program) -> None:
    heard: list[Event] = []
    log = Log("toy", heard.append)
    for _ in walk(tiny_model.clone(), Context(log=log, calibration=batches((1, 4))), "compressed", "label"):
        pass
    assert heard == [Progress("label", done, 2, "toy") for done in range(3)]


def test_a_stream_that_was_not_asked_for_is_not_there(tiny_model: Program) -> None:
    ctx = Context(calibration=batches((1, 4)))
    step = next(iter(walk(tiny_model.clone(), ctx, "float", "test")))
    with pytest.raises(ValueError, match="compressed"):
        step.observe({step.block.entry: lambda _: None})
    step = next(iter(walk(tiny_model.clone(), ctx, "compressed", "test")))
    with pytest.raises(ValueError, match="float"):
        step.observe_float({step.block.entry.name: lambda _: None})
    for stream in ("float", "compressed"):
        step = next(iter(walk(tiny_model.clone(), ctx, stream, "test")))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="both streams"):
            step.observe_pairs({step.block.entry: lambda *_: None})


@pytest.mark.parametrize("calibration", [None, []])
def test_a_walk_needs_calibration(tiny_model: Program, calibration: list[Tensor] | None) -> None:
    with pytest.raises(UsageError, match="--calib"):
        next(iter(walk(tiny_model.clone(), Context(calibration=calibration), "compressed", "test")))


def test_a_walk_needs_blocks() -> None:
    s = Sketch(0)
    embed, head = s.param("embed", s.random(40, 8)), s.param("head", s.random(40, 8))
    ids = s.input("input_ids", hidden(dtype=I64))
    s.input("attention_mask", hidden(dtype=I64))
    h = s.call(aten.embedding.default, embed, ids, type=hidden(8))
    program = s.program(s.call(aten.linear.default, h, head, type=hidden(40)), name="flat")
    with pytest.raises(UnsupportedError, match="no repeated blocks") as caught:
        next(iter(walk(program, Context(calibration=batches((1, 4), vocab=40)), "compressed", "test")))
    assert "calib=none" in caught.value.fix


def test_the_program_is_left_as_it_was(tiny_model: Program) -> None:
    program = tiny_model.clone()
    version = program.version
    for step in walk(program, Context(calibration=batches((1, 4))), "both", "test"):
        step.observe({step.block.exit: lambda _: None})
    assert program.version == version
    Editor(program, "test").sweep()
    assert program.version == version


def test_products_in_bfloat16_stay_near_and_end_with_the_walk(tiny_model: Program) -> None:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    # Where the CPU has no bfloat16 products, the setting leaves them in float32.
    x, w = torch.randn(160, 32), torch.randn(32, 32)
    whole = x @ w
    setting.fp32_precision = "bf16"
    rounds = not torch.equal(x @ w, whole)
    setting.fp32_precision = before
    found: dict[str, list[Tensor]] = {}
    for precision in ("float32", "bfloat16"):
        rows, program = found.setdefault(precision, []), tiny_model.clone()
        for step in walk(program, Context(calibration=batches((4, 40)), precision=precision), "float", "x"):  # type: ignore[arg-type]
            name = linear_sites(program, step.block.nodes)[0][-1].node.name
            step.observe_float({name: keep(rows)})
            assert setting.fp32_precision == before
    for exact, near in zip(found["float32"], found["bfloat16"], strict=True):
        assert float((near - exact).norm() / exact.norm()) < 2e-2
        assert torch.equal(near, exact) != rounds


@pytest.mark.parametrize("looked_at", [(0, 1), (1,), ()])
def test_blocks_nobody_looked_at_are_run_when_somebody_does(
    tiny_model: Program, looked_at: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import passes.stream as stream

    moved, advance = list[int](), stream._advance

    def counted(flow: object, block: object) -> None:
        moved.append(block.index)  # type: ignore[attr-defined]
        advance(flow, block)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "_advance", counted)
    data, found = batches(*SHAPES), dict[int, list[Tensor]]()
    program = tiny_model.clone()
    for step in walk(program, Context(calibration=data), "compressed", "test"):
        if step.block.index in looked_at:
            found[step.block.index] = []
            step.observe({step.block.entry: keep(found[step.block.index])})
        coarse(program, step)
    assert moved == ([0] if 1 in looked_at else [])
    for index, seen in found.items():
        entry = blocks(program)[index].entry.name
        assert equal(seen, [values(program, ids)[entry] for ids in data])


def test_a_resumed_pass_runs_no_block_that_is_finished(
    tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import passes.stream as stream
    from tests.coded_sites import coded, same_parts
    from tests.pipeline_runs import run

    wanted, _ = run(tiny_model, "gptq{bits=3 group=16}", batches((2, 16)), tmp_path)
    monkeypatch.setattr(stream, "_values", None)
    monkeypatch.setattr(stream, "_exits", None)
    found, _ = run(tiny_model, "gptq{bits=3 group=16}", batches((2, 16)), tmp_path)
    assert len(coded(found)) > 0 and all(same_parts(found, wanted, site) for site in coded(found))
