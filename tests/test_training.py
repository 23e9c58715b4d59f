"""The training loop keeps the best state, undoes divergence, repeats exactly; its loss counts every token alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from passes.training import loss as losses
from passes.training.loop import Loss, Outcome, Problem, Recipe, State, split
from passes.training.loop import train as train_problem
from passes.training.loss import distilled_loss, next_token_loss, plain_loss, teacher_loss, token_loss
from tests.solver_problems import draw

BATCHES = 8


def train(start: State, rates: dict[str, float], loss: Loss, batches: int, recipe: Recipe, seed: int) -> Outcome:
    """The outcome of training on a problem."""
    return train_problem(Problem(start, rates, loss, batches), recipe, seed)


def problem(seed: int = 0) -> tuple[State, list[tuple[Tensor, Tensor]]]:
    """A linear map to be found from noisy samples: the start, and inputs with targets per batch."""
    truth = draw(6, 4, seed=seed)
    inputs = [draw(32, 6, seed=seed + 1 + i) for i in range(BATCHES)]
    return {"weight": torch.zeros(6, 4, dtype=torch.float64)}, [
        (x, x @ truth + 0.1 * draw(32, 4, seed=seed + 50 + i)) for i, x in enumerate(inputs)
    ]


def fit(recipe: Recipe, seed: int = 0, rate: float = 0.05) -> Outcome:
    start, data = problem()

    def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
        x, y = data[batch]
        return plain_loss(x @ state["weight"], y)

    return train(start, {"weight": rate}, loss, BATCHES, recipe, seed)


def test_it_learns_and_reports_the_judged_loss() -> None:
    found = fit(Recipe(epochs=30))
    _, data = problem()
    x, y = data[-1]
    assert found.epochs == 30 and not found.events
    assert found.after == pytest.approx(float(plain_loss(x @ found.state["weight"], y)), rel=1e-12)
    assert found.after < 0.05 * found.before


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    one, again, other = (fit(Recipe(epochs=3), seed) for seed in (3, 3, 4))
    assert torch.equal(one.state["weight"], again.state["weight"])
    assert not torch.equal(one.state["weight"], other.state["weight"])


@pytest.mark.parametrize("rate", [0.05, 300.0])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, rate: float) -> None:
    start, data = problem()
    steps: list[int] = []

    def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
        x, y = data[batch]
        return plain_loss(x @ state["weight"], y)

    def interrupt() -> None:
        steps.append(len(steps))
        if len(steps) == 7 + 3:  # in the second epoch of seven steps
            raise KeyboardInterrupt

    task, recipe = Problem(start, {"weight": rate}, loss, BATCHES), Recipe(epochs=9)
    wanted = train_problem(task, recipe, 1)
    with pytest.raises(KeyboardInterrupt):
        train_problem(task, recipe, 1, interrupt, tmp_path)
    found = train_problem(task, recipe, 1, lambda: steps.append(0), tmp_path)
    assert len(steps) == 10 + 8 * 7 or wanted.events
    assert bool(wanted.events) == (rate > 1)
    assert torch.equal(found.state["weight"], wanted.state["weight"])
    assert (found.before, found.after, found.epochs, found.events) == (
        wanted.before,
        wanted.after,
        wanted.epochs,
        wanted.events,
    )
    assert train_problem(task, recipe, 1, interrupt, tmp_path).after == wanted.after
    assert len(list(tmp_path.iterdir())) == 2


def test_without_epochs_the_start_comes_back() -> None:
    found = fit(Recipe(epochs=0))
    assert found.before == found.after and not found.state["weight"].any()


def test_a_start_that_is_best_is_kept() -> None:
    state = {"w": torch.zeros(3)}
    found = train(state, {"w": 0.1}, lambda s, b: (s["w"] - 0.5 * (-1.0) ** b).square().sum(), 2, Recipe(6), 0)
    assert found.after == found.before and torch.equal(found.state["w"], torch.zeros(3))


def test_rates_that_are_too_high_are_halved_and_the_best_state_is_kept() -> None:
    found = fit(Recipe(epochs=12, last_rate=1.0), rate=300.0)
    assert any("rose" in event and "0.5 of the learning rates" in event for event in found.events)
    assert found.after == found.before and math.isfinite(found.after)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_undone(where: str) -> None:
    start, calls = {"w": torch.ones(2)}, []

    def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
        calls.append(batch)
        w = state["w"]
        if len(calls) == 12:
            # The root of zero has a finite value and an infinite slope.
            return w.sum() * math.nan if where == "loss" else (w - w.detach()).abs().sum().sqrt() + w.sum()
        return w.square().sum()

    found = train(start, {"w": 0.1}, loss, BATCHES, Recipe(epochs=4), 0)
    assert len(found.events) == 1 and "not finite" in found.events[0]
    assert torch.isfinite(found.state["w"]).all() and found.after < found.before


def test_it_gives_up_on_what_never_works() -> None:
    found = train({"w": torch.ones(1)}, {"w": 0.1}, lambda s, b: s["w"].sum() * math.nan, 8, Recipe(20, rollbacks=2), 0)
    assert found.epochs == 3 and found.events[-1].startswith("training ended early")
    assert torch.equal(found.state["w"], torch.ones(1))


def test_a_start_that_cannot_be_judged_may_still_be_left() -> None:
    def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
        w = state["w"]
        judging_the_start = not torch.is_grad_enabled() and bool((w == 1).all())
        return w * math.nan if judging_the_start else w.sum().square()

    found = train({"w": torch.ones(())}, {"w": 0.1}, loss, 4, Recipe(3), 0)
    assert math.isnan(found.before) and math.isfinite(found.after)


def test_gradients_much_larger_than_usual_are_cut() -> None:
    seen: list[float] = []

    def loss(state: Mapping[str, Tensor], batch: int) -> Tensor:
        w = state["w"]
        if w.requires_grad:
            w.register_hook(lambda grad: None)
        return w.sum() * (1e6 if batch == 0 else 1.0)

    for clip in (0.0, 3.0):
        found = train({"w": torch.ones(1)}, {"w": 0.1}, loss, BATCHES, Recipe(1, clip=clip, last_rate=1.0), 0)
        seen.append(float(found.state["w"]))
    # Adam divides by what it remembers of large gradients, so that the steps after one are too small.
    assert seen[1] < seen[0] < 1


@pytest.mark.parametrize(
    ("batches", "judged"), [(1, [0]), (3, [0, 1, 2]), (4, [3]), (16, [14, 15]), (64, range(56, 64))]
)
def test_the_last_eighth_is_judged(batches: int, judged: list[int]) -> None:
    trained, found = split(batches)
    assert list(found) == list(judged)
    assert list(trained) == (list(range(batches)) if batches < 4 else [i for i in range(batches) if i not in judged])


def test_no_token_governs_the_loss() -> None:
    target = draw(1, 8, 16, seed=3)
    target[0, 0] *= 1e4
    found = target + 0.1 * target.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(draw(1, 8, 16), dim=-1)
    assert float(token_loss(found, target)) == pytest.approx(0.01, rel=1e-6)
    worse = found.clone()
    worse[0, 1:] = 0
    assert float(token_loss(worse, target)) > 50 * float(token_loss(found, target))
    assert float(plain_loss(worse, target)) < 1.01 * float(plain_loss(found, target))


def test_silent_tokens_do_not_blow_the_loss_up() -> None:
    target = draw(4, 16)
    target[1] = 0
    found = target + 1e-3
    loss = token_loss(found, target)
    assert torch.isfinite(loss) and float(loss) < 1e-2
    assert float(token_loss(torch.ones(3, 4), torch.zeros(3, 4))) > 1e6
    assert float(token_loss(torch.zeros(3, 4), torch.zeros(3, 4))) == 0


def test_the_loss_does_not_see_the_scale() -> None:
    found, target = draw(5, 8, seed=1), draw(5, 8, seed=2)
    assert float(token_loss(found * 1e-3, target * 1e-3)) == pytest.approx(float(token_loss(found, target)), rel=1e-9)


def test_losses_of_predictions_are_what_their_names_say() -> None:
    logits, other, ids = draw(2, 5, 7, seed=1), draw(2, 5, 7, seed=2), torch.tensor([[1, 2, 3, 4, 5], [6, 0, 1, 2, 3]])
    p, q = logits.softmax(-1), other.softmax(-1)
    chosen = [p[b, t, ids[b, t + 1]].log() for b in range(2) for t in range(4)]
    torch.testing.assert_close(next_token_loss(logits, ids), -torch.stack(chosen).mean())
    torch.testing.assert_close(teacher_loss(logits, other), (q * (q / p).log()).sum(-1).mean())
    assert abs(float(teacher_loss(logits, logits))) < 1e-12


COUNTED = torch.tensor([[True, False, True, True, False], [False, False, False, False, True]])


@pytest.mark.parametrize("at_once", [1, 21, 1 << 19])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("counted", [None, COUNTED])
def test_the_gradient_of_predictions_is_that_of_the_formula(
    share: float, at_once: int, counted: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_AT_ONCE", at_once)
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 0, 1, 2, 3]])
    # Positions by what follows them: all, what follows the last one apart, or those before tokens that count.
    text = [(i, t) for i in range(2) for t in range(4) if counted is None or counted[i, t + 1]]
    every = text if counted is not None else [(i, t) for i in range(2) for t in range(5)]
    a, wanted = draw(2, 5, 7, seed=1).requires_grad_(), draw(2, 5, 7, seed=2)
    b = a.detach().clone().requires_grad_()
    student, teacher = (torch.stack([functional.log_softmax(x[at] / 2.5, -1) for at in every]) for x in (b, wanted))
    distance = (teacher.exp() * (teacher - student)).sum(-1).mean()
    surprise = torch.stack([functional.cross_entropy(b[i, t], ids[i, t + 1]) for i, t in text]).mean()
    expected = share * 2.5**2 * distance + (1 - share) * surprise
    found = distilled_loss(a, wanted, ids, share, 2.5, counted)
    torch.testing.assert_close(found, expected)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert not distilled_loss(a.detach(), wanted, ids, share, 2.5, counted).requires_grad


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_where_nothing_counts_nothing_is_learned(share: float) -> None:
    a, wanted, ids = draw(2, 5, 7, seed=1).requires_grad_(), draw(2, 5, 7, seed=2), torch.ones(2, 5, dtype=torch.long)
    none = distilled_loss(a, wanted, ids, share, 2.5, torch.zeros_like(COUNTED))
    assert float(none.detach()) == 0 and float(torch.autograd.grad(none, a)[0].abs().max()) == 0
