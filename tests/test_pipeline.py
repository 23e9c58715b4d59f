"""Pipeline text: reading, canonical printing, errors with a caret, order by stage, and the whole-pipeline check."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.errors import UnsupportedError, UsageError
from passes.base import Context, OptionError, Pass, Stage
from passes.options import options_of
from passes.pipeline import Item, Pipeline, check, parse, schedule

if TYPE_CHECKING:
    from ir.program import Program


class Axis(Enum):
    ROW = 1
    COLUMN = 2


@dataclass(frozen=True)
class _Toy(Pass):
    level: ClassVar[tuple[str, str]] = ("model", "model")
    stage: ClassVar[Stage] = Stage.CANON
    exact: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> None:
        ctx.log.report(site=str(program))


@dataclass(frozen=True)
class ToyCanon(_Toy):
    """Bring into one form."""

    name: ClassVar[str] = "canon"
    gives: ClassVar[frozenset[str]] = frozenset({"canonical"})


@dataclass(frozen=True)
class ToyFold(_Toy):
    """Fold gains."""

    name: ClassVar[str] = "fold"
    stage: ClassVar[Stage] = Stage.FOLD
    order_reason: ClassVar[str] = "fold must see float weights"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"folded"})


@dataclass(frozen=True)
class ToyShift(_Toy):
    """Code weights."""

    name: ClassVar[str] = "shift"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    removes: ClassVar[frozenset[str]] = frozenset({"folded"})
    bits: int = 3
    group: int | None = 64
    calib: Literal["none", "gram"] = "gram"

    def validate(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(self.name, "bits", f"{self.bits} is not within 1 to 8", fix="give 1 to 8 bits")


@dataclass(frozen=True)
class ToyAll(_Toy):
    """Has an option of every type."""

    name: ClassVar[str] = "all"
    stage: ClassVar[Stage] = Stage.TUNE
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    lr: float = 0.001
    on: bool = False
    keep: bool = True
    note: str = ""
    mode: Literal["a", "b:c", 3] = "a"
    axis: Axis = Axis.ROW
    limit: int | None = None
    alpha: float | Literal["auto"] = "auto"
    tag: str | None = None
    sites: tuple[str, ...] = ()
    grid: tuple[float, ...] = field(default=(0.5, 1.0))
    pair: tuple[int, int] = (2, 4)
    maybe: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ToyBlocks(_Toy):
    """Runs others per block."""

    name: ClassVar[str] = "blocks"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.TUNE
    nests: ClassVar[bool] = True
    size: int = 1


@dataclass(frozen=True)
class ToyNeedy(_Toy):
    """Has an option without a default."""

    name: ClassVar[str] = "needy"
    ratio: float


TOYS: dict[str, type[Pass]] = {kind.name: kind for kind in (ToyCanon, ToyFold, ToyShift, ToyAll, ToyBlocks, ToyNeedy)}


def one(text: str) -> Pass:
    (item,) = parse(text, TOYS)
    return item.pass_


def failure(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(text, TOYS)
    assert caught.value.exit_code == 2
    return str(caught.value)


def caret(message: str) -> int:
    """Return the 1-based column of the line above that the caret points at."""
    above, line = next(
        (a, b) for a, b in zip(message.splitlines(), message.splitlines()[1:], strict=False) if b.endswith("^")
    )
    assert len(line) <= len(above) + 1
    return len(line) - 6


finite = st.floats(allow_nan=False, allow_infinity=True)
words = st.one_of(st.text(), st.sampled_from(["none", "true", "3", "2:4", "1e-3", "layers.*.q_proj", 'a"b\\', "[a b]"]))
alls = st.builds(
    ToyAll,
    lr=finite,
    on=st.booleans(),
    keep=st.booleans(),
    note=words,
    mode=st.sampled_from(["a", "b:c", 3]),
    axis=st.sampled_from(Axis),
    limit=st.none() | st.integers(),
    alpha=finite | st.just("auto"),
    tag=st.none() | words,
    sites=st.lists(words, max_size=3).map(tuple),
    grid=st.lists(finite, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.integers()),
    maybe=st.none() | st.lists(words, max_size=3).map(tuple),
)
shifts = st.builds(
    ToyShift, bits=st.integers(1, 8), group=st.none() | st.integers(1, 256), calib=st.sampled_from(["none", "gram"])
)
leaves = st.one_of(alls, shifts, st.just(ToyFold()), st.builds(ToyNeedy, ratio=finite)).map(Item)
items = st.recursive(
    leaves,
    lambda inner: st.builds(
        Item, st.builds(ToyBlocks, size=st.integers()), st.lists(inner, min_size=1, max_size=3).map(tuple)
    ),
    max_leaves=6,
)
pipelines = st.lists(items, max_size=4).map(lambda found: Pipeline(tuple(found)))


@given(pipelines)
def test_text_round_trip(pipeline: Pipeline) -> None:
    text = str(pipeline)
    assert parse(text, TOYS) == pipeline
    assert str(parse(text, TOYS)) == text


@given(pipelines, st.sampled_from([" ", "  ", "\t", "\n", " \n "]))
def test_blanks_around_marks_change_nothing(pipeline: Pipeline, blank: str) -> None:
    spaced = "".join(
        part if quoted else "".join(f"{blank}{c}{blank}" if c in "{}()[],=" else c for c in part)
        for quoted, part in _split_quoted(str(pipeline))
    )
    assert parse(spaced, TOYS) == pipeline


def _split_quoted(text: str) -> list[tuple[bool, str]]:
    parts, quoted, start, at = [], False, 0, 0
    while at < len(text):
        if quoted and text[at] == "\\":
            at += 1
        elif text[at] == '"':
            end = at + 1 if quoted else at
            parts.append((quoted, text[start:end]))
            quoted, start = not quoted, end
        at += 1
    return [*parts, (quoted, text[start:])]


@given(st.text(alphabet='canonshift{}()[],="\\ \n#@=1.-:', max_size=40))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        pipeline = parse(text, TOYS)
    except UsageError as error:
        assert error.what
    else:
        assert parse(str(pipeline), TOYS) == pipeline


def test_bare_atoms_need_no_quotes() -> None:
    found = one("all{lr=1e-3 note=2:4 limit=-1 sites=[layers.*.q_proj lm_head] alpha=.5 grid=[1 2.5]}")
    assert found == ToyAll(note="2:4", limit=-1, sites=("layers.*.q_proj", "lm_head"), alpha=0.5, grid=(1.0, 2.5))


def test_canonical_text_leaves_out_defaults_and_keeps_field_order() -> None:
    assert (
        str(parse("all{ keep=false  lr=0.0010 on=true sites=[a, b] tag=none }", TOYS))
        == "all{on keep=false sites=[a b]}"
    )
    assert str(parse("shift{group=none bits=4}", TOYS)) == "shift{bits=4 group=none}"
    assert str(parse("shift{},fold", TOYS)) == "shift,fold"
    assert str(parse("blocks{size=2}( fold , shift )", TOYS)) == "blocks{size=2}(fold,shift)"
    assert str(Pipeline((Item(ToyAll(note="none", tag="none")),))) == 'all{note=none tag="none"}'


def test_one_value_stands_for_a_list_of_one() -> None:
    assert one("all{sites=lm_head maybe=a}") == ToyAll(sites=("lm_head",), maybe=("a",))
    assert one("all{sites=[] maybe=[]}") == ToyAll(maybe=())


def test_blank_text_is_the_empty_pipeline() -> None:
    assert parse("  ", TOYS) == Pipeline() == parse(str(Pipeline()), TOYS)


def test_recipe_newlines_are_commas(tmp_path: Path) -> None:
    recipe = tmp_path / "r.txt"
    recipe.write_text(
        '# what\n\ncanon\nshift{bits=4   # four\n  group=32},\n\nblocks(\n  fold\n  shift\n)\nall{note="# no"}\n',
        encoding="utf-8",
    )
    assert str(parse(f"@{recipe}", TOYS)) == 'canon,shift{bits=4 group=32},blocks(fold,shift),all{note="# no"}'


def test_recipe_errors_name_file_and_line(tmp_path: Path) -> None:
    recipe = tmp_path / "r.txt"
    recipe.write_text("canon\n  shift{bit=4}\n", encoding="utf-8")
    message = failure(f"@{recipe}")
    assert f"{recipe}, line 2, column 9" in message and caret(message) == 9
    recipe.write_text("# nothing\n", encoding="utf-8")
    assert "names no pass" in failure(f"@{recipe}")
    assert "cannot be read" in failure(f"@{tmp_path / 'absent.txt'}")


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("canon,shfit", 7, "did you mean `shift`?"),
        ("shift{bits=x},blocks(shfit)", 22, "there is no pass shfit"),
        (
            "shift{bit=3}",
            7,
            "did you mean `bits`? shift takes bits: int = 3; group: int|none = 64; calib: none|gram = gram",
        ),
        ("fold{x=1}", 6, "fold takes no options"),
        ("shift{bits=3 bits=4}", 14, "given twice"),
        ("shift{bits=1e3}", 12, "`1e3` is not int"),
        ('shift{bits="3"}', 12, '"3" is not int'),
        ("shift{bits=1_000}", 12, "`1_000` is not int"),
        ("shift{bits=[3 4]}", 12, "one int, not a list"),
        ("shift{bits=9}", 12, "9 is not within 1 to 8"),
        ("shift{calib=grm}", 13, "`grm` is not none|gram; did you mean `gram`?"),
        ("shift{group=x}", 13, "`x` is not int"),
        ("shift{group}", 7, "`true` is not int"),
        ("all{lr=nan}", 8, "`nan` is not float"),
        ("all{on=yes}", 8, "`yes` is not bool"),
        ("all{axis=rwo}", 10, "`rwo` is not row|column; did you mean `row`?"),
        ("all{pair=[1 2 3]}", 10, "takes 2 values, not 3"),
        ("all{alpha=atuo}", 11, "`atuo` is not float|auto"),
        ("needy", 1, "needs option ratio"),
        ("canon,", 6, "a comma ends the pipeline"),
        ("blocks(fold,)", 12, "a comma ends the pipeline"),
        (",canon", 1, "expected the name of a pass, found `,`"),
        ("canon fold", 7, "expected `,` or the end, found `fold`"),
        ("canon\nfold", 1, "expected `,` or the end, found `fold`"),
        ("canon(fold)", 6, "takes no pipeline in parentheses"),
        ("blocks()", 8, "expected the name of a pass, found `)`"),
        ("blocks(fold", 7, "`(` is never closed"),
        ("blocks(fold}", 12, "expected `,` or `)`, found `}`"),
        ("shift{bits=3", 6, "`{` is never closed"),
        ("all{sites=[a", 11, "`[` is never closed"),
        ("all{sites=[a,]}", 14, "expected another value"),
        ("shift{bits=3,group=4}", 13, "separate options by blanks"),
        ("shift{bits=}", 12, "expected a value, found `}`"),
        ('all{note="a}', 10, "not closed"),
        (r'all{note="\q"}', 10, "escape"),
        ("all{note=ä}", 10, "has no meaning here"),
        ("canon # x", 7, "comment is only allowed in a recipe"),
    ],
)
def test_errors_point_at_the_place(text: str, column: int, says: str) -> None:
    message = failure(text)
    assert says in message
    assert caret(message) == column
    assert f"column {column}\n" in message


def test_order_is_by_stage_with_a_note() -> None:
    ordered, notes = schedule(parse("shift{bits=2},fold", TOYS))
    assert str(ordered) == "fold,shift{bits=2}"
    assert notes == ["order  fold -> shift  (you wrote shift,fold: fold must see float weights)"]


def test_order_that_works_is_left_alone() -> None:
    pipeline = parse("canon,fold,shift{bits=2},shift", TOYS)
    assert schedule(pipeline) == (pipeline, []) == schedule(pipeline, keep_order=True)


def test_order_is_by_stage_inside_parentheses_too() -> None:
    ordered, notes = schedule(parse("blocks(shift,canon)", TOYS))
    assert str(ordered) == "blocks(canon,shift)"
    assert notes == ["order  canon -> shift  (you wrote shift,canon: canon works before shift)"]


def test_keep_order_makes_the_note_an_error() -> None:
    with pytest.raises(UsageError, match="fold must see float weights") as caught:
        schedule(parse("shift,fold", TOYS), keep_order=True)
    assert caught.value.exit_code == 2


@given(pipelines)
def test_scheduling_keeps_the_passes_and_is_idempotent(pipeline: Pipeline) -> None:
    ordered, _ = schedule(pipeline)
    assert sorted(map(repr, ordered.passes())) == sorted(map(repr, pipeline.passes()))
    assert schedule(ordered) == (ordered, [])


def test_check_follows_levels_and_facts() -> None:
    pipeline = parse("canon,fold,blocks(shift)", TOYS)
    assert check(pipeline, "model", frozenset(), TOYS) == ("compressed", frozenset({"canonical"}))
    assert check(Pipeline(), "model", frozenset({"x"})) == ("model", frozenset({"x"}))


@pytest.mark.parametrize(
    ("text", "level", "says"),
    [
        ("fold", "model", "put canon right before it"),
        ("fold,canon", "model", "put canon, which gives canonical, before fold"),
        ("shift,canon", "model", "takes level model, and the program is at level compressed after shift"),
        ("canon", "raw", "run a pass that leaves level model first"),
        ("canon", "compressed", "start from the model"),
        ("blocks(fold)", "model", "pass 2 of blocks,fold"),
    ],
)
def test_check_says_what_is_missing(text: str, level: str, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check(parse(text, TOYS), level, frozenset(), TOYS)
    assert says in str(caught.value)
    assert caught.value.exit_code == 3


def test_check_validates_pipelines_that_were_not_parsed() -> None:
    with pytest.raises(OptionError, match="not within 1 to 8"):
        check(Pipeline((Item(ToyShift(bits=0)),)), "model", frozenset(), TOYS)


def test_option_of_a_type_text_cannot_give_is_the_authors_error() -> None:
    @dataclass(frozen=True)
    class Bad(_Toy):
        table: dict  # type: ignore[type-arg]

    with pytest.raises(TypeError, match="pipeline text cannot give"):
        options_of(Bad)


def test_pipelines_import_no_torch() -> None:
    code = "import sys, passes.base, passes.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
