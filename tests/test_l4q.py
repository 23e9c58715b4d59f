"""`l4q`: what is stored is what was trained, nothing else is left, and training comes closer than rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ir.analysis import blocks
from ir.decode import codes_of, is_coded
from ir.errors import UnsupportedError, UsageError
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes
from ir.program import Program, is_call
from ir.verify import verify
from passes.base import Log, OptionError
from passes.pipeline import parse
from passes.quantize.first_levels import first_levels
from passes.quantize.uniform import rtn
from passes.training import loop
from passes.training.loss import next_token_loss, teacher_loss
from passes.training.trained_codes import Grid, TrainedCodes
from tests.architectures import ids_for, traced
from tests.coded_sites import coded, same_parts
from tests.pipeline_runs import LONG, resumed
from tests.pipeline_runs import run as run_text
from tests.shiftadd_runs import SITES
from tests.solver_problems import draw
from tests.test_ast import logits

QUICK = "group=16 epochs=4"
FORMS = {
    "zero points": "bits=2",
    "float offsets": "bits=2 offset=float",
    "no offsets": "bits=3 offset=none",
    "powers of two": "bits=3 offset=none terms=1",
    "powers of two, zero points": "bits=2 terms=2",
    "powers of two, offsets": "bits=2 offset=float terms=3",
    "in codes": "bits=2 domain=code",
    "in groups": "bits=2 offset=float domain=group",
    "in groups, scales alone": "bits=2 domain=group rank=0",
    "scales alone": "bits=2 rank=0",
    "warmed": "bits=2 warm=1 weight_rate=1e-3",
    "warmed, in codes": "bits=2 warm=1 weight_rate=1e-3 domain=code offset=float",
    "from gptq": "bits=2 begin=gptq rate=1e-4 scale_rate=3e-4",
    "from gptq, warmed": "bits=2 begin=gptq warm=1 offset=none weight_rate=1e-3",
    "whole weights": "bits=2 rank=0 whole weight_rate=1e-3",
    "absolute": "bits=2 relative=false scale_rate=1e-5",
}


def run(program: Program, text: str, data: Any = LONG, work: Path | None = None) -> tuple[Program, Log]:
    return run_text(program, text, data, work)


def losses_of(log: Log) -> tuple[float, float]:
    *_, row = (r.figures for r in log.reports if "loss_after" in r.figures)
    return row["loss_before"], row["loss_after"]


def judged() -> list[Tensor]:
    samples = [row for batch in LONG for row in batch.split(1)]
    return [samples[i] for i in loop.split(len(samples))[1]]


def distance(program: Program, original: Program) -> float:
    losses = [float(teacher_loss(logits(program, ids), logits(original, ids))) for ids in judged()]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_the_program_is_what_training_ran(tiny_model: Program, options: str) -> None:
    found, log = run(tiny_model, f"l4q{{{options} {QUICK}}}")
    verify(found, full=True)
    before, after = losses_of(log)
    assert after < before
    # The loss that was judged is that of the finished program, to the last bit.
    assert distance(found, tiny_model) == pytest.approx(after, rel=1e-6)
    assert sorted(coded(found)) == sorted(SITES)
    inside = [n for block in blocks(found) for n in block.nodes]
    assert not any(is_call(n, torch.ops.aten.linear) for n in inside)
    left = [n for n in found.params if found.params.type_of(n).dtype == torch.float32]
    assert all("norm" in n or "embed" in n or "lm_head" in n or "rotary" in n for n in left)
    form = ShiftCodes if "terms" in options or "offset=float" in options else QuantCodes
    assert all(isinstance(codes_of(n, found.params.get), form) for n in inside if is_coded(n))
    flips = [r.figures["changed_codes"] for r in log.reports if "changed_codes" in r.figures]
    still = any(word in options for word in ("rank=0", "gptq", "domain=group"))
    assert len(flips) == len(SITES) and (max(flips) > 0 or still)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_a_dry_run_knows_the_bytes(tiny_model: Program, options: str) -> None:
    (pass_,) = parse(f"l4q{{{options} {QUICK} epochs=0}}".replace("epochs=4 ", "")).passes()
    planned = {row.site: row.figures["bytes"] for row in pass_.plan(tiny_model)}
    found, _ = run(tiny_model, str(pass_.name) + f"{{{options} group=16 epochs=0}}")
    assert planned == {s: codes_of(n, found.params.get).stored_bits // 8 for s, n in coded(found).items()}


def test_it_starts_as_rounding_to_nearest_and_ends_closer(tiny_model: Program) -> None:
    nearest, _ = run(tiny_model, "rtn{bits=2 group=16}")
    start, _ = run(tiny_model, "l4q{bits=2 group=16 epochs=0 begin=minmax}")
    assert all(same_parts(nearest, start, site) for site in SITES)
    scales, _ = run(tiny_model, f"l4q{{bits=2 {QUICK} rank=0}}")
    found, _ = run(tiny_model, f"l4q{{bits=2 {QUICK} rank=4}}")
    distances = [distance(p, tiny_model) for p in (found, scales, start)]
    assert distances == sorted(distances) and distances[0] < 0.9 * distances[2]


def test_whole_weights_trained_in_blocks_first_come_closer_still(tiny_model: Program) -> None:
    start, _ = run(tiny_model, "l4q{bits=2 group=16 epochs=0}")
    blocks_only, log = run(tiny_model, "blockap{bits=2 group=16 rate=1e-3 epochs=4}")
    same, _ = run(tiny_model, "l4q{bits=2 group=16 epochs=0 warm=4 weight_rate=1e-3 rank=0}")
    # What l4q takes over are the codes that blockap would store.
    assert all(same_parts(blocks_only, same, site) for site in SITES)
    both, _ = run(tiny_model, f"l4q{{bits=2 {QUICK} warm=4 weight_rate=1e-3}}")
    distances = [distance(p, tiny_model) for p in (both, blocks_only, start)]
    assert distances == sorted(distances)
    losses = [(r.figures["loss_before"], r.figures["loss_after"]) for r in log.reports if "loss_after" in r.figures]
    assert len(losses) == 2 and all(after < before for before, after in losses)


@pytest.mark.parametrize("options", ["", " offset=none", " terms=2"])
def test_it_can_begin_at_the_codes_of_gptq(tiny_model: Program, options: str) -> None:
    symmetric = options.replace("offset=none", "symmetric")
    swept, _ = run(tiny_model, f"gptq{{bits=2 group=16{symmetric}}}")
    for text in ("l4q{bits=2 group=16 epochs=0 begin=gptq", "blockap{bits=2 group=16 epochs=0 begin=gptq"):
        start, _ = run(tiny_model, text + options + "}")
        a, b = (
            torch.stack([codes_of(coded(p)[s], p.params.get).dequantize() for s in SITES[:1]]) for p in (swept, start)
        )
        assert torch.equal(a, b)
    nearest, _ = run(tiny_model, f"l4q{{bits=2 group=16 epochs=0{options}}}")
    assert distance(start, tiny_model) < distance(nearest, tiny_model)
    found, _ = run(tiny_model, f"l4q{{bits=2 {QUICK} begin=gptq rate=1e-4 scale_rate=3e-4{options}}}")
    assert distance(found, tiny_model) < distance(start, tiny_model)


@pytest.mark.parametrize("name", ["blockap", "l4q"])
def test_blocks_that_were_finished_are_taken_up(
    name: str, tiny_model: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import passes.training.blocks as module

    warm = "warm=2 weight_rate=1e-3 epochs=1" if name == "l4q" else "epochs=2 rate=1e-3"
    text = f"{name}{{bits=2 group=16 {warm}}}"
    whole, log = run(tiny_model, text)
    plain, trained = module.block_problem, list[int]()

    def interrupted(part: Any, walked: Any, *rest: Any) -> Any:
        trained.append(walked.block.index)
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return plain(part, walked, *rest)

    monkeypatch.setattr(module, "block_problem", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, text, work=tmp_path)
    again, said = run(tiny_model, text, work=tmp_path)
    assert trained == [0, 1, 1]
    assert all(same_parts(again, whole, site) for site in SITES)
    assert [r.figures for r in said.reports] == [r.figures for r in log.reports]


def test_weights_of_frozen_sites_stay(tiny_model: Program) -> None:
    frozen, others = [s for s in SITES if "v_proj" in s or "o_proj" in s], [s for s in SITES if "_proj" in s]
    text = f"l4q{{bits=2 {QUICK} rank=0 whole weight_rate=1e-3 scale_rate=0 frozen=[*v_proj *o_proj]}}"
    _, log = run(tiny_model, text)
    flips = {r.site: r.figures["changed_codes"] for r in log.reports if "changed_codes" in r.figures}
    assert frozen and all(flips[site] == 0 for site in frozen)
    assert any(flips[site] > 0 for site in others) and losses_of(log)[1] < losses_of(log)[0]
    with pytest.raises(UsageError, match="nowhere"):
        run(tiny_model, "l4q{group=16 frozen=[nowhere]}")


def test_codes_stay_where_offsets_of_groups_learn(tiny_model: Program) -> None:
    start, _ = run(tiny_model, "l4q{bits=2 group=16 epochs=0 offset=float}")
    for rank in (0, 2):
        found, log = run(tiny_model, f"l4q{{bits=2 {QUICK} offset=float domain=group rank={rank}}}")
        ours, theirs = ({s: codes_of(n, p.params.get) for s, n in coded(p).items()} for p in (found, start))
        assert all(torch.equal(ours[s].signs, theirs[s].signs) for s in SITES)  # type: ignore[union-attr]
        moved = [ours[s].offsets.float() - theirs[s].offsets.float() for s in SITES]  # type: ignore[union-attr]
        assert any(bool(m.any()) for m in moved) and losses_of(log)[1] < losses_of(log)[0]
    for options in ("offset=zero", "offset=float whole"):
        with pytest.raises(OptionError, match="domain"):
            parse(f"l4q{{domain=group {options}}}")


def test_text_is_learned_where_it_is_the_loss(tiny_model: Program) -> None:
    few = (LONG[0][:3],)
    start, _ = run(tiny_model, "l4q{bits=3 group=16 epochs=0}", few)
    found, log = run(tiny_model, "l4q{bits=3 group=16 epochs=8 loss=ce}", few)
    text = [float(next_token_loss(logits(p, few[0]), few[0])) for p in (found, start)]
    assert text[0] < text[1]
    assert losses_of(log)[1] == pytest.approx(text[0], rel=1e-5)


def test_without_rounding_it_is_lora_merged(tiny_model: Program) -> None:
    found, log = run(tiny_model, "l4q{bits=16 epochs=6 loss=ce rank=2}")
    before, after = losses_of(log)
    assert after < before and not coded(found) and sorted(found.params) == sorted(tiny_model.params)
    moved = {n: found.params.get(n) - tiny_model.params.get(n) for n in found.params}
    ranks = {n: int(torch.linalg.matrix_rank(d.double(), rtol=1e-3)) for n, d in moved.items() if bool(d.any())}
    assert len(ranks) == len(SITES) and max(ranks.values()) <= 2
    losses = [float(next_token_loss(logits(found, ids), ids)) for ids in judged()]
    assert sum(losses) / len(losses) == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = resumed(tiny_model, f"l4q{{bits=2 {QUICK}}}", LONG, tmp_path, stop, monkeypatch)
    assert all(same_parts(runs.again, runs.whole, site) for site in SITES)
    rows = [(r.site, r.by, r.figures) for r in runs.log.reports]
    assert [(r.site, r.by, r.figures) for r in runs.said.reports] == rows


def test_memory_spent_instead_of_time_gives_the_same(tiny_model: Program) -> None:
    spent, saved = (run(tiny_model, f"l4q{{bits=2 {QUICK} recompute={how}}}")[0] for how in ("false", "true"))
    assert all(same_parts(spent, saved, site) for site in SITES)


def test_codes_in_bfloat16_products_are_stored_as_trained(tiny_model: Program) -> None:
    from dataclasses import replace

    from passes.base import Context
    from passes.manager import Settings, run_pipeline

    program, log = tiny_model.clone(), Log()
    ctx = Context(log=log, calibration=LONG, precision="bfloat16")
    run_pipeline(program, parse(f"l4q{{bits=2 {QUICK}}}"), replace(ctx), Settings())
    before, after = losses_of(log)
    # Judged with rounded products, the finished program with exact ones.
    assert after < before and distance(program, tiny_model) == pytest.approx(after, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_it_runs_on_many_architectures(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, "l4q{bits=3 group=8 epochs=1 offset=float}", data)
    verify(found, full=True)
    before, after = losses_of(log)
    assert after <= before and coded(found)


def test_a_loss_that_is_not_finite_leaves_the_start(tiny_model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    import passes.training.problems as problems

    start, _ = run(tiny_model, "l4q{bits=2 group=16 epochs=0}")
    plain, calls = problems.teacher_loss, 0

    def poisoned(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return plain(*args) * (float("nan") if calls > 6 else 1.0)

    monkeypatch.setattr(problems, "teacher_loss", poisoned)
    found, log = run(tiny_model, f"l4q{{bits=2 {QUICK}}}")
    assert all(same_parts(found, start, site) for site in SITES)
    assert any("not finite" in note.text for note in log.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("bits=1", "neither 2..8 nor 16"),
        ("bits=16 rank=0", "nothing to train"),
        ("bits=16 warm=1", "additions alone"),
        ("bits=16 whole", "additions alone"),
        ("rank=-1", "outside"),
        ("terms=4", "outside"),
        ("batch=0", "outside"),
    ],
)
def test_options_out_of_range(options: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse(f"l4q{{{options}}}")


def test_what_does_not_fit_is_refused(tiny_model: Program) -> None:
    with pytest.raises(UnsupportedError, match="does not divide"):
        run(tiny_model, "l4q{group=24}")
    with pytest.raises(OptionError, match="rank"):
        run(tiny_model, "l4q{group=16 rank=33}")
    with pytest.raises(UnsupportedError, match="no linear"):
        run(tiny_model, "l4q{group=16 skip=*}")


@pytest.mark.parametrize("offset", ["none", "zero", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_first_levels_are_those_of_their_names(bits: int, offset: Any) -> None:
    weight, grid = (draw(6, 32, seed=3) + 0.3).float(), Grid(bits, 8, offset)
    parts = weight.unflatten(1, (-1, 8))
    low, high = parts.amin(-1), parts.amax(-1)

    def dense(begin: Any, importance: Tensor | None = None) -> Tensor:
        return TrainedCodes(weight, grid, *first_levels(weight, grid, begin, importance)).bound({}).dense()

    def error(found: Tensor, weigh: Tensor | float = 1.0) -> float:
        return float(((weight - found).square() * weigh).sum())

    scales, _ = first_levels(weight, grid, "l4q")
    wanted = torch.maximum(low.clamp(max=0) / -(2 ** (bits - 1)), high.clamp(min=0) / (2 ** (bits - 1) - 1))
    torch.testing.assert_close(scales, wanted, rtol=1e-3, atol=0)
    half = (first_levels(weight, grid, "l4q")[0].half().float() / 2).repeat_interleave(8, 1)
    assert bool(((weight - dense("l4q")).abs() <= 1.01 * half).all())
    if offset == "zero":
        assert torch.equal(dense("minmax"), rtn(weight, bits, 8).dequantize())
    assert error(dense("mse")) <= min(error(dense("minmax")), error(dense("l4q")))
    weigh = torch.logspace(-2, 2, 32)
    assert error(dense("hessian", weigh), weigh) <= error(dense("mse"), weigh)
    assert torch.equal(dense("hessian"), dense("mse"))
    assert error(dense("lsqplus")) >= error(dense("mse"))


def test_flat_groups_have_a_scale() -> None:
    weight = torch.tensor([[0.0] * 8 + [0.5] * 8 + [-2.0] * 8])
    for offset in ("none", "zero", "float"):
        for begin in ("l4q", "minmax", "mse", "lsqplus"):
            scales, offsets = first_levels(weight, Grid(3, 8, offset), begin)  # type: ignore[arg-type]
            found = TrainedCodes(weight, Grid(3, 8, offset), scales, offsets).bound({}).dense()  # type: ignore[arg-type]
            assert bool(torch.isfinite(found).all()) and bool((scales > 0).all())
            assert float((found - weight).abs().max()) <= 0.3


def test_seeds_draw_other_additions(tiny_model: Program) -> None:
    weight, grid = tiny_model.params.get(f"{SITES[0]}.weight"), Grid(2, 16, "none")
    levels = first_levels(weight, grid, "l4q")
    a, b, again = (TrainedCodes(weight, grid, *levels, 4, seed=s).start()["down"] for s in (0, 1, 0))
    assert not torch.equal(a, b) and torch.equal(a, again)


@pytest.mark.parametrize(
    "options",
    ["bits=3", "bits=3 terms=1", "bits=2 domain=code", "bits=3 begin=hessian", "bits=3 warm=1 weight_rate=1e-3"],
)
def test_masks_are_kept(tiny_model: Program, options: str) -> None:
    before, _ = run(tiny_model, "sparse{method=wanda}")
    found, log = run(tiny_model, f"sparse{{method=wanda}},l4q{{{options} {QUICK}}}")
    verify(found, full=True)
    start, after = losses_of(log)
    assert after < start and distance(found, tiny_model) == pytest.approx(after, rel=1e-6)
    for site in SITES:
        ours, theirs = (codes_of(coded(p)[site], p.params.get) for p in (found, before))
        assert isinstance(ours, SparseCodes) and isinstance(theirs, SparseCodes)
        assert not isinstance(ours.kept, Tensor) and torch.equal(ours.mask, theirs.mask)
    (pass_,) = parse(f"l4q{{{options} {QUICK}}}").passes()
    masked = tiny_model.clone()
    for pipeline in parse("sparse").passes():
        pipeline.foresee(masked)
    planned = {row.site: row.figures["bytes"] for row in pass_.plan(masked)}
    assert planned == {s: codes_of(n, found.params.get).stored_bits // 8 for s, n in coded(found).items()}


def test_under_masks_it_does_not_begin_at_a_sweep(tiny_model: Program) -> None:
    with pytest.raises(OptionError, match="begin"):
        run(tiny_model, "sparse,l4q{bits=3 group=16 begin=gptq}")


@pytest.mark.parametrize("text", ["l4q{bits=2 group=16 epochs=1 warm=1", "blockap{bits=2 group=16 epochs=1"])
def test_blocks_without_a_site_are_passed_by(tiny_model: Program, text: str) -> None:
    found, _ = run(tiny_model, text + " skip=[model.layers.0*]}")
    assert sorted(coded(found)) == [site for site in sorted(SITES) if ".1." in site]


@pytest.mark.parametrize("options", ["bits=16", "bits=3 group=16 offset=float domain=group"])
def test_additions_that_would_fill_masks_are_refused(tiny_model: Program, options: str) -> None:
    with pytest.raises(OptionError, match="has a mask"):
        run(tiny_model, f"sparse,l4q{{{options} epochs=1}}")
