"""`ast`: masks under each decay, gradients through them, distillation, resuming, and what is stored at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ir.decode import codes_of
from ir.errors import UnsupportedError
from ir.ops.nm import unpack_mask
from ir.ops.sparse import SparseCodes
from ir.program import Program
from ir.verify import verify
from passes.ast import Ast
from passes.base import Log, OptionError
from passes.pipeline import parse
from passes.sparsify.masks import MASKS
from passes.sparsify.pattern import Pattern, nm_mask
from passes.training import loop, sparse_adam
from passes.training.loss import distilled_loss, next_token_loss, teacher_loss
from passes.training.masked import CHANGES, MASK, WEIGHT, Annealing, MaskCourse, straight
from passes.training.sparse_adam import SparseAdamW
from tests.architectures import ids_for, traced
from tests.coded_sites import coded, decoded, same_parts
from tests.pipeline_runs import LONG, resumed
from tests.pipeline_runs import run as run_text
from tests.shiftadd_runs import SITES, error
from tests.solver_problems import draw

TWO_FOUR = Pattern(2, 4)
QUICK = "epochs=4 rate=5e-4 every=4"


def run(program: Program, text: str, data: Any = LONG, work: Path | None = None) -> tuple[Program, Log]:
    """A pipeline's program and log, on the data that most tests here take."""
    return run_text(program, text, data, work)


def changes_of(log: Log) -> list[float]:
    """What share of the masks changed, by the rows of the report."""
    return [r.figures["changed"] for r in log.reports if "changed" in r.figures]


def losses_of(log: Log) -> tuple[float, float]:
    (row,) = [r.figures for r in log.reports if r.by == "ast" and "loss_after" in r.figures]
    return row["loss_before"], row["loss_after"]


def logits(program: Program, ids: Tensor) -> Tensor:
    from ir.execute import empty_inputs

    with torch.no_grad():
        found: Tensor = program.module(decode=True)(*empty_inputs(program, ids).values())[0]
    return found


def distance(program: Program, original: Program, ids: Tensor) -> float:
    """The divergence from a float program's predictions, in nats a token."""
    return float(teacher_loss(logits(program, ids), logits(original, ids)))


def optimiser_for(weight: Tensor, mask: Tensor | None, decay: float, norm: str = "l2", rate: float = 0.1) -> Any:
    return SparseAdamW([{"params": [weight], "lr": rate, "mask": mask, "decay": decay, "norm": norm}])


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_dropped_weights_shrink_and_kept_ones_stay_without_a_gradient(norm: str) -> None:
    weight = draw(6, 16).requires_grad_()
    start, mask = weight.detach().clone(), nm_mask(draw(6, 16, seed=3), TWO_FOUR)
    chosen = optimiser_for(weight, mask, decay=1e-3, norm=norm, rate=1e-2)
    for _ in range(5):
        weight.grad = torch.zeros_like(weight)
        chosen.step()
    assert torch.equal(weight[mask], start[mask])
    gone = weight[~mask].detach()
    assert bool((gone.abs() < start[~mask].abs()).all()) and bool((gone * start[~mask] > -1e-2).all())


def test_without_masks_and_decay_it_is_adamw() -> None:
    ours, theirs = draw(5, 8).requires_grad_(), draw(5, 8).requires_grad_()
    a = SparseAdamW([{"params": [ours], "lr": 0.01}])
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for i in range(6):
        ours.grad = theirs.grad = draw(5, 8, seed=10 + i)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_decay_is_kept_out_of_the_mean_and_counted_among_the_squares() -> None:
    weight, mask = torch.tensor([2.0, 2.0], dtype=torch.float64).requires_grad_(), torch.tensor([True, False])
    chosen = optimiser_for(weight, mask, decay=0.5, rate=0.1)
    squares = torch.zeros(2, dtype=torch.float64)
    for step, slope in enumerate((0.3, 0.1), 1):
        before = weight.detach().clone()
        weight.grad = torch.full((2,), slope, dtype=torch.float64)
        chosen.step()
        state, pull = chosen.state[weight], torch.where(mask, 0.0, 0.5 * before)
        mean = {1: 0.03, 2: 0.9 * 0.03 + 0.1 * 0.1}[step]
        torch.testing.assert_close(state["exp_avg"], torch.full((2,), mean, dtype=torch.float64))
        squares = 0.95 * squares + 0.05 * (slope + pull).square()
        torch.testing.assert_close(state["exp_avg_sq"], squares)
        root = (squares / (1 - 0.95**step)).sqrt() + 1e-8
        torch.testing.assert_close(weight.detach(), before - 0.1 * (mean / (1 - 0.9**step) + pull) / root)


@pytest.mark.parametrize("at_once", [1, 20])
def test_a_step_in_parts_is_a_step(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = nm_mask(draw(5, 8), TWO_FOUR)
    moved = []
    for numbers in (at_once, 1 << 16):
        monkeypatch.setattr(sparse_adam, "_AT_ONCE", numbers)
        weight = draw(5, 8).requires_grad_()
        chosen = optimiser_for(weight, mask, decay=1e-2)
        for i in range(3):
            # Gradients of products are stored by columns at times.
            weight.grad = draw(8, 5, seed=10 + i).T
            chosen.step()
        moved.append(weight.detach())
    assert torch.equal(*moved)


def test_memory_spent_instead_of_time_gives_the_same(tiny_model: Program) -> None:
    spent, saved = (run(tiny_model, f"sparse,ast{{{QUICK} recompute={how}}}")[0] for how in ("false", "true"))
    assert all(same_parts(spent, saved, site) for site in SITES)


def test_kept_weights_move_as_under_adamw() -> None:
    ours, theirs, mask = draw(5, 8).requires_grad_(), draw(5, 8).requires_grad_(), nm_mask(draw(5, 8), TWO_FOUR)
    a = optimiser_for(ours, mask, decay=1e-2, rate=0.01)
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for i in range(6):
        ours.grad = theirs.grad = draw(5, 8, seed=10 + i)
        a.step()
        b.step()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours[~mask], theirs[~mask])


def test_gradients_pass_straight_to_kept_and_dropped_weights() -> None:
    weight, mask = draw(4, 8).requires_grad_(), nm_mask(draw(4, 8, seed=2), TWO_FOUR)
    x, way = draw(3, 8, seed=4), draw(3, 4, seed=5)
    out = x @ straight(weight, mask).T
    assert torch.equal(out, x @ (weight * mask).T)
    out.backward(way)
    torch.testing.assert_close(weight.grad, way.T @ x)


def test_the_decay_rises_to_its_ramp_and_masks_freeze_at_the_end() -> None:
    how = Annealing(decay=8e-5, norm="l2", ramp=0.25, every=10, freeze=0.1)
    assert [how.decay_at(t) for t in (0.0, 0.125, 0.25, 0.6, 1.0)] == [0.0, 4e-5, 8e-5, 8e-5, 8e-5]
    assert how.renews(10, 0.2) and how.renews(90, 0.9) and not how.renews(11, 0.2) and not how.renews(100, 1.0)
    static = Annealing(decay=8e-5, norm="l2", ramp=0.0, every=0, freeze=0.0)
    assert static.decay_at(0.0) == 8e-5 and not static.renews(10, 0.5)


def test_the_loss_is_the_share_of_two() -> None:
    a, b, ids = draw(2, 5, 9).float(), draw(2, 5, 9, seed=1).float(), torch.randint(0, 9, (2, 5))
    assert float(distilled_loss(a, b, ids, 0.0, 2.0)) == pytest.approx(float(next_token_loss(a, ids)))
    assert float(distilled_loss(a, b, ids, 1.0, 1.0)) == pytest.approx(float(teacher_loss(a, b)))
    mixed = 0.25 * 9 * float(teacher_loss(a / 3, b / 3)) + 0.75 * float(next_token_loss(a, ids))
    assert float(distilled_loss(a, b, ids, 0.25, 3.0)) == pytest.approx(mixed)
    assert float(distilled_loss(b, b, ids, 1.0, 2.0)) == pytest.approx(0.0, abs=1e-6)


def followed(decay: float, steps: int = 200, every: int = 4) -> Tensor:
    """The share of a mask that changed at each renewal, where every weight is wanted and half may stay."""
    weight = draw(16, 32).float()
    wanted = weight + 0.3 * draw(16, 32, seed=1).float()
    how = Annealing(decay, "l2", 0.25, every, 0.0)
    course = MaskCourse({"w": nm_mask(weight.abs(), TWO_FOUR)}, {"w": TWO_FOUR}, how, steps)
    leaves, held = {WEIGHT + "w": weight.clone().requires_grad_()}, {n: t.clone() for n, t in course.held.items()}
    leaf, mask = leaves[WEIGHT + "w"], held[MASK + "w"]
    chosen = course.optimiser(leaves, held, {WEIGHT + "w": 1e-2})
    for step in range(1, steps + 1):
        course.before(chosen, (step - 1) / steps)
        chosen.zero_grad()
        (straight(leaf, mask) - wanted).square().sum().backward()
        chosen.step()
        course.after(leaves, held, step, step / steps)
    return held[CHANGES][:, 0]


def test_a_large_decay_freezes_masks_and_none_lets_them_flip_on() -> None:
    free, held_back = followed(0.0), followed(100.0)
    assert float(free[-10:].mean()) > 0.02 and float(free[-10:].min()) > 0.0
    assert float(held_back[-10:].max()) == 0.0 and float(held_back[0]) > 0.0


def test_a_decay_of_the_wrong_sign_is_seen_in_the_masks() -> None:
    """With it dropped weights grow until they take the place of kept ones, over and over."""
    right, wrong = followed(3.0), followed(-3.0)
    assert float(wrong[-10:].mean()) > 3 * float(right[-10:].mean())
    assert float(wrong[-10:].mean()) > float(followed(0.0)[-10:].mean())


def test_what_is_stored_is_what_was_trained(tiny_model: Program) -> None:
    found, log = run(tiny_model, f"sparse,ast{{{QUICK}}},pack{{values=float32}}")
    verify(found, full=True)
    assert sorted(coded(found)) == sorted(SITES)
    before, after = losses_of(log)
    assert after < before
    # The judged batch is the last; its loss on the packed program is the one that was reported.
    ids = LONG[-1][-1:]
    samples = [row for batch in LONG for row in batch.split(1)]
    judged = [samples[i] for i in loop.split(len(samples))[1]]
    assert torch.equal(judged[-1], ids)
    losses = [float(distilled_loss(logits(found, ids), logits(tiny_model, ids), ids, 0.67, 2.0)) for ids in judged]
    assert sum(losses) / len(losses) == pytest.approx(after, rel=1e-5)


def test_it_comes_closer_than_one_shot_and_than_text_alone(tiny_model: Program) -> None:
    one_shot, _ = run(tiny_model, "sparse")
    taught, _ = run(tiny_model, f"sparse,ast{{{QUICK} teacher=1.0}}")
    text, _ = run(tiny_model, f"sparse,ast{{{QUICK} teacher=0.0}}")
    ids = LONG[-1][-1:]
    found = [distance(p, tiny_model, ids) for p in (taught, text, one_shot)]
    assert found[0] < 0.95 * found[1] and found[0] < 0.97 * found[2], found


def test_masks_move_and_the_log_says_by_how_much(tiny_model: Program) -> None:
    found, log = run(tiny_model, f"sparse,ast{{{QUICK} decay=0}}")
    start, _ = run(tiny_model, "sparse")
    assert max(changes_of(log)) > 0
    moved = [float((mask_at(found, s) != mask_at(start, s)).float().mean()) for s in SITES]
    assert max(moved) > 0
    still, said = run(tiny_model, "sparse,ast{epochs=1 rate=5e-4 every=0}")
    assert all(torch.equal(mask_at(still, s), mask_at(start, s)) for s in SITES) and not changes_of(said)


def mask_at(program: Program, site: str) -> Tensor:
    codes = codes_of(coded(program)[site], program.params.get)
    assert isinstance(codes, SparseCodes)
    return unpack_mask(codes.mask, codes.in_features)


def test_without_a_pass_before_it_starts_from_the_largest(tiny_model: Program) -> None:
    found, _ = run(tiny_model, f"ast{{{QUICK} pattern=1:4}}")
    plain, _ = run(tiny_model, "sparse{method=magnitude pattern=1:4}")
    assert error(found, tiny_model) < error(plain, tiny_model)
    assert set(mask_at(found, SITES[0]).unflatten(1, (-1, 4)).sum(-1).flatten().tolist()) == {1}


def test_dense_weights_can_be_trained_as_a_control(tiny_model: Program) -> None:
    # So few samples that all are trained on and judged.
    found, log = run(tiny_model, "ast{pattern=none epochs=4 rate=3e-4 teacher=0.0}", (LONG[0][:3],))
    before, after = losses_of(log)
    assert not coded(found) and MASKS not in found.attributes and after < before
    still, _ = run(tiny_model, "ast{pattern=none epochs=0}")
    assert distance(still, tiny_model, LONG[-1][-1:]) < 1e-9


def test_dropped_weights_start_below_the_kept_ones_of_their_group(tiny_model: Program) -> None:
    program = tiny_model.clone()
    (site, *_), masks = Ast()._sites(program, next(iter(_blocks(program)))), {}
    masks[site.weight] = Ast()._mask(program, site)
    kept = masks[site.weight].kept
    program.params.put(site.weight, torch.where(kept, program.params.get(site.weight), 0.0), "test")
    dense = Ast(revive=0.5)._dense(program, tiny_model, site, masks[site.weight])
    assert torch.equal(dense[kept], tiny_model.params.get(site.weight)[kept])
    groups, inside = dense.abs().unflatten(1, (-1, 4)), kept.unflatten(1, (-1, 4))
    least = torch.where(inside, groups, torch.inf).amin(-1)
    assert bool((torch.where(inside, 0.0, groups).amax(-1) <= 0.5 * least + 1e-7).all())
    assert torch.equal(nm_mask(dense.abs(), TWO_FOUR), kept)
    assert not Ast(revive=0.0)._dense(program, tiny_model, site, masks[site.weight])[~kept].any()


def _blocks(program: Program) -> Any:
    from ir.analysis import blocks

    return blocks(program)


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = resumed(
        tiny_model, f"sparse{{method=wanda}},ast{{{QUICK}}},pack{{values=float32}}", LONG, tmp_path, stop, monkeypatch
    )
    assert all(same_parts(runs.again, runs.whole, site) for site in SITES)
    rows = [(r.site, r.by, r.figures) for r in runs.log.reports]
    assert [(r.site, r.by, r.figures) for r in runs.said.reports] == rows


@pytest.mark.parametrize("codes", ["gptq{bits=8 group=16}", "shiftadd{bits=6 group=16 terms=0}"])
def test_codes_after_it_are_those_of_the_trained_weights(tiny_model: Program, codes: str) -> None:
    # So few samples that all are trained on and judged, and the trained state is kept.
    begun, few = "sparse{method=wanda},ast{epochs=4 rate=3e-3}", (LONG[0][:3],)
    trained, log = run(tiny_model, f"{begun},pack{{values=float32}}", few)
    before, after = losses_of(log)
    assert after < 0.9 * before
    found, _ = run(tiny_model, f"{begun},{codes}", few)
    one_shot, _ = run(tiny_model, "sparse{method=wanda},pack{values=float32}", few)
    for site in SITES:
        wanted, ours, old = (decoded(p, coded(p)[site]) for p in (trained, found, one_shot))
        assert (ours - wanted).norm() < 0.2 * (old - wanted).norm(), site


@pytest.mark.parametrize("later", ["slorb", "rtn,slim"])
def test_what_would_undo_training_is_refused(tiny_model: Program, later: str) -> None:
    with pytest.raises(UnsupportedError, match="cannot run") as caught:
        run(tiny_model, f"sparse{{method=magnitude}},ast,{later}")
    assert "trained-weights that ast left" in caught.value.why


def test_codes_that_were_trained_are_the_codes_that_are_stored(tiny_model: Program) -> None:
    fast = "epochs=8 rate=2e-3 every=0"
    found, log = run(tiny_model, f"sparse,ast{{{fast} bits=2 group=16}},rtn{{bits=2 group=16}}")
    after, _ = run(tiny_model, f"sparse,ast{{{fast}}},rtn{{bits=2 group=16}}")
    samples = [row for batch in LONG for row in batch.split(1)]
    judged = [samples[i] for i in loop.split(len(samples))[1]]
    losses = [float(distilled_loss(logits(found, i), logits(tiny_model, i), i, 0.67, 2.0)) for i in judged]
    assert sum(losses) / len(losses) == pytest.approx(losses_of(log)[1], rel=1e-5)
    ids = torch.cat(judged)
    assert distance(found, tiny_model, ids) < distance(after, tiny_model, ids)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_it_runs_on_many_architectures(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, "ast{epochs=1 every=2}", data)
    verify(found, full=True)
    before, after = losses_of(log)
    assert after <= before
    assert all(torch.isfinite(decoded(found, node)).all() for node in coded(found).values())


def test_a_loss_that_is_not_finite_leaves_the_start(tiny_model: Program) -> None:
    program = tiny_model.clone()
    Ast(rate=1.0, epochs=2).validate()
    found, log = run(program, "sparse{method=magnitude},ast{epochs=3 rate=1.0},pack{values=float32}")
    before, after = losses_of(log)
    assert after <= before
    assert all(torch.isfinite(decoded(found, node)).all() for node in coded(found).values())


def test_bad_options_and_nothing_to_train_are_named(tiny_model: Program) -> None:
    for text in (
        "ast{pattern=4:2}",
        "ast{teacher=2}",
        "ast{temperature=0}",
        "ast{decay=-1}",
        "ast{ramp=2}",
        "ast{bits=1}",
    ):
        with pytest.raises(OptionError):
            parse(text)
    with pytest.raises(UnsupportedError, match="no weight to train"):
        run(tiny_model, "ast{pattern=2:5}")


def test_masks_of_the_state_are_those_of_the_pattern(tiny_model: Program) -> None:
    course = MaskCourse({"w": torch.ones(2, 4, dtype=torch.bool)}, {"w": TWO_FOUR}, Annealing(0, "l2", 0, 5, 0), 12)
    assert course.held[CHANGES].shape == (2, 2) and list(course.held) == [MASK + "w", CHANGES]


def test_branches_learn_more_slowly(tiny_model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    import passes.ast as module

    seen: dict[str, float] = {}

    def watched(problem: Any, *rest: Any) -> Any:
        seen.update(problem.rates)
        return loop.train(problem, *rest)

    monkeypatch.setattr(module, "train", watched)
    run(tiny_model, "sparse,slorb{k=4},ast{epochs=1 rate=1e-4 branches=0.25}")
    branches = {name for name in seen if "branch_" in name}
    assert {seen[n] for n in branches} == {0.25e-4} and {seen[n] for n in seen.keys() - branches} == {1e-4}
