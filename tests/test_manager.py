"""Running pipelines: what is checked before, between and after passes, what is reported, and what a crash leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

import passes.manager
from ir.analysis import linear_sites
from ir.edit import Editor
from ir.errors import InvariantError, NomulError, UnsupportedError, UsageError
from ir.parse import parse as parse_program
from ir.program import Program
from ir.text import dump
from ir.types import TensorType
from passes.base import Context, Diagnostic, Event, Log, Note, OptionError, Pass, SiteReport, Stage
from passes.canon import Canon
from passes.manager import PassReport, Settings, run_pipeline
from passes.pipeline import Item, Pipeline, parse
from passes.rtn import Rtn

aten = torch.ops.aten
CANONICAL = frozenset({"canonical"})


@dataclass(frozen=True)
class Toy(Pass):
    """Does nothing."""

    name: ClassVar[str] = "toy"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.TRANSFORM
    exact: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"toyed"})

    def run(self, program: Program, ctx: Context) -> None:
        """Do nothing."""


def some_weight(program: Program, part: str) -> str:
    return next(s.weight for s in linear_sites(program, program.graph.nodes)[0] if part in s.name)


def edit_weight(program: Program, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = some_weight(program, part)
    program.params.put(name, change(program.params.get(name)), "toy")


def start(program: Program, *toys: Pass, ctx: Context | None = None, **settings: Any) -> tuple[PassReport, ...]:
    """Run passes as a pipeline, without any order or text in between."""
    return run_pipeline(program, Pipeline(tuple(map(Item, toys))), ctx or Context(), Settings(**settings))


@dataclass(frozen=True)
class Recorder(Toy):
    """Keeps a list of runs."""

    runs: ClassVar[list[str]] = []

    def run(self, program: Program, ctx: Context) -> None:
        self.runs.append(program.name)


@dataclass(frozen=True)
class NeedsMore(Toy):
    """Needs a fact that nothing gives."""

    requires: ClassVar[frozenset[str]] = frozenset({"unheard-of"})


@dataclass(frozen=True)
class EndsCanonical(Toy):
    """Ends a fact."""

    name: ClassVar[str] = "ends"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    removes: ClassVar[frozenset[str]] = CANONICAL


@pytest.mark.parametrize(
    ("late", "error", "words"),
    [
        (NeedsMore(), UnsupportedError, "unheard-of"),
        (Rtn(bits=9), OptionError, "9 is outside 2..8"),
        (Canon(), UnsupportedError, "level compressed after toy"),
    ],
)
def test_a_pipeline_is_checked_whole_before_anything_runs(
    tiny_model: Program, tmp_path: Path, late: Pass, error: type[NomulError], words: str
) -> None:
    program, before = tiny_model.clone(), dump(tiny_model)
    Recorder.runs.clear()
    with pytest.raises(error, match=words):
        start(program, Recorder(), late, folder=tmp_path, dump="each")
    assert not Recorder.runs and dump(program) == before and not list(tmp_path.iterdir())


def test_a_missing_fact_is_answered_with_the_pass_that_gives_it(tiny_model: Program) -> None:
    with pytest.raises(UnsupportedError, match="ends ends it") as caught:
        start(tiny_model.clone(), EndsCanonical(), Rtn())
    assert "canon" in caught.value.fix


@dataclass(frozen=True)
class Breaker(Toy):
    """Breaks the program in one of several ways."""

    name: ClassVar[str] = "breaker"
    how: Literal["type", "param", "nan", "dtype"] = "type"

    def run(self, program: Program, ctx: Context) -> None:
        node = next(program.calls(aten.linear))
        if self.how == "type":
            Editor(program, self.name).set_type(node, TensorType(torch.float32, ("batch", "seq", 7)))
        elif self.how == "param":
            program.params.drop(some_weight(program, "up_proj"))
        elif self.how == "nan":
            edit_weight(program, "up_proj", lambda w: w.index_fill(0, torch.tensor([3]), float("nan")))
        else:
            edit_weight(program, "up_proj", lambda w: w.half())


@pytest.mark.parametrize(
    ("how", "verify"), [("type", "each"), ("param", "each"), ("dtype", "each"), ("type", "full"), ("nan", "full")]
)
def test_a_broken_program_is_found_after_the_pass_that_broke_it(
    tiny_model: Program, tmp_path: Path, how: Literal["type", "param", "nan", "dtype"], verify: str
) -> None:
    Recorder.runs.clear()
    with pytest.raises(InvariantError, match="after pass breaker") as caught:
        start(tiny_model.clone(), Breaker(how), Recorder(), verify=verify, folder=tmp_path)
    assert not Recorder.runs and "breaks" in str(caught.value)
    assert (tmp_path / "crash" / "before.ir").is_file()


@pytest.mark.parametrize(("how", "verify"), [("type", "off"), ("nan", "off"), ("nan", "each")])
def test_what_was_not_to_be_verified_is_not(
    tiny_model: Program, how: Literal["type", "param", "nan", "dtype"], verify: str
) -> None:
    assert start(tiny_model.clone(), Breaker(how), verify=verify)[0].changed


def test_a_program_that_comes_in_broken_is_not_the_first_pass_s_fault(tiny_model: Program) -> None:
    program = tiny_model.clone()
    Breaker("type").run(program, Context())
    with pytest.raises(InvariantError, match=r"^program tiny breaks"):
        start(program, Toy())


@dataclass(frozen=True)
class Promise(Toy):
    """Says that it keeps the function."""

    name: ClassVar[str] = "promise"
    exact: ClassVar[bool] = True
    level: ClassVar[tuple[str, str]] = ("model", "model")
    how: Literal["nothing", "balance", "weight", "one", "epsilon", "nan", "half"] = "nothing"

    def run(self, program: Program, ctx: Context) -> None:
        if self.how == "balance":
            # Powers of two: the two factors cancel without rounding.
            edit_weight(program, "up_proj", lambda w: w * 2)
            edit_weight(program, "down_proj", lambda w: w / 2)
        elif self.how == "half":
            edit_weight(program, "up_proj", lambda w: w.half().float())
        elif self.how == "weight":
            edit_weight(program, "up_proj", lambda w: w * 1.01)
        elif self.how == "one":
            edit_weight(program, "v_proj", lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), w[0, 0] + 0.01))
        elif self.how == "nan":
            edit_weight(program, "up_proj", lambda w: w * float("nan"))
        elif self.how == "epsilon":
            norm = next(program.calls(aten.rms_norm))
            Editor(program, self.name).set_args(norm, (*norm.args[:3], norm.args[3] * 1.001))


@dataclass(frozen=True)
class Late(Promise):
    """The same after a compressing pass."""

    name: ClassVar[str] = "late"
    level: ClassVar[tuple[str, str]] = ("compressed", "compressed")


@pytest.mark.parametrize("how", ["weight", "one", "nan", "epsilon"])
def test_a_broken_promise_of_exactness_is_found(
    tiny_model: Program, tmp_path: Path, how: Literal["weight", "one", "nan", "epsilon"]
) -> None:
    with pytest.raises(InvariantError, match="pass promise promises the same function but changed it") as caught:
        start(tiny_model.clone(), Promise(how), folder=tmp_path)
    assert "relative error" in caught.value.why and (tmp_path / "crash" / "before.ir").is_file()


def test_a_kept_promise_is_measured(tiny_model: Program) -> None:
    idle, balanced, other = start(tiny_model.clone(), Promise("nothing"), Promise("balance"), Toy())
    assert not idle.changed and idle.probe_error == 0.0
    assert balanced.changed and balanced.probe_error is not None and balanced.probe_error < 1e-12
    assert other.probe_error is None


def test_probing_can_be_left_out(tiny_model: Program) -> None:
    assert start(tiny_model.clone(), Promise("weight"), probe=False)[0].probe_error is None


def test_codes_that_a_pass_did_not_write_excuse_nothing(tiny_model: Program) -> None:
    """Float16 scales of an earlier pass must not widen what an exact pass after it may change."""
    program = tiny_model.clone()
    start(program, Rtn(bits=4, group=16))
    with pytest.raises(InvariantError, match="pass late promises"):
        start(program, Late("epsilon"))


def test_a_probe_serves_until_the_program_changes(tiny_model: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = passes.manager.take_probe
    monkeypatch.setattr(passes.manager, "take_probe", lambda p, *a: taken.append(p.version) or real(p, *a))
    # Before the first, after the one that changes something; then a weight changes under a pass that is not probed.
    start(tiny_model.clone(), Promise(), Promise("balance"), Promise())
    assert len(taken) == 2
    start(tiny_model.clone(), Promise(), Worker(), Late())
    assert len(taken) == 2 + 2


@dataclass(frozen=True)
class Worker(Toy):
    """Changes a weight, and says so."""

    name: ClassVar[str] = "worker"
    removes: ClassVar[frozenset[str]] = frozenset({"old"})
    scale: float = 0.5

    def run(self, program: Program, ctx: Context) -> None:
        edit_weight(program, "up_proj", lambda w: w * self.scale)
        ctx.log.report(site="a.site", bits=3.0)
        ctx.log.skip("b.site", "it is odd")


@dataclass(frozen=True)
class Liar(Toy):
    """Reports work that it never did."""

    name: ClassVar[str] = "liar"

    def run(self, program: Program, ctx: Context) -> None:
        ctx.log.report(site="a.site", bits=3.0)


def test_reports_facts_levels_and_history(tiny_model: Program) -> None:
    program, log = tiny_model.clone(), Log()
    program.facts |= {"old"}
    liar, worker = start(program, Liar(), Worker(scale=0.25), ctx=Context(log=log))
    assert (liar.text, liar.changed, liar.sites) == ("liar", False, (SiteReport("a.site", "liar", {"bits": 3.0}),))
    assert worker.text == "worker{scale=0.25}" and worker.changed
    assert worker.sites == (SiteReport("a.site", "worker", {"bits": 3.0}),)
    assert worker.diagnostics == (Diagnostic("b.site", "it is odd", "worker"),)
    assert log.reports == [*liar.sites, *worker.sites] and log.diagnostics == [*worker.diagnostics]
    assert program.history == ("worker{scale=0.25}",) and program.level == "compressed"
    assert program.facts == tiny_model.facts | {"toyed"}
    for report in (liar, worker):
        # A python with torch in it is larger than this; the clock only has to run forward.
        assert report.peak_bytes > 50 << 20 and report.seconds >= 0


def test_a_pass_that_did_nothing_leaves_no_trace(tiny_model: Program) -> None:
    program = tiny_model.clone()
    assert not start(program, Toy())[0].changed
    assert (program.history, program.level) == (tiny_model.history, tiny_model.level)
    assert program.facts == tiny_model.facts | {"toyed"}


def test_listeners_hear_of_each_pass_in_turn(tiny_model: Program) -> None:
    heard: list[str] = []
    pipeline = Pipeline((Item(Toy()), Item(Liar())))
    run_pipeline(
        tiny_model.clone(),
        pipeline,
        Context(),
        Settings(),
        started=lambda p: heard.append(f"start {p.name}"),
        finished=lambda r: heard.append(f"end {r.text}"),
    )
    assert heard == ["start toy", "end toy", "start liar", "end liar"]


def test_each_pass_has_a_work_folder_of_its_own(tiny_model: Program, tmp_path: Path) -> None:
    seen: list[Path | None] = []

    class Looker(Toy):
        def run(self, program: Program, ctx: Context) -> None:
            seen.append(ctx.work)

    start(tiny_model.clone(), Looker(), Looker(), ctx=Context(work=tmp_path))
    start(tiny_model.clone(), Looker())
    assert seen == [tmp_path / "00-toy", tmp_path / "01-toy", None]


@dataclass(frozen=True)
class LooksAhead(Toy):
    """Notes which passes come after it, and refuses to be the last."""

    name: ClassVar[str] = "looks"

    def check_following(self, following: Sequence[Pass]) -> None:
        if not following:
            raise UsageError("nothing comes after looks")

    def run(self, program: Program, ctx: Context) -> None:
        ctx.log.note(",".join(p.name for p in ctx.following))


def test_a_pass_is_told_which_come_after_it(tiny_model: Program) -> None:
    heard: list[Event] = []
    log = Log(listener=heard.append)
    nested = Item(Toy(), (Item(Breaker("type")),))
    items = (Item(LooksAhead()), Item(LooksAhead()), Item(Toy()), nested)
    run_pipeline(tiny_model.clone(), Pipeline(items), Context(log=log), Settings())
    assert log.notes == heard == [Note("looks,toy,toy,breaker", "looks"), Note("toy,toy,breaker", "looks")]


def test_a_pass_that_is_of_no_use_where_it_stands_is_refused_before_anything_runs(tiny_model: Program) -> None:
    Recorder.runs.clear()
    with pytest.raises(UsageError, match="nothing comes after looks"):
        start(tiny_model.clone(), Recorder(), LooksAhead())
    assert not Recorder.runs


def test_strict_ends_at_the_first_site_left_alone(tiny_model: Program, tmp_path: Path) -> None:
    heard: list[Event] = []

    @dataclass(frozen=True)
    class Long(Toy):
        name: ClassVar[str] = "long"

        def run(self, program: Program, ctx: Context) -> None:
            ctx.log.skip("b.site", "it is odd")
            raise AssertionError("hours of work on the other sites")

    ctx = Context(strict=True, log=Log(listener=heard.append))
    with pytest.raises(UnsupportedError, match="pass long leaves a site alone, which --strict forbids") as caught:
        start(tiny_model.clone(), Long(), ctx=ctx, folder=tmp_path)
    assert (caught.value.where, caught.value.why, caught.value.exit_code) == ("b.site", "it is odd", 3)
    assert heard == [Diagnostic("b.site", "it is odd", "long")] and not list(tmp_path.iterdir())
    assert start(tiny_model.clone(), Liar(), ctx=ctx)


@dataclass(frozen=True)
class Crasher(Toy):
    """Fails when it meets a program with a marked weight."""

    name: ClassVar[str] = "crasher"
    kind: Literal["bug", "usage", "unsupported", "disk", "memory"] = "bug"

    def run(self, program: Program, ctx: Context) -> None:
        kinds = {"usage": UsageError, "unsupported": UnsupportedError, "disk": OSError, "memory": MemoryError}
        raise kinds.get(self.kind, ZeroDivisionError)(f"seed {ctx.seed} on {len(program.history)} passes")


def test_a_crash_can_be_reproduced(tiny_model: Program, tmp_path: Path) -> None:
    program, before = tiny_model.clone(), tiny_model.clone()
    with pytest.raises(ZeroDivisionError, match="seed 7 on 1 passes"):
        start(program, Worker(), Crasher(), Liar(), ctx=Context(seed=7), folder=tmp_path)
    start(before, Worker())
    crash = tmp_path / "crash"
    text = (crash / "before.ir").read_text(encoding="utf-8")
    assert text == dump(before)
    facts = json.loads((crash / "reproduce.json").read_text(encoding="utf-8"))
    error = "ZeroDivisionError: seed 7 on 1 passes"
    assert facts == {"passes": "crasher,liar", "seed": 7, "error": error}
    again = parse(facts["passes"], {"crasher": Crasher, "liar": Liar})
    with pytest.raises(ZeroDivisionError, match="seed 7 on 1 passes"):
        run_pipeline(parse_program(text), again, Context(facts["seed"]), Settings())


@pytest.mark.parametrize(
    ("kind", "error"),
    [("usage", UsageError), ("unsupported", UnsupportedError), ("disk", OSError), ("memory", MemoryError)],
)
def test_no_reproducer_where_the_compiler_is_not_at_fault(
    tiny_model: Program, tmp_path: Path, kind: Literal["usage", "unsupported", "disk", "memory"], error: type[Exception]
) -> None:
    with pytest.raises(error):
        start(tiny_model.clone(), Crasher(kind), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_crash_is_heard_where_its_folder_cannot_be_written(tiny_model: Program, tmp_path: Path) -> None:
    (tmp_path / "crash").write_text("in the way")
    with pytest.raises(ZeroDivisionError):
        start(tiny_model.clone(), Crasher(), folder=tmp_path)


@pytest.mark.parametrize(
    ("mode", "files"),
    [
        ("none", []),
        ("before", ["00-before.ir"]),
        ("after", ["02-after.ir"]),
        ("each", ["00-before.ir", "01-worker.ir", "02-liar.ir"]),
    ],
)
def test_dumps(
    tiny_model: Program, tmp_path: Path, mode: Literal["none", "before", "after", "each"], files: list[str]
) -> None:
    program = tiny_model.clone()
    start(program, Worker(), Liar(), folder=tmp_path, dump=mode)
    assert sorted(p.name for p in tmp_path.rglob("*.ir")) == files
    texts = {p.name[:2]: p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.ir")}
    assert texts.get("00", dump(tiny_model)) == dump(tiny_model)
    assert texts.get("02", dump(program)) == dump(program)
    assert all(dump(parse_program(text)) == text for text in texts.values())


def test_same_seed_same_program(tiny_model: Program) -> None:
    one, two = tiny_model.clone(), tiny_model.clone()
    start(one, Rtn(bits=3, group=16), ctx=Context(seed=3))
    start(two, Rtn(bits=3, group=16), ctx=Context(seed=3))
    assert dump(one) == dump(two)
    assert all(torch.equal(one.params.get(n), two.params.get(n)) for n in one.params)
