"""Gradients block by block: those of the whole program, its loss included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from ir.analysis import blocks, linear_sites
from ir.errors import UnsupportedError
from ir.execute import empty_inputs, with_positions_in
from ir.program import Program, is_call
from passes.base import Context
from passes.gradients import loss_gradients
from passes.rtn import Rtn
from tests.programs import I64, Sketch, aten, hidden
from tests.test_stream import side_program
from tests.watch import batches


class Keep(fx.Interpreter):
    """Runs a whole program with gradients and keeps every value by node name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module(lambda name: double(program.params.get(name))))  # type: ignore[arg-type]
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and n.op != "get_attr":
            value = value if value.requires_grad else value.detach().requires_grad_()
        self.seen[n.name] = value  # type: ignore[assignment]
        return value


def double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def whole(program: Program, ids: Tensor, nodes: list[fx.Node]) -> tuple[float, list[Tensor]]:
    """Loss and gradients by autograd through the whole program at once, in float64."""
    keep = Keep(program)
    logits = keep.run(*empty_inputs(program, ids, torch.float64).values())[0]
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    found = torch.autograd.grad(loss, [keep.seen[n.name] for n in nodes], allow_unused=True)
    values = [keep.seen[n.name] for n in nodes]
    return float(loss.detach()), [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]


def compare(program: Program, nodes: list[fx.Node], ids: Tensor) -> None:
    program_nodes = {n.name: n for n in program.graph.nodes}
    nodes = [program_nodes[n.name] for n in nodes]
    expected_loss, expected = whole(program, ids, nodes)
    found: dict[fx.Node, list[Tensor]] = {n: [] for n in nodes}
    loss = loss_gradients(program, ids, {n: rows.append for n, rows in found.items()}, torch.float64)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for node, want in zip(nodes, expected, strict=True):
        (have,) = found[node]
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))


@pytest.mark.parametrize("shape", [(1, 9), (3, 4)])
def test_equal_to_autograd_through_the_whole_program(tiny_model: Program, shape: tuple[int, int]) -> None:
    program = with_positions_in(tiny_model, torch.float64)
    nodes = [s.node for block in blocks(program) for s in linear_sites(program, block.nodes)[0]]
    nodes += [n for block in blocks(program) for n in block.nodes if is_call(n, aten.silu)]
    assert len(nodes) == 16
    (ids,) = batches(shape)
    compare(program, nodes, ids)
    assert min(float(g.abs().max()) for g in whole(program, ids, nodes)[1]) > 1e-6


def test_through_blocks_that_are_codes_already(tiny_model: Program) -> None:
    program = tiny_model.clone()
    Rtn(group=16, skip=("mlp",)).run(program, Context())
    program = with_positions_in(program, torch.float64)
    nodes = [s.node for block in blocks(program) for s in linear_sites(program, block.nodes)[0]]
    assert len(nodes) == 6
    compare(program, nodes, batches((2, 7))[0])


def test_a_value_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    program = side_program()
    sides = [program.outputs[1].args[0], program.outputs[2].args[0]]
    linears = [s.node for s in linear_sites(program, program.graph.nodes)[0] if s.inputs == 8][:2]
    (ids,) = batches((2, 5), vocab=40)
    found: dict[str, Tensor] = {}
    wanted = {n: (lambda g, name=n.name: found.update({name: g})) for n in [*sides, *linears]}  # type: ignore[misc]
    loss_gradients(program, ids, wanted)  # type: ignore[arg-type]
    assert not any(found[n.name].any() for n in sides)  # type: ignore[union-attr]
    assert all(found[n.name].any() for n in linears)


def test_a_small_step_along_the_gradient_lowers_the_loss_by_its_square(tiny_model: Program) -> None:
    """The bias gradient of a weight, g^T x summed over tokens, against a difference of losses."""
    program, (ids,) = with_positions_in(tiny_model, torch.float64), batches((1, 12))
    site = linear_sites(program, program.graph.nodes)[0][6]
    seen: dict[str, Tensor] = {}
    loss_gradients(program, ids, {site.node: lambda g: seen.update(y=g)}, torch.float64)
    keep = Keep(program)
    keep.run(*empty_inputs(program, ids, torch.float64).values())
    x = keep.seen[site.node.args[0].name]  # type: ignore[union-attr]
    slope = (seen["y"].flatten(0, 1).T @ x.flatten(0, 1)).detach()
    weight = program.params.get(site.weight).double()
    losses = []
    for sign in (1, -1):
        moved = program.clone()
        moved.params.put(site.weight, weight + sign * 1e-5 * slope / slope.norm(), "test")
        losses.append(loss_gradients(moved, ids, {}, torch.float64))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(slope.norm()), rel=1e-6)


def test_nothing_is_left_behind(tiny_model: Program) -> None:
    version = tiny_model.version
    site = linear_sites(tiny_model, tiny_model.graph.nodes)[0][0]
    rows: list[Tensor] = []
    loss_gradients(tiny_model, batches((1, 6))[0], {site.node: rows.append})
    assert tiny_model.version == version and rows[0].dtype == torch.float32 and not rows[0].requires_grad


def test_it_needs_blocks() -> None:
    s = Sketch(0)
    embed, head = s.param("embed", s.random(40, 8)), s.param("head", s.random(40, 8))
    ids = s.input("input_ids", hidden(dtype=I64))
    s.input("attention_mask", hidden(dtype=I64))
    h = s.call(aten.embedding.default, embed, ids, type=hidden(8))
    program = s.program(s.call(aten.linear.default, h, head, type=hidden(40)), name="flat")
    with pytest.raises(UnsupportedError, match="no repeated blocks"):
        loss_gradients(program, batches((1, 4), vocab=40)[0], {})
