"""The contract of a pass: what it works on, what it needs and gives, and what it is handed when it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ir.errors import InvariantError, UsageError

if TYPE_CHECKING:
    import torch

    from ir.analysis import LinearSite
    from ir.execute import Batch
    from ir.products import Precision
    from ir.program import Program
    from passes.quantize.hessian import Gram

LEVELS = ("raw", "model", "compressed", "target")


class Stage(IntEnum):
    """When in a pipeline a pass can work; a pipeline written in another order is sorted by it."""

    CANON = 0
    TRANSFORM = 1
    FOLD = 2
    SPARSIFY = 3
    QUANTIZE = 4
    TUNE = 5
    LOWER = 6


@dataclass(frozen=True)
class Calib:
    """Which activations a pass wants to see, block by block, and whether it differentiates through the block.

    stream: `float` is the model as it came, `compressed` the model with all earlier blocks already compressed;
    original: it looks at the program before an earlier pass changed its function (`Context.original`); tokens: it
    learns from predictions of tokens, and so wants a language model and batches of token ids.
    """

    stream: Literal["float", "compressed", "both"]
    gradients: bool = False
    original: bool = False
    tokens: bool = False


@dataclass(frozen=True)
class PlanRow:
    """What a pass will do at one site, for `--dry-run`; figures are such as `bits` or `bytes`."""

    site: str
    action: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteReport:
    """What a pass did at one site; figures are such as `bits`, `sqnr_db` or `rel_error`."""

    site: str
    by: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Diagnostic:
    """A site that a pass left alone, and why; `asked`: an option of the pass named it."""

    site: str
    reason: str
    by: str
    asked: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a pass has come with `total` equal steps of work."""

    label: str
    done: int
    total: int
    by: str


@dataclass(frozen=True)
class Note:
    """A line for the user about the pass as a whole."""

    text: str
    by: str


Event = SiteReport | Diagnostic | Progress | Note


def _ignore(event: Event) -> None:
    del event


@dataclass(frozen=True)
class Log:
    """Keeps what passes report and hands each event to a listener as it happens.

    by: the pass that reports; `of` gives another pass a log that adds to the same lists.
    """

    by: str = ""
    listener: Callable[[Event], None] = _ignore
    reports: list[SiteReport] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def of(self, by: str) -> Log:
        """Return a log that speaks for pass `by` and shares this one's lists and listener."""
        return replace(self, by=by)

    def report(self, *, site: str, **figures: float) -> None:
        """Record the figures of one site."""
        row = SiteReport(site, self.by, figures)
        self.reports.append(row)
        self.listener(row)

    def skip(self, site: str, reason: str, asked: bool = False) -> None:
        """Record that a site is left alone, with the reason; under `--strict` an error unless it was asked for."""
        row = Diagnostic(site, reason, self.by, asked)
        self.diagnostics.append(row)
        self.listener(row)

    def note(self, text: str) -> None:
        """Record a line for the user that belongs to no site."""
        row = Note(text, self.by)
        self.notes.append(row)
        self.listener(row)

    def mark(self) -> tuple[int, int, int]:
        """Return where the log stands, for `since`."""
        return len(self.reports), len(self.diagnostics), len(self.notes)

    def since(self, mark: tuple[int, int, int]) -> list[Event]:
        """Return what was recorded after a mark, reports first, then sites left alone, then notes."""
        return [*self.reports[mark[0] :], *self.diagnostics[mark[1] :], *self.notes[mark[2] :]]

    def progress(self, total: int, label: str) -> Callable[[], None]:
        """Announce `total` equal steps and return the function to call after each of them."""
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.listener(Progress(label, done, total, self.by))

        self.listener(Progress(label, done, total, self.by))
        return step


@dataclass(frozen=True)
class Context:
    """What a pass is handed beside the program.

    calibration: batches (`ir.execute.Batch`): token ids i64[batch,seq], or arrays for all inputs by name; None where
    the pipeline needs no data.
    counted: of each of these tokens, bool [batch,seq], whether losses of predictions count it; None for all.
    work: directory that outlives an interrupted run, for resuming, or None.
    strict: whether a site that a pass skips is an error.
    precision: of the matrix products that carry calibration; bfloat16 rounds their inputs and adds in float32.
    following: the passes that will run after this one, in order.
    original: the program as it was before a pass of this run first changed its function; None where no pass wants it,
    or where the run began with coded weights.
    activation_budget: bytes of calibration's activations that may stay in memory, the rest goes to files under `work`;
    None for all of them.
    """

    seed: int = 0
    log: Log = field(default_factory=Log)
    calibration: Sequence[Batch] | None = None
    work: Path | None = None
    strict: bool = False
    precision: Precision = "float32"
    following: tuple[Pass, ...] = ()
    original: Program | None = None
    activation_budget: int | None = None
    counted: Sequence[torch.Tensor] | None = None


@dataclass(frozen=True)
class Trial:
    """A site coded at one width, for a pass that chooses widths.

    stored_bytes: of the codes, scales, offsets and padding; row_loss: float64 [N], diag(E H E^T) of the coding error E
    per output row, H = sum of x x^T over all calibration tokens (the identity without them).
    """

    bits: int
    stored_bytes: int
    row_loss: torch.Tensor


class OptionError(UsageError):
    """An option of a pass has a value the pass cannot work with (exit code 2)."""

    def __init__(self, pass_name: str, option: str, why: str, *, fix: str = "", where: str = "") -> None:
        self.pass_name, self.option = pass_name, option
        super().__init__(f"option {option} of pass {pass_name} cannot be used", where=where, why=why, fix=fix)


@dataclass(frozen=True)
class Pass(ABC):
    """A step from program to program; subclasses are frozen dataclasses whose fields are the command-line options.

    A field's `metadata["help"]` is its line in `python -m tools.passes NAME`. Class attributes are the contract:

    name: as written in a pipeline; summary: the first line of the docstring unless given.
    level: it takes programs from the first level up to the second, and leaves one of the second.
    stage: when in a pipeline it can work; order_reason: why, for the note on a pipeline that was put in order.
    requires, gives, removes: facts needed before, true after, and no longer true after; all others are kept.
    refuses: facts under which it cannot run; a pass that keeps the masks of a sparse program says so by an empty set.
    closes_with: the pass that ends what this one began, put at the end of a pipeline that lacks it.
    data: the calibration it wants; exact: whether it promises the same function up to rounding.
    nests: whether it takes a pipeline of its own in parentheses.
    widths: values of its option `bits` that `trial` can try; empty for a pass that codes nothing at a width.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    level: ClassVar[tuple[str, str]]
    stage: ClassVar[Stage]
    order_reason: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[frozenset[str]] = frozenset({"masks"})
    closes_with: ClassVar[str] = ""
    data: ClassVar[Calib | None] = None
    exact: ClassVar[bool]
    nests: ClassVar[bool] = False
    widths: ClassVar[range] = range(0)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "summary" not in cls.__dict__:
            cls.summary = (cls.__doc__ or "").strip().partition("\n")[0]

    def needs(self) -> Calib | None:
        """Return the calibration these options want; the class attribute `data` unless a pass says otherwise."""
        return self.data

    def validate(self) -> None:
        """Raise OptionError for option values out of range; called when a pipeline is parsed or checked."""
        return

    def check_following(self, following: Sequence[Pass]) -> None:
        """Raise UsageError if the pass is of no use before these; called when a pipeline is checked."""
        del following

    def plan(self, program: Program) -> list[PlanRow]:
        """Return what the pass will do per site of this program, without doing it."""
        del program
        return []

    def inserts(self) -> frozenset[str]:
        """Return operators that finished programs hold by these options and some backends lack, one for each kind."""
        return frozenset()

    def foresee(self, program: Program) -> None:
        """Note on an outline of a program, whose weights are not read, what plans of later passes depend on."""
        del program

    def facts_after(self, facts: frozenset[str]) -> frozenset[str]:
        """Return the facts that hold after the pass, given those that held before it."""
        return (facts - self.removes) | self.gives

    def stored_bytes(self, site: LinearSite, bits: int) -> int:
        """Return the bytes of a site's codes at one of the pass's `widths`, scales, offsets and padding included."""
        raise InvariantError(f"pass {self.name} codes nothing at a width", fix="try only passes with `widths`")

    def trial(
        self, weight: torch.Tensor, gram: Gram | None, choices: Sequence[int], site: LinearSite, ctx: Context
    ) -> list[Trial]:
        """Return a site coded at each of several of the pass's `widths`, changing nothing.

        weight: float64 [N, K]; gram: of the site's inputs, or None to measure the error of the weights alone. The codes
        are those of the pass's other options, but may be fitted in fewer rounds.
        """
        raise InvariantError(f"pass {self.name} codes nothing at a width", fix="try only passes with `widths`")

    @abstractmethod
    def run(self, program: Program, ctx: Context) -> None:
        """Change the program in place; what it skips goes to `ctx.log.skip`, what it did to `ctx.log.report`."""
