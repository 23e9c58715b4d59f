"""What holds for every installed pass, and for what passes are handed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

import passes
from ir.errors import UnsupportedError
from passes.base import LEVELS, Calib, Context, Diagnostic, Event, Log, OptionError, Pass, Progress, SiteReport, Stage
from passes.options import options_of
from passes.pipeline import Item, Pipeline, parse

if TYPE_CHECKING:
    from ir.program import Program


@dataclass(frozen=True)
class Plain(Pass):
    """Does nothing much.

    At some length.
    """

    name: ClassVar[str] = "plain"
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.CANON
    exact: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"new"})
    removes: ClassVar[frozenset[str]] = frozenset({"old"})
    data: ClassVar[Calib | None] = Calib("compressed")
    free: bool = False

    def needs(self) -> Calib | None:
        return None if self.free else self.data

    def run(self, program: Program, ctx: Context) -> None:
        ctx.log.of(self.name).report(site=str(program), bits=3.0)


@pytest.mark.parametrize("name", passes.pass_names())
def test_every_pass_keeps_the_contract(name: str) -> None:
    kind = passes.load_pass(name)
    assert kind.name == name and kind.summary and kind.summary.endswith((".", ")"))
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    low, high = (LEVELS.index(level) for level in kind.level)
    assert low <= high and isinstance(kind.stage, Stage) and isinstance(kind.exact, bool)
    for facts in (kind.requires, kind.gives, kind.removes):
        assert isinstance(facts, frozenset)
    assert not kind.gives & kind.removes
    assert kind.data is None or isinstance(kind.data, Calib)


@pytest.mark.parametrize("name", passes.pass_names())
def test_every_pass_has_defaults_that_print_and_validate(name: str) -> None:
    kind = passes.load_pass(name)
    assert all(str(option) for option in options_of(kind))
    pipeline = Pipeline((Item(kind()),))
    assert str(pipeline) == name and parse(name) == pipeline


def test_a_pass_is_abstract_until_it_runs() -> None:
    with pytest.raises(TypeError):
        Pass()  # type: ignore[abstract]


def test_summary_is_the_first_docstring_line() -> None:
    assert Plain.summary == "Does nothing much."


def test_calibration_may_depend_on_options() -> None:
    assert Plain().needs() == Calib("compressed", gradients=False)
    assert Plain(free=True).needs() is None


def test_facts_are_kept_unless_removed() -> None:
    assert Plain().facts_after(frozenset({"old", "kept"})) == {"new", "kept"}


def test_log_keeps_rows_and_tells_the_listener() -> None:
    heard: list[Event] = []
    log = Log(listener=heard.append)
    fold = log.of("fold")
    fold.report(site="a", bits=2.25)
    fold.skip("b", "weight is shared")
    step = log.of("shift").progress(2, "blocks")
    step()
    step()
    assert log.reports == [SiteReport("a", "fold", {"bits": 2.25})]
    assert log.diagnostics == [Diagnostic("b", "weight is shared", "fold")]
    assert heard[:2] == [log.reports[0], log.diagnostics[0]]
    assert heard[2:] == [Progress("blocks", done, 2, "shift") for done in range(3)]


def test_logs_of_two_contexts_share_nothing() -> None:
    one, other = Context(), Context(work=Path("work"), strict=True)
    one.log.skip("a", "b")
    assert other.log.diagnostics == [] and one.calibration is None


def test_option_error_reads_well() -> None:
    assert str(OptionError("shift", "bits", "9 is not within 1 to 8", fix="give 1 to 8")) == (
        "option bits of pass shift cannot be used\n  because: 9 is not within 1 to 8\n  try: give 1 to 8"
    )


def test_entry_points_add_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = {"plain": f"{__name__}:Plain", "gone": "no_such_module:X", "odd": "json:loads"}
    monkeypatch.setattr(passes, "_brought", lambda: brought)
    assert {"plain", "gone", "odd"} < set(passes.pass_names())
    assert passes.load_pass("plain") is Plain
    assert parse("plain{free}") == Pipeline((Item(Plain(free=True)),))
    with pytest.raises(UnsupportedError, match="cannot be loaded"):
        passes.load_pass("gone")
    with pytest.raises(UnsupportedError, match="is not that pass"):
        passes.load_pass("odd")
    with pytest.raises(KeyError):
        passes.load_pass("absent")
