"""`bits`: widths from a budget, by real codes of the pass that follows, and what is stored is what was predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ir.analysis import blocks, linear_sites, sibling_sites
from ir.errors import InvariantError, UsageError
from ir.parse import parse as parse_program
from ir.program import PATH, Program
from ir.text import dump
from passes import load_pass, pass_names
from passes.base import Calib, Context, Log, Pass, Trial
from passes.bits import Bits, parse_target
from passes.manager import Settings, run_pipeline
from passes.pipeline import check, parse
from passes.quantize.hessian import empty_gram, update
from passes.quantize.salience import importance, row_energy
from passes.rtn import Rtn
from passes.widths import width_of
from tests.coded_sites import coded, decoded, stored_bytes
from tests.golden import check_golden
from tests.watch import batches, values
from tools.storage import storage

DATA = batches((4, 32), (4, 32))
CANONICAL = frozenset({"canonical"})


@dataclass(frozen=True)
class Counted(Rtn):
    """Rounding that remembers which sites were tried."""

    tried: ClassVar[list[str]] = []

    def trial(self, weight: Tensor, gram: Any, choices: Any, site: Any, ctx: Any) -> list[Trial]:
        self.tried.append(site.name)
        return super().trial(weight, gram, choices, site, ctx)


def choose(
    program: Program,
    coder: Pass | None = None,
    *,
    method: str,
    data: Any = DATA,
    work: Path | None = None,
    **options: Any,
) -> tuple[Program, Log]:
    """A copy of a program with widths and what the pass said; for rounding with groups of 16 unless told otherwise."""
    program, log = program.clone(), Log("bits")
    chosen = Bits(method=method, **options)  # type: ignore[arg-type]
    chosen.validate()
    following = (coder or Rtn(group=16),)
    chosen.check_following(following)
    chosen.run(program, Context(log=log, calibration=data, work=work, following=following))
    return program, log


def widths(program: Program) -> dict[str, int]:
    return dict(program.attributes["bits"])


def total(log: Log, figure: str) -> float:
    return sum(row.figures[figure] for row in log.reports)


def sites_of(program: Program) -> list[Any]:
    return [s for block in blocks(program) for s in linear_sites(program, block.nodes)[0]]


@pytest.fixture(scope="module")
def plain(tiny_model: Program) -> tuple[Program, Log]:
    return choose(tiny_model, target=4.6, method="loss")


def test_every_site_of_the_blocks_gets_one_of_the_choices(plain: tuple[Program, Log], tiny_model: Program) -> None:
    program, log = plain
    assert list(widths(program)) == [s.name for s in sites_of(tiny_model)] == [r.site for r in log.reports]
    assert {3} < set(widths(program).values()) <= {2, 3, 4}
    assert all(r.figures["width"] == widths(program)[r.site] for r in log.reports)
    assert program.version > tiny_model.version and "bits" not in tiny_model.attributes
    assert [d.site for d in log.diagnostics] == ["lm_head"]
    assert parse_program(dump(program), program.params).attributes == program.attributes


@pytest.mark.parametrize("method", ["loss", "gradient", "shiftaddllm"])
def test_the_budget_is_never_exceeded_and_more_of_it_never_hurts(tiny_model: Program, method: str) -> None:
    weights, losses = sum(s.rows * s.inputs for s in sites_of(tiny_model)), []
    for target in (3.3, 3.5, 3.9, 4.4, 4.9, 5.25):
        _, log = choose(tiny_model, target=target, method=method, sequences=2)
        assert total(log, "weights") == weights
        assert 8 * total(log, "bytes") <= target * weights
        losses.append(total(log, "loss"))
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]


@pytest.mark.parametrize("text", ["bits{target=4.2},rtn{group=16 bits=8}", "bits{target=11kB},rtn{group=8 symmetric}"])
def test_what_is_stored_is_what_was_predicted(tiny_model: Program, text: str) -> None:
    program, log = tiny_model.clone(), Log()
    pipeline = parse(text)
    reports = run_pipeline(program, pipeline, Context(log=log, calibration=DATA), Settings())
    chosen, figures = widths(program), {r.site: r.figures for r in reports[0].sites}
    found = {s.name: s for s in storage(program).sites if s.compressed}
    assert reports[0].changed and reports[0].probe_error == 0.0 and program.history[-2].startswith("bits{target=")
    assert {name: s.bits for name, s in found.items()} == chosen and len(set(chosen.values())) > 1
    assert {name: s.stored_bytes for name, s in found.items()} == {n: f["bytes"] for n, f in figures.items()}
    assert {name: s.bits_per_weight for name, s in found.items()} == {n: f["bits"] for n, f in figures.items()}
    budget = parse_target(pipeline.items[0].pass_.target, sum(s.weights for s in found.values()))  # type: ignore[attr-defined]
    assert sum(s.stored_bytes for s in found.values()) <= budget
    # The plan of a pass that finds widths is that of its codes.
    planned = {row.site: row.figures["bytes"] for row in pipeline.items[1].pass_.plan(with_widths(tiny_model, chosen))}
    assert planned == {name: s.stored_bytes for name, s in found.items()}


def with_widths(program: Program, chosen: dict[str, int]) -> Program:
    return replace(program, attributes={**program.attributes, "bits": chosen})


def test_a_second_allocation_takes_the_place_of_the_first(plain: tuple[Program, Log], tiny_model: Program) -> None:
    again, _ = choose(plain[0], target=4.6, skip=("mlp",), choices=(5, 3), method="loss")
    fresh, _ = choose(tiny_model, target=4.6, skip=("mlp",), choices=(3, 5), method="loss")
    assert widths(again) == widths(fresh) and set(widths(again).values()) <= {3, 5}
    assert not any("mlp" in name for name in widths(again))


def test_a_site_without_a_width_has_the_pass_s_own(plain: tuple[Program, Log]) -> None:
    program, _ = plain
    for site in sites_of(program):
        assert width_of(program, site, 7) == widths(program)[site.name]
        assert width_of(program, replace(site, name="another"), 7) == 7


def test_losses_are_those_of_the_codes_on_the_calibration_set(tiny_model: Program) -> None:
    _, log = choose(tiny_model, target=4.2, method="loss")
    found = {r.site: r.figures for r in log.reports}
    seen = [values(tiny_model, ids) for ids in DATA]
    for site in sites_of(tiny_model):
        program, figures = tiny_model.clone(), found[site.name]
        Rtn(group=16, bits=int(figures["width"])).run(program, Context())
        x = torch.cat([s[site.node.args[0].name].flatten(0, 1) for s in seen]).double()
        weight = tiny_model.params.get(site.weight).double()
        error = x @ (weight - decoded(program, coded(program)[site.name])).T
        relative = float(error.norm() / (x @ weight.T).norm())
        assert figures["rel_error"] == pytest.approx(relative, rel=1e-4)
        assert figures["loss"] == pytest.approx(relative**2 * weight.numel(), rel=2e-4)


def test_without_calibration_errors_of_the_weights_count(tiny_model: Program) -> None:
    program, log = choose(tiny_model, target=4.6, calib="none", data=None, method="loss")
    for row, site in zip(log.reports, sites_of(tiny_model), strict=True):
        rounded = tiny_model.clone()
        Rtn(group=16, bits=widths(program)[site.name]).run(rounded, Context())
        weight = tiny_model.params.get(site.weight).double()
        error = weight - decoded(rounded, coded(rounded)[site.name])
        assert row.figures["rel_error"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-9)
    assert Bits(calib="none", method="loss").needs() is None
    assert Bits(method="loss").needs() == Calib("float") and Bits().needs() == Calib(
        "float", gradients=True, tokens=True
    )


def test_gradients_weigh_each_output_by_what_it_does_to_the_loss(tiny_model: Program) -> None:
    from passes.gradients import loss_gradients

    _, log = choose(tiny_model, target=4.4, method="gradient", sequences=6)
    windows = torch.cat(DATA)[:6].split(1)
    seen = [values(tiny_model, ids) for ids in DATA]
    for row, site in list(zip(log.reports, sites_of(tiny_model), strict=True))[3::7]:
        rows: list[Tensor] = []
        for ids in windows:
            loss_gradients(tiny_model, ids, {site.node: rows.append})
        slope = torch.cat([g.flatten(0, 1) for g in rows]).double().square().mean(0)
        rounded = tiny_model.clone()
        Rtn(group=16, bits=int(row.figures["width"])).run(rounded, Context())
        error = tiny_model.params.get(site.weight).double() - decoded(rounded, coded(rounded)[site.name])
        x = torch.cat([s[site.node.args[0].name].flatten(0, 1) for s in seen]).double()
        assert row.figures["loss"] == pytest.approx(float(((x @ error.T).square().sum(0) * slope).sum()), rel=1e-3)


def test_the_criterion_is_the_paper_s() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (20, 90))
    x[:, 4] = 0
    gram = empty_gram(12, torch.float64)
    update(gram, x)
    live = [k for k in range(12) if k != 4]
    h = gram.matrix[live][:, live]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(11, dtype=torch.float64)
    columns = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).diagonal()
    expected = torch.zeros(20, 12, dtype=torch.float64)
    expected[:, live] = weight[:, live] / columns
    assert importance(weight, gram) == pytest.approx(float(expected.norm() * expected.std() ** 2), rel=1e-10)
    assert importance(weight, None) == pytest.approx(float(weight.norm() * weight.var()), rel=1e-12)
    assert row_energy(weight, gram).tolist() == pytest.approx((x @ weight.T).square().sum(0).tolist(), rel=1e-9)


def test_methods_do_not_agree(tiny_model: Program) -> None:
    methods = ("loss", "gradient", "shiftaddllm")
    found = [widths(choose(tiny_model, target=4.2, method=method, sequences=4)[0]) for method in methods]
    assert all(found[i] != found[j] for i in range(3) for j in range(i))


def test_the_criterion_needs_no_codes(tiny_model: Program) -> None:
    Counted.tried.clear()
    choose(tiny_model, Counted(group=16), target=4.2, method="shiftaddllm")
    assert not Counted.tried


def test_ties_share_a_width_and_cost_quality(tiny_model: Program) -> None:
    losses = []
    for tie in ("none", "siblings", "block"):
        program, log = choose(tiny_model, target=4.55, tie=tie, method="loss")
        chosen, sites = widths(program), sites_of(tiny_model)
        siblings = [{chosen[s.name] for s in group} for group in sibling_sites(sites)]
        whole = [{chosen[s.name] for s in linear_sites(tiny_model, b.nodes)[0]} for b in blocks(tiny_model)]
        assert all(len(group) == 1 for group in siblings) == (tie != "none")
        assert all(len(group) == 1 for group in whole) == (tie == "block")
        losses.append(total(log, "loss"))
    assert losses[0] < losses[1] < losses[2]


def test_sites_of_one_name_share_a_width(tiny_model: Program) -> None:
    program = tiny_model.clone()
    for site in linear_sites(program, program.graph.nodes)[0]:
        site.node.meta[PATH] = site.name.rpartition(".")[0]
    found, log = choose(program, target=4.4, method="loss")
    assert len(widths(found)) == 4 and len(log.reports) == 14
    assert 8 * total(log, "bytes") <= 4.4 * total(log, "weights")
    assert all(r.figures["width"] == widths(found)[r.site] for r in log.reports)


def test_a_budget_that_cannot_be_met_names_the_least_that_can(tiny_model: Program) -> None:
    Counted.tried.clear()
    with pytest.raises(UsageError, match="option target of pass bits") as caught:
        choose(tiny_model, Counted(group=16), target=2.2, method="loss")
    assert caught.value.exit_code == 2 and not Counted.tried
    # 2 bits, 16 bits of scale and 2 of zero point a group of 16, a quarter of a byte of padding here and there.
    assert (
        "2 bits of rtn at all 14 sites take" in caught.value.why
        and "stored bits per weight already" in caught.value.why
    )
    words = caught.value.fix.replace(",", "").split()
    bits, size = [word.removeprefix("target=") for word in words if word.startswith("target=")]
    assert size.endswith("kB")
    for target in (float(bits), size):
        found, _ = choose(tiny_model, target=target, method="loss")
        assert set(widths(found).values()) == {2}
    for target in (float(bits) - 0.002, f"{float(size[:-2]) - 0.002}kB"):
        with pytest.raises(UsageError, match="option target"):
            choose(tiny_model, target=target, method="loss")


def test_a_budget_above_the_widest_is_noted_and_needs_no_measuring(tiny_model: Program) -> None:
    Counted.tried.clear()
    program, log = choose(tiny_model, Counted(group=16), target=6.0, data=None, method="loss")
    assert set(widths(program).values()) == {4} and not Counted.tried
    (note,) = log.notes
    assert note.by == "bits" and "every site gets 4 bits" in note.text and "target=6.0" in note.text
    assert not choose(tiny_model, target=5.0, method="loss")[1].notes


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (2.5, 250),
        (2.3, 230),
        (3, 300),
        ("60MB", 60_000_000),
        ("1.5KiB", 1536),
        ("2kB", 2000),
        (".5GiB", 1 << 29),
        ("7B", 7),
    ],
)
def test_targets_are_bits_per_weight_or_bytes(target: float | str, size: int) -> None:
    assert parse_target(target, 800) == size


@pytest.mark.parametrize("text", ["60", "60Mb", "MB", "-1", "0", "inf", "many", "0MB", "2.5.1MB"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError, match="option target of pass bits") as caught:
        parse(f'bits{{target="{text}"}},rtn' if text in ("60", "MB") else f"bits{{target={text}}},rtn")
    assert "^" in caught.value.where


def test_the_pipeline_is_text() -> None:
    text = "bits{target=60MB choices=[2 4] method=loss tie=siblings sequences=4},rtn"
    assert str(parse(text)) == text
    assert str(parse("bits{target=2 tie=none},rtn")) == "bits{target=2.0},rtn"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits", "no pass comes after it"),
        ("rtn,bits", "no pass comes after it"),
        ("rtn,bits,bits", "after it come bits, none of which"),
        ("bits{choices=[2 9]},rtn", "rtn takes 2 to 8 bits, not 9"),
    ],
)
def test_a_pipeline_in_which_nothing_uses_the_widths_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(parse(text), "model", CANONICAL)
    assert words in caught.value.why and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ("choices=[]", "choices"),
        ("choices=[2 2]", "choices"),
        ("sequences=0", "sequences"),
        ("method=gradient calib=none", "method"),
    ],
)
def test_options_that_make_no_sense(options: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"option {option} of pass bits"):
        parse(f"bits{{{options}}}")


def test_it_needs_text_unless_told_otherwise(tiny_model: Program) -> None:
    with pytest.raises(UsageError, match="needs calibration text"):
        choose(tiny_model, target=4.0, data=None, method="loss")


def test_sites_that_will_not_be_coded_take_no_part(tiny_model: Program) -> None:
    program, log = choose(tiny_model, Rtn(group=16, skip=("v_proj",)), target=4.2, skip=("down_proj",), method="loss")
    assert len(widths(program)) == 10 and not any("v_proj" in n or "down_proj" in n for n in widths(program))
    assert 8 * total(log, "bytes") <= 4.2 * total(log, "weights")
    reasons = {d.site.rpartition(".")[2]: (d.reason, d.asked) for d in log.diagnostics}
    assert reasons["v_proj"] == ("rtn leaves it alone", True)
    assert reasons["down_proj"] == ("skip=down_proj names it", True)
    nothing, _ = choose(tiny_model, target="1MB", skip=("*",), method="loss")
    assert widths(nothing) == {}
    with pytest.raises(UsageError, match="option skip"):
        choose(tiny_model, target=4.2, skip=("dwon_proj",), method="loss")


def test_a_dry_run_shows_the_sites(tiny_model: Program) -> None:
    rows = Bits(target=2.5, skip=("mlp",)).plan(tiny_model)
    assert [row.site for row in rows] == [s.name for s in sites_of(tiny_model) if "mlp" not in s.name]
    assert all(row.figures == {"bits": 2.5} and row.action == "bits" for row in rows)
    assert Bits(target="1MB").plan(tiny_model)[0].figures == {}


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("method", ["loss", "gradient"])
def test_measured_blocks_are_taken_from_the_work_folder(
    tiny_model: Program, tmp_path: Path, method: str, lost: int
) -> None:
    options: dict[str, Any] = {"target": 4.3, "method": method, "sequences": 3}
    first, log = choose(tiny_model, Counted(group=16), work=tmp_path, **options)
    for index in range(2 - lost, 2):
        (tmp_path / f"block-{index:04d}.json").unlink()
    Counted.tried.clear()
    again, more = choose(tiny_model, Counted(group=16), work=tmp_path, **options)
    assert {int(name.split(".")[2]) for name in Counted.tried} == set(range(2 - lost, 2))
    assert dump(again) == dump(first) and more.reports == log.reports


@dataclass(frozen=True)
class Liar(Rtn):
    """Plans other bytes than it stores."""

    def stored_bytes(self, site: Any, bits: int) -> int:
        return super().stored_bytes(site, bits) - 1


def test_a_pass_whose_codes_are_not_as_planned_is_found_out(tiny_model: Program) -> None:
    with pytest.raises(InvariantError, match="another width or size"):
        choose(tiny_model, Liar(group=16), target=4.0, method="loss")


CODERS = [name for name in pass_names() if load_pass(name).widths]


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("known", [True, False])
def test_every_pass_with_widths_keeps_the_contract(tiny_model: Program, name: str, known: bool) -> None:
    """Bytes as stored and planned, and losses that fall with the width and never beat no error at all."""
    coder = load_pass(name)(group=16)  # type: ignore[call-arg]
    site = sites_of(tiny_model)[6]
    weight = tiny_model.params.get(site.weight).double()
    gram = empty_gram(site.inputs) if known else None
    for ids in DATA if gram else ():
        update(gram, values(tiny_model, ids)[site.node.args[0].name])  # type: ignore[arg-type]
    version = tiny_model.version
    trials = coder.trial(weight, gram, (2, 3, 4), site, Context())
    assert tiny_model.version == version and torch.equal(tiny_model.params.get(site.weight).double(), weight)
    assert [t.bits for t in trials] == [2, 3, 4]
    assert [t.stored_bytes for t in trials] == [coder.stored_bytes(site, bits) for bits in (2, 3, 4)]
    output = row_energy(weight, gram)
    losses = [t.row_loss for t in trials]
    assert all(loss.shape == (site.rows,) and loss.dtype == torch.float64 for loss in losses)
    shares = [float(loss.sum() / output.sum()) for loss in losses]
    assert 0.5 > shares[0] > 2 * shares[1] > 4 * shares[2] > 0


def test_large_sites_are_tried_by_a_sample_of_rows(tiny_model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def costs() -> dict[tuple[str, float], float]:
        _, log = choose(tiny_model, target=4.6, method="gradient", sequences=4)
        return {(row.site, row.figures["width"]): row.figures["loss"] for row in log.reports}

    whole, most = costs(), max(s.rows for s in sites_of(tiny_model))
    monkeypatch.setattr("passes.bits._MOST_ROWS", most // 2)
    sampled = costs()
    ratios = [sampled[key] / whole[key] for key in sampled.keys() & whole.keys()]
    assert len(ratios) > 7 and all(0.5 < ratio < 2 for ratio in ratios) and any(ratio != 1 for ratio in ratios), ratios


@pytest.mark.parametrize("name", CODERS)
def test_every_pass_with_widths_uses_them(tiny_model: Program, name: str) -> None:
    program, log = tiny_model.clone(), Log()
    run_pipeline(
        program, parse(f"bits{{target=4.6}},{name}{{group=16}}"), Context(log=log, calibration=DATA), Settings()
    )
    predicted = {r.site: r.figures["bytes"] for r in log.reports if r.by == "bits"}
    assert len(set(widths(program).values())) > 1
    assert {n: stored_bytes(program, node) for n, node in coded(program).items()} == predicted


def test_golden_dump(plain: tuple[Program, Log], request: pytest.FixtureRequest) -> None:
    program = replace(plain[0].clone(), history=(*plain[0].history, "bits{target=4.6 method=loss}"))
    check_golden("bits.ir", dump(program), request)
