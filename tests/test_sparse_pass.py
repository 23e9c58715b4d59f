"""`sparse` and `pack`: what is kept is what runs, codes respect masks, runs repeat and resume, bad input is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ir.decode import codes_of
from ir.errors import InvariantError, UnsupportedError, UsageError
from ir.ops.nm import unpack_mask
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes
from ir.program import Program
from ir.verify import verify
from passes.base import Context, Log, OptionError
from passes.pack import Pack
from passes.pipeline import check, parse, schedule
from passes.sparse import Sparse
from passes.sparsify.masks import MASKS
from tests.architectures import ids_for, traced
from tests.coded_sites import coded, decoded, same_parts, stored_bytes
from tests.pipeline_runs import run as run_text
from tests.shiftadd_runs import DATA, SITES, error
from tests.watch import values
from tools.estimate import estimate
from tools.storage import storage

nomul = torch.ops.nomul
METHODS = ["magnitude", "wanda", "dsnot", "sparsegpt"]
FACTS = frozenset({"canonical"})


def run(program: Program, text: str, data: Any = DATA, work: Path | None = None) -> tuple[Program, Log]:
    """A pipeline's program and log, on the data that most tests here take."""
    return run_text(program, text, data, work)


def sparse_at(program: Program, site: str) -> SparseCodes:
    codes = codes_of(coded(program)[site], program.params.get)
    assert isinstance(codes, SparseCodes)
    return codes


@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_is_what_runs(tiny_model: Program, method: str) -> None:
    program, log = run(tiny_model, f"sparse{{method={method}}},pack{{values=float32}}")
    verify(program, full=True)
    assert sorted(coded(program)) == sorted(SITES)
    assert program.level == "compressed" and MASKS not in program.attributes
    assert not [n for n in program.params if n.startswith("masks.")]
    seen = values(program, DATA[0])
    for site, node in coded(program).items():
        weight = decoded(program, node)
        assert set((weight != 0).unflatten(1, (-1, 4)).sum(-1).flatten().tolist()) <= {0, 1, 2}
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-5)
        (report,) = [r for r in log.reports if r.site == site and r.by == "pack"]
        rows, inputs = weight.shape
        assert report.figures["bytes"] == stored_bytes(program, node) == rows * (inputs // 2 * 4 + -(-inputs // 8))
        assert report.figures["bits"] == 8 * stored_bytes(program, node) / (rows * inputs)


def test_methods_are_better_in_the_order_of_what_they_look_at(tiny_model: Program) -> None:
    lost = {m: error(run(tiny_model, f"sparse{{method={m}}}")[0], tiny_model) for m in METHODS}
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"], lost
    assert lost["dsnot"] < lost["magnitude"], lost


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "3:4"])
def test_other_patterns_keep_other_shares(tiny_model: Program, pattern: str) -> None:
    program, log = run(tiny_model, f"sparse{{pattern={pattern} method=magnitude}}")
    n, m = map(int, pattern.split(":"))
    for site in SITES:
        codes = sparse_at(program, site)
        mask = unpack_mask(codes.mask, codes.in_features)
        assert set(mask.unflatten(1, (-1, m)).sum(-1).flatten().tolist()) == {n}
    assert all(r.figures["kept_energy"] > n / m for r in log.reports if r.by == "sparse")


def test_halves_are_stored_unless_asked_otherwise(tiny_model: Program) -> None:
    program, _ = run(tiny_model, "sparse{method=magnitude}")
    (site, *_rest) = SITES
    codes, exact = sparse_at(program, site), run(tiny_model, "sparse{method=magnitude},pack{values=float32}")[0]
    assert isinstance(codes.kept, torch.Tensor) and codes.kept.dtype == torch.float16
    assert torch.equal(codes.dequantize(), sparse_at(exact, site).dequantize().half().float())


@pytest.mark.parametrize(
    "text", ["rtn{bits=4 group=16}", "gptq{bits=4 group=16}", "gptq{bits=3 group=16 order=stored}"]
)
def test_codes_after_it_are_those_of_kept_weights(tiny_model: Program, text: str) -> None:
    program, log = run(tiny_model, f"sparse,{text}")
    masked, _ = run(tiny_model, "sparse,pack{values=float32}")
    assert sorted(coded(program)) == sorted(SITES)
    for site in SITES:
        codes = sparse_at(program, site)
        assert isinstance(codes.kept, QuantCodes) and codes.kept.zeros is None and codes.kept.group == 8
        assert torch.equal(codes.mask, sparse_at(masked, site).mask)
        (report,) = [r for r in log.reports if r.site == site and "bits" in r.figures]
        assert report.figures["bytes"] == stored_bytes(program, coded(program)[site])
    assert error(program, tiny_model) < 1.5 * error(masked, tiny_model)


def test_gptq_makes_up_for_the_mask_and_for_the_codes(tiny_model: Program) -> None:
    one_shot, _ = run(tiny_model, "sparse{method=wanda},rtn{bits=4 group=16}")
    made_up, _ = run(tiny_model, "sparse{method=wanda},gptq{bits=4 group=16}")
    joint, _ = run(tiny_model, "gptq{bits=4 group=16 pattern=2:4}")
    lost = [error(p, tiny_model) for p in (one_shot, made_up, joint)]
    assert lost[1] < lost[0] and lost[2] < lost[0], lost
    assert all(isinstance(sparse_at(joint, site).kept, QuantCodes) for site in SITES)


@pytest.mark.parametrize("options", ["bits=3", "bits=2 terms=0 offset=false", "bits=2 code=trits", "calib=none"])
def test_shift_add_codes_after_it_are_those_of_kept_weights(tiny_model: Program, options: str) -> None:
    program, log = run(tiny_model, f"sparse,shiftadd{{group=16 {options}}}")
    masked, _ = run(tiny_model, "sparse,pack{values=float32}")
    verify(program, full=True)
    assert not list(program.calls(nomul.hadamard))
    for site in SITES:
        codes = sparse_at(program, site)
        assert isinstance(codes.kept, ShiftCodes) and codes.kept.group == 8
        assert torch.equal(codes.mask, sparse_at(masked, site).mask)
        (report,) = [r for r in log.reports if r.site == site and r.by == "shiftadd"]
        assert report.figures["bytes"] == stored_bytes(program, coded(program)[site])
    seen = values(program, DATA[0])
    for node in coded(program).values():
        x, y = (seen[n.name].double() for n in (node.args[0], node))  # type: ignore[union-attr]
        torch.testing.assert_close(y, x @ decoded(program, node).T, rtol=1e-5, atol=1e-5)


def test_more_planes_and_inputs_that_are_seen_lose_less(tiny_model: Program) -> None:
    lost = [
        error(run(tiny_model, f"sparse,shiftadd{{group=16 {options}}}")[0], tiny_model)
        for options in ("bits=4", "bits=3", "bits=2", "bits=3 calib=none")
    ]
    assert lost[0] < lost[1] < lost[2] and lost[1] < lost[3], lost


def test_what_shift_add_codes_of_a_mask_do_not_have_is_named(tiny_model: Program) -> None:
    for option in ("mode=acc", "nested=[2 3]", "group=18"):
        with pytest.raises((OptionError, UnsupportedError), match=r"mode|nested|group"):
            run(tiny_model, f"sparse{{method=magnitude}},shiftadd{{{option}}}")


def test_sites_left_in_float_are_packed_as_they_are(tiny_model: Program) -> None:
    program, _ = run(tiny_model, "sparse{method=magnitude},rtn{bits=4 group=16 skip=[down_proj]}")
    kinds = {site: isinstance(sparse_at(program, site).kept, QuantCodes) for site in SITES}
    assert {site for site, is_coded in kinds.items() if not is_coded} == {s for s in SITES if "down_proj" in s}


def test_scales_of_sparse_codes_can_be_tuned(tiny_model: Program) -> None:
    plain, _ = run(tiny_model, "sparse{method=wanda},rtn{bits=3 group=16}")
    tuned, log = run(tiny_model, "sparse{method=wanda},rtn{bits=3 group=16},tune-scales{epochs=4}")
    assert error(tuned, tiny_model) < error(plain, tiny_model)
    for site in SITES:
        a, b = sparse_at(plain, site), sparse_at(tuned, site)
        assert torch.equal(a.mask, b.mask) and isinstance(a.kept, QuantCodes) and isinstance(b.kept, QuantCodes)
        assert torch.equal(a.kept.codes, b.kept.codes)
    rows = [r.figures for r in log.reports if r.by == "tune-scales"]
    assert rows and all(f["loss_after"] <= f["loss_before"] for f in rows)


@pytest.mark.parametrize("text", ["sparse", "sparse{method=dsnot}", "sparse,gptq{bits=3 group=16}"])
def test_a_resumed_run_ends_with_the_same_bytes(
    tiny_model: Program, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, log = run(tiny_model, text)
    seen = 0

    def failing(self: Log, *, site: str, **figures: float) -> None:
        nonlocal seen
        seen += self.by in ("sparse", "gptq")
        if seen > len(SITES) * (1.5 if "gptq" in text else 0.6):
            raise KeyboardInterrupt
        report(self, site=site, **figures)

    report = Log.report
    with monkeypatch.context() as patched:
        patched.setattr(Log, "report", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, text, work=tmp_path)
    again, said = run(tiny_model, text, work=tmp_path)
    assert all(same_parts(again, whole, site) for site in SITES)
    rows = [(r.site, r.by, r.figures) for r in log.reports]
    assert [(r.site, r.by, r.figures) for r in said.reports] == rows


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gemma", "mixtral"])
def test_it_runs_on_many_architectures(name: str) -> None:
    program, data = traced(name, 2)[0], (ids_for(4, 12, seed=5), ids_for(4, 12, seed=6))
    found, log = run(program, "sparse,rtn{bits=4 group=16}", data)
    verify(found, full=True)
    assert coded(found) and all(isinstance(codes_of(n, found.params.get), SparseCodes) for n in coded(found).values())
    if name == "mixtral":
        assert any("experts" in d.site or "per expert" in d.reason for d in log.diagnostics)


def test_runs_repeat_bit_for_bit(tiny_model: Program) -> None:
    (a, _), (b, _) = run(tiny_model, "sparse"), run(tiny_model, "sparse")
    assert all(same_parts(a, b, site) for site in SITES)


def test_inputs_the_pattern_does_not_divide_stay_dense(tiny_model: Program) -> None:
    program, log = run(tiny_model, "sparse{pattern=2:5 method=magnitude}")
    assert not coded(program)
    assert {d.site for d in log.diagnostics if "no multiple of the pattern 2:5" in d.reason} == set(SITES)


def test_inputs_that_are_always_zero_leave_the_largest_weights(tiny_model: Program) -> None:
    program = tiny_model.clone()
    name = next(n for n in program.params if n.endswith("layers.0.input_layernorm.weight"))
    program.params.put(name, torch.zeros_like(program.params.get(name)), "test")
    found, log = run(program, "sparse")
    assert any("inputs were zero" in d.reason for d in log.diagnostics)
    assert sorted(coded(found)) == sorted(SITES)
    assert all(torch.isfinite(decoded(found, node)).all() for node in coded(found).values())


def test_pipelines_are_closed_and_ordered() -> None:
    ordered, notes = schedule(parse("rtn,sparse,fold"))
    assert [item.pass_.name for item in ordered] == ["fold", "sparse", "rtn", "pack"]
    assert any(n == "added pack, which stores what sparse leaves" for n in notes)
    assert schedule(ordered) == (ordered, [])
    assert check(ordered, "model", FACTS)[0] == "compressed"


@pytest.mark.parametrize("later", ["omniquant", "fold", "smooth", "rotate", "cbq", "sparse", "bits,rtn"])
def test_what_would_not_keep_masks_is_refused(later: str) -> None:
    facts = FACTS | {"folded"}
    with pytest.raises(UnsupportedError, match=f"pass {later.partition(',')[0]} cannot run") as caught:
        check(parse(f"sparse,{later}"), "model", facts)
    assert "would not keep the masks that sparse left" in caught.value.why


def test_a_weight_changed_behind_its_mask_is_noticed(tiny_model: Program) -> None:
    program = tiny_model.clone()
    Sparse(method="magnitude").run(program, Context(log=Log("sparse")))
    name = next(iter(program.attributes[MASKS]))
    program.params.put(name, torch.ones_like(program.params.get(name)), "test")
    with pytest.raises(InvariantError, match="its mask keeps none"):
        Pack().run(program, Context(log=Log("pack")))


def test_bad_options_are_named() -> None:
    for text in ("sparse{pattern=2:2}", "sparse{pattern=half}", "gptq{pattern=3}", "sparse{damp=0}", "sparse{share=2}"):
        with pytest.raises(OptionError):
            parse(text)
    with pytest.raises(OptionError, match="group"):
        parse("gptq{pattern=2:4 group=6}")


def test_two_masks_for_a_weight_are_refused(tiny_model: Program) -> None:
    with pytest.raises(UsageError, match="option pattern of pass gptq cannot be used"):
        run(tiny_model, "sparse{method=magnitude},gptq{group=16 pattern=2:4}")
    with pytest.raises(OptionError, match="group"):
        run(tiny_model, "sparse{method=magnitude pattern=4:8},rtn{group=4}")


@pytest.mark.parametrize(
    "text",
    [
        "sparse",
        "sparse{method=wanda},rtn{bits=4 group=16 skip=[down_proj]}",
        "sparse{method=wanda},slorb{k=8},gptq{bits=3 group=16}",
        "sparse{method=wanda},slorb{k=8 start=dropped},shiftadd{bits=3 group=16}",
        "ast{epochs=0 pattern=1:4}",
        "gptq{bits=4 group=16 pattern=2:4}",
    ],
)
def test_what_is_planned_is_what_is_stored(tiny_model: Program, tmp_path: Path, text: str) -> None:
    pipeline, _ = schedule(parse(text))
    found = estimate(tiny_model, pipeline, samples=4, seqlen=32, out=tmp_path / "out")
    assert MASKS not in tiny_model.attributes
    program, _ = run(tiny_model, text)
    stored: dict[str, int] = {}
    for site in storage(program, written=True).sites:
        if site.compressed:
            stored[site.name] = stored.get(site.name, 0) + site.stored_bytes
    planned = {row.site: row.figures["bytes"] for row in found.rows if "bytes" in row.figures}
    assert planned == stored
    assert found.artifact_bytes == sum(program.params.nbytes(n) for n in program.params)
