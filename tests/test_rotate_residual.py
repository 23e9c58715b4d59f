"""`rotate{residual}`: one basis for the whole residual stream where norms allow it, and a reason where they do not."""

from __future__ import annotations

import pytest
import torch

from ir.analysis import LinearSite, blocks, layout, linear_sites
from ir.edit import Editor
from ir.ops.packing import unpack_bits
from ir.program import Program
from ir.verify import verify
from passes.base import Context, Log
from passes.equiv.residual import residual_stream
from passes.equiv.walk import Blocked
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from passes.rotate import Rotate
from tests.architectures import doubled, traced
from tests.rotation_cases import error, folded, ops, rotated, sites_of, turn_matrix

TURNED = {"llama": 2, "llama_untied": 0, "qwen2": 0, "qwen3": 0, "mistral": 0, "phi3": 0, "gemma": 2}
LEFT = {
    "gpt2": "layer norm",
    "neox": "layer norm",
    "opt": "layer norm",
    "olmo2": "gains",
    "gemma2": "gains",
    "mixtral": "neither a linear",
}


@pytest.mark.parametrize(("name", "ends"), TURNED.items())
def test_the_function_stays_and_operators_remain_only_at_the_ends(name: str, ends: int) -> None:
    program = folded(name)
    turned, log = rotated(program, Rotate())
    assert error(turned, program) < 1e-10
    assert not [d for d in log.diagnostics if d.site == "residual stream"]
    inside = {n for block in blocks(turned) for n in block.nodes}
    assert len([n for n in ops(turned) if n not in inside]) == ends
    # Only what leaves the gate is turned by an operator in a block.
    assert len([n for n in ops(turned) if n in inside]) == 2
    assert [len(b.nodes) for b in blocks(turned)] == [len(b.nodes) + 1 for b in blocks(program)]


@pytest.mark.parametrize(("name", "reason"), LEFT.items())
def test_where_norms_forbid_it_operators_turn_the_inputs(name: str, reason: str) -> None:
    program = folded(name)
    turned, log = rotated(program, Rotate())
    assert error(turned, program) < 1e-10
    (why,) = [d.reason for d in log.diagnostics if d.site == "residual stream"]
    assert reason in why
    assert len(ops(turned)) == len(ops(rotated(program, Rotate(residual=False))[0]))


def test_the_stream_is_what_writes_and_reads_it() -> None:
    program = folded("llama_untied")
    sites = [*sites_of(program), *_head(program)]
    stream = residual_stream(program, {s.node: s for s in sites})
    last = [[s.name.rpartition(".")[2] for s in group] for group in (stream.writers, stream.readers, stream.after)]
    assert last == [
        ["o_proj", "down_proj"] * 2,
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"] * 2,
        ["lm_head"],
    ]
    assert stream.before is not None and stream.before.target == "model.embed_tokens.weight"
    plan = layout(program)
    assert (stream.entry, stream.exit) == (plan.blocks[0].entry, plan.blocks[-1].exit)


def _head(program: Program) -> list[LinearSite]:
    return linear_sites(program, layout(program).epilogue)[0]


def test_weights_are_in_the_basis_of_the_signs() -> None:
    program = folded("llama", 1)
    turned, _ = rotated(program, Rotate())
    entry = ops(turned)[0]
    signs = unpack_bits(turned.value(entry.args[1]), 1, 64)  # type: ignore[arg-type]
    matrix = turn_matrix(signs, 64) / 8
    for site in sites_of(program):
        old, new = program.params.get(site.weight), turned.params.get(site.weight)
        if site.name.endswith(("q_proj", "gate_proj")):
            torch.testing.assert_close(new, old @ matrix.T, rtol=0, atol=1e-14)
        if site.name.endswith("down_proj"):
            assert torch.allclose(new.norm(dim=0).square().sum(), old.square().sum() / site.inputs)


@pytest.mark.parametrize("site", ["o_proj", "down_proj", "q_proj", "up_proj"])
def test_a_weight_in_the_old_basis_changes_the_function(site: str) -> None:
    program = folded("llama", 1)
    turned, _ = rotated(program, Rotate())
    found = next(s for s in sites_of(program) if s.name.endswith(site))
    Editor(turned, "test").param(found.weight, program.params.get(found.weight))
    assert error(turned, program) > 1e-3


def test_a_weight_that_is_to_stay_leaves_the_stream() -> None:
    program = folded("llama")
    turned, log = rotated(program, Rotate(skip=("model.layers.1.mlp.down_proj",)))
    assert error(turned, program) < 1e-10
    assert any(d.site == "residual stream" and "down_proj" in d.reason for d in log.diagnostics)


def test_gains_must_be_folded_first() -> None:
    program = doubled(traced("llama")[0])
    with pytest.raises(Blocked, match="gains"):
        residual_stream(program, {s.node: s for s in sites_of(program)})


def test_without_operators_only_what_weights_take_in_is_turned() -> None:
    whole, _ = rotated(folded("llama_untied"), Rotate(online=False))
    assert not ops(whole)
    program = folded("llama")
    part, log = rotated(program, Rotate(online=False))
    assert error(part, program) < 1e-10 and not ops(part)
    assert any(d.site == "residual stream" and "operator" in d.reason for d in log.diagnostics)


def test_the_manager_finds_it_exact_and_once_is_enough() -> None:
    program = traced("llama")[0]
    reports = run_pipeline(program, parse("fold,rotate{residual}"), Context(), Settings(verify="full"))
    assert reports[1].probe_error is not None and reports[1].probe_error < 1e-5
    count, log = len(ops(program)), Log("rotate")
    Rotate().run(program, Context(log=log))
    verify(program, full=True)
    assert len(ops(program)) == count


def test_the_plan_says_what_will_be_done() -> None:
    program = folded("llama")
    rows = Rotate().plan(program)
    assert [r.site for r in rows if "insert" in r.action and "adds" in r.figures][-2:] == [
        layout(program).blocks[0].entry.name,
        layout(program).blocks[-1].exit.name,
    ]
