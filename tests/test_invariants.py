"""What holds of every calibrated pass, over six families: Llama, Qwen3, GPT-2, OPT, norms of 1 + w, experts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from ir.execute import empty_inputs
from ir.program import TYPE, Program, is_call
from ir.text import dump
from ir.verify import verify
from passes.act import Act
from passes.base import Context, Log
from passes.equiv.discover import discover
from passes.equiv.groups import EquivGroup, annotate
from passes.fold import Fold
from passes.kv import Kv
from passes.omniquant import Omniquant
from passes.quantize.clipping import clipped, clipped_codes
from passes.quantize.gptq import GptqSpec, gptq
from passes.quantize.uniform import packed, rtn
from passes.rtn import Rtn
from passes.scale_search import candidates
from passes.training.transforms import transforms
from tests.architectures import doubled, ids_for, prefill_and_decode, relative_error, traced
from tests.coded_sites import coded, same_parts
from tests.solver_problems import draw

aten, nomul = torch.ops.aten, torch.ops.nomul
SIX = ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"]
DATA = (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))


def scaled(program: Program, shift: bool, seed: int = 0) -> tuple[Program, list[EquivGroup]]:
    """A copy with log-normal scales, signs and shifts, where groups allow them, folded; and the groups."""
    program = program.clone()
    Fold().run(program, Context())
    groups = list(discover(program).groups)
    for i, group in enumerate(groups):
        s = draw(group.size, seed=seed + i).exp()
        s = s * draw(group.size, seed=seed + 50 + i).sign() if "sign" in group.supports else s
        moved = draw(group.size, seed=seed + 90 + i) if shift and "shift" in group.supports else None
        annotate(program, group, s, "test", moved)
    Fold().run(program, Context())
    return program, groups


def full_logits(program: Program, ids: Tensor) -> Tensor:
    """The logits of all tokens at once."""
    dtype = program.inputs[2].meta[TYPE].dtype
    with torch.no_grad():
        logits: Tensor = program.module()(*empty_inputs(program, ids, dtype).values())[0]
    return logits


@pytest.mark.parametrize("name", SIX)
def test_float32_models_stay_within_rounding(name: str) -> None:
    program, ids = traced(name, 2)[0], ids_for()
    for shift in (False, True):
        found, groups = scaled(program, shift)
        assert groups
        assert relative_error(prefill_and_decode(found, ids), prefill_and_decode(program, ids)) < 1e-4


@pytest.mark.parametrize("name", SIX)
def test_scales_of_one_and_shifts_of_zero_change_no_byte(name: str) -> None:
    program = traced(name, 2)[0]
    Fold().run(program, Context())
    before, weights = dump(program).splitlines()[1:], {n: program.params.get(n).clone() for n in program.params}
    for group in discover(program).groups:
        moved = torch.zeros(group.size) if "shift" in group.supports else None
        annotate(program, group, torch.ones(group.size), "test", moved)
    Fold().run(program, Context())
    assert dump(program).splitlines()[1:] == before
    assert set(program.params) == set(weights)
    assert all(torch.equal(program.params.get(n), tensor) for n, tensor in weights.items())


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("shift", [False, True])
def test_a_fold_leaves_weights_and_declared_additions_only(name: str, shift: bool) -> None:
    program = traced(name, 2)[0]
    Fold().run(program, Context())
    found, groups = scaled(program, shift)
    verify(found, full=True)
    assert not found.attributes.get("equiv") and not found.attributes.get("held")
    assert not [n for n in found.params if n.startswith(("scales.", "shifts."))]
    more = calls(found) - calls(program)
    shifted = [g for g in groups if shift and "shift" in g.supports]
    # A shift behind an RMS norm is an addition; gains and biases are operands of calls that were there.
    assert more.keys() <= ({"aten.add.Tensor"} if shifted else set())
    assert not calls(program) - calls(found)
    kinds = [[str(n.meta[TYPE]) for n in p.outputs] for p in (program, found)]
    assert kinds[0] == kinds[1]


def calls(program: Program) -> Counter[str]:
    """How often each operator is called."""
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("name", SIX)
def test_folded_programs_decode_from_a_cache_as_they_run_at_once(name: str) -> None:
    program, ids = doubled(traced(name, 2)[0]), ids_for()
    found, _ = scaled(program, shift=True)
    prefill, last = prefill_and_decode(found, ids)
    whole = full_logits(found, ids)
    assert relative_error([prefill, last[:, -1]], [whole[:, :-1], whole[:, -1]]) < 1e-10


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma"])
def test_gradients_of_scales_and_shifts_are_those_of_differences(name: str) -> None:
    program = doubled(traced(name, 1)[0])
    groups = discover(program).of("norm->linears", "v->o", "up->down", "q<->k")
    parts = transforms(program, groups, True, "test")
    originals = {n: program.params.get(n) for n in parts.names}
    weigh = {n: draw(*t.shape, seed=i) for i, (n, t) in enumerate(originals.items())}
    sites = [g.site for g in groups]
    sizes = {g.site: g.size for g in groups}

    def loss(*values: Tensor) -> Tensor:
        logs, moved = values[: len(sites)], values[len(sites) :]
        s = {site: log.exp() for site, log in zip(sites, logs, strict=True)}
        shifts = dict(zip(sorted(parts.shifted), moved, strict=True))
        found = parts.apply(originals, s, shifts)
        return sum(((found[n] * weigh[n]).sum() for n in found), torch.zeros(()))

    leaves = [0.3 * draw(sizes[site], seed=7) for site in sites]
    leaves += [draw(sizes[site], seed=8) for site in sorted(parts.shifted)]
    assert parts.shifted
    points = [leaf.requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(loss(*points), points)
    for i, (leaf, grad) in enumerate(zip(points, grads, strict=True)):
        way = draw(*leaf.shape, seed=20 + i)
        step = 1e-6
        with torch.no_grad():
            up, down = (
                loss(*[p + sign * step * way if j == i else p for j, p in enumerate(points)]) for sign in (1, -1)
            )
        wanted = float((up - down) / (2 * step))
        assert float((grad * way).sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "inputs", "group"), [(5, 32, 8), (3, 20, 8), (4, 7, 7)])
def test_packed_codes_decode_to_what_training_saw(bits: int, rows: int, inputs: int, group: int) -> None:
    weight = draw(rows, inputs).float()
    weight[0], weight[1], weight[2] = 0.0, 0.7, weight[2].abs()
    strengths = 3 * draw(2, rows, -(-inputs // group), seed=4).float()
    for symmetric in (False, True):
        codes = clipped_codes(weight, strengths, bits, group, symmetric)
        stored = packed(codes, symmetric)
        assert int(codes.codes.max()) < 2**bits and int(codes.zeros.max()) < 2**bits
        assert torch.equal(stored.dequantize(), clipped(weight, strengths, bits, group, symmetric))


@pytest.mark.parametrize("name", SIX)
def test_training_ends_no_worse_and_floats_stay_float(name: str) -> None:
    program = traced(name, 2)[0]
    log = Log("omniquant")
    Omniquant(bits=3, group=16, epochs=2).run(program, Context(log=log, calibration=DATA))
    rows = [r.figures for r in log.reports if "loss_after" in r.figures and "epochs" in r.figures]
    assert len(rows) == 2 and all(f["loss_after"] <= f["loss_before"] for f in rows)
    assert coded(program)
    assert not list(program.calls(nomul.encode_tokens, nomul.decode_tokens, nomul.straight_tokens))


@pytest.mark.parametrize("name", [*SIX, "bloom", "gemma2", "gptj"])
def test_weights_of_attention_are_never_coded(name: str) -> None:
    program = traced(name, 2)[0]
    Rtn(bits=8, group=16).run(program, Context(log=Log("rtn")))
    program.level = "compressed"
    Act().run(program, Context(log=Log("act")))
    Kv().run(program, Context(log=Log("kv")))
    coded_values = list(program.calls(nomul.encode_tokens))
    assert coded_values
    for node in coded_values:
        source, passed = node.args[0], 0
        while is_call(source, aten.view, aten.reshape, aten.transpose, aten.clone) and passed < 8:
            source, passed = source.args[0], passed + 1  # type: ignore[union-attr]
        assert not is_call(source, aten.softmax, aten._softmax), f"{node.name} codes {source}"


def test_awq_with_an_exponent_of_zero_is_rounding_to_nearest(tiny_model: Program) -> None:
    plain = tiny_model.clone()
    Fold().run(plain, Context())
    found = plain.clone()
    group = discover(found).of("norm->linears")[0]
    strength, typical = draw(group.size).abs(), draw(group.size, seed=1).abs().clamp(0.01, 1.0)
    first, second, *_ = candidates(strength, typical, 20)
    assert torch.equal(first, torch.ones_like(first)) and not torch.equal(second, first)
    annotate(found, group, first, "test")
    Fold().run(found, Context())
    for program in (found, plain):
        Rtn(bits=3, group=16).run(program, Context(log=Log("rtn")))
    assert all(same_parts(found, plain, site) for site in coded(plain))


def test_static_groups_have_the_ranges_of_the_weight_whatever_the_order() -> None:
    weight, x = draw(6, 32), draw(100, 32, seed=2) * torch.arange(1, 33)
    spec = GptqSpec(bits=4, group=8, symmetric=False, terms=0, order="inputs", search=False, damp=0.01)
    codes, nearest = gptq(weight, x.T @ x, spec), rtn(weight, 4, 8)
    assert torch.equal(codes.scales, nearest.scales) and torch.equal(codes.zeros, nearest.zeros)
    assert not torch.equal(codes.codes, nearest.codes)
    # Inputs that change places within their groups change nothing but their places.
    within = torch.cat([torch.arange(8).flip(0) + 8 * g for g in range(4)])
    turned = gptq(weight[:, within], (x.T @ x)[within][:, within], spec)
    assert torch.equal(turned.scales, codes.scales) and torch.equal(turned.codes, codes.codes[:, within])


def test_uncorrelated_inputs_of_one_strength_leave_rounding_to_nearest() -> None:
    weight = draw(6, 32)
    spec = GptqSpec(bits=3, group=8, symmetric=False, terms=0, order="stored", search=False, damp=0.01)
    assert torch.equal(gptq(weight, 3.7 * torch.eye(32, dtype=torch.float64), spec).codes, rtn(weight, 3, 8).codes)
