"""Pipelines as text: reading, canonical printing, putting in order, and checking one whole before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from itertools import count
from pathlib import Path

from ir.errors import UnsupportedError, UsageError
from passes import load_pass, pass_names
from passes.base import LEVELS, OptionError, Pass
from passes.grammar import ItemText, OptionText, Source, read
from passes.options import convert, did_you_mean, options_of, value_text

Registry = Mapping[str, type[Pass]]


@dataclass(frozen=True)
class Item:
    """One pass of a pipeline with the pipeline it runs inside itself, if it takes one."""

    pass_: Pass
    nested: tuple[Item, ...] = ()

    def __str__(self) -> str:
        """Return the canonical text: options in field order, those with their default value left out."""
        shown = []
        for option in options_of(type(self.pass_)):
            value = getattr(self.pass_, option.name)
            if option.default is MISSING or value != option.default:
                text = value_text(option.annotation, value)
                shown.append(option.name if value is True else f"{option.name}={text}")
        options = f"{{{' '.join(shown)}}}" if shown else ""
        nested = f"({','.join(map(str, self.nested))})" if self.nested else ""
        return f"{self.pass_.name}{options}{nested}"


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run; `parse(str(p)) == p`."""

    items: tuple[Item, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, self.items))

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def passes(self) -> Iterator[Pass]:
        """Yield every pass, each one before those nested in it."""
        yield from _walk(self.items)


def parse(text: str, registry: Registry | None = None) -> Pipeline:
    """Return the pipeline that text spells; `@FILE` reads a recipe, blank text is the empty pipeline.

    registry: the passes to know by name, or None for the installed ones. Raises UsageError with a caret under the
    place for bad syntax, unknown names, and values that do not fit.
    """
    if text.lstrip().startswith("@"):
        return parse_recipe(Path(text.strip()[1:]), registry)
    return _build_all(Source(text), registry)


def parse_recipe(path: Path, registry: Registry | None = None) -> Pipeline:
    """Return the pipeline of a recipe file, where newlines are commas and `#` starts a comment; raise UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the recipe cannot be read", where=str(path), why=str(error), fix="name a UTF-8 text file after @"
        ) from None
    pipeline = _build_all(Source(text, str(path), recipe=True), registry)
    if not pipeline.items:
        raise UsageError("the recipe names no pass", where=str(path), fix="write one pass a line")
    return pipeline


def schedule(pipeline: Pipeline, keep_order: bool = False) -> tuple[Pipeline, list[str]]:
    """Return the pipeline sorted by stage (passes of one stage as written), with the passes that have to end it.

    The notes say which order changed and what was added.

    Raises UsageError if the order would change and `keep_order` forbids it.
    """
    items, notes = _schedule(pipeline.items)
    if notes and keep_order:
        raise UsageError(
            "the passes cannot work in the order written",
            where=str(pipeline),
            why="; ".join(notes),
            fix=f"write {Pipeline(items)}, or leave out --keep-order",
        )
    closed, more = _closed(items)
    return Pipeline(closed), notes + more


def _closed(items: Sequence[Item]) -> tuple[tuple[Item, ...], list[str]]:
    """Return passes with those put at the end that have to end what others began, and a note for each."""
    names, notes, added = {item.pass_.name for item in items}, [], []
    for item in items:
        last = item.pass_.closes_with
        if last and last not in names:
            names.add(last)
            added.append(Item(load_pass(last)()))
            notes.append(f"added {last}, which stores what {item.pass_.name} leaves")
    return (*items, *added), notes


def check(
    pipeline: Pipeline, level: str, facts: frozenset[str], registry: Registry | None = None
) -> tuple[str, frozenset[str]]:
    """Return the level and facts a program of this level and facts has after the pipeline.

    Raises OptionError for option values out of range, UsageError for a pass that is of no use before those after it,
    UnsupportedError for a pass whose level does not fit or whose required facts do not hold when it runs; the message
    names the pass that gives the fact.
    """
    order = list(pipeline.passes())
    for pass_ in order:
        pass_.validate()
    for at, pass_ in enumerate(order):
        pass_.check_following(order[at + 1 :])
    return _check_items(pipeline.items, order, count(), level, facts, registry)


def _walk(items: Sequence[Item]) -> Iterator[Pass]:
    for item in items:
        yield item.pass_
        yield from _walk(item.nested)


def _build_all(source: Source, registry: Registry | None) -> Pipeline:
    items = read(source)
    # All names first: a misspelt one is then answered before any pass, and with it torch, is imported.
    _check_names(source, items, pass_names() if registry is None else tuple(registry))
    return Pipeline(tuple(_build(source, item, registry) for item in items))


def _check_names(source: Source, items: Sequence[ItemText], names: Sequence[str]) -> None:
    for item in items:
        if item.name not in names:
            known = f"the passes are {', '.join(names)}"
            raise source.error(item.pos, f"there is no pass {item.name}", fix=did_you_mean(item.name, names) + known)
        _check_names(source, item.nested, names)


def _build(source: Source, item: ItemText, registry: Registry | None) -> Item:
    kind = load_pass(item.name) if registry is None else registry[item.name]
    if item.nested and not kind.nests:
        raise source.error(
            item.nested_pos,
            f"pass {item.name} takes no pipeline in parentheses",
            fix="separate it from the next pass by a comma; options go in {}",
        )
    values = _values(source, item, kind)
    try:
        pass_ = kind(**values)
        pass_.validate()
    except OptionError as error:
        raise _located(source, item, error) from None
    return Item(pass_, tuple(_build(source, inner, registry) for inner in item.nested))


def _values(source: Source, item: ItemText, kind: type[Pass]) -> dict[str, object]:
    options = {option.name: option for option in options_of(kind)}
    table = f"{item.name} takes {'; '.join(map(str, options.values()))}" if options else f"{item.name} takes no options"
    values: dict[str, object] = {}
    for written in item.options:
        if written.key not in options:
            what = f"pass {item.name} has no option {written.key}"
            raise source.error(written.key_pos, what, fix=did_you_mean(written.key, options) + table)
        if written.key in values:
            raise source.error(written.key_pos, f"option {written.key} is given twice", fix="keep one of the two")
        values[written.key] = _value(source, item, written, options[written.key].annotation, table)
    for option in options.values():
        if option.default is MISSING and option.name not in values:
            raise source.error(item.pos, f"pass {item.name} needs option {option.name}", fix=table)
    return values


def _value(source: Source, item: ItemText, written: OptionText, annotation: object, table: str) -> object:
    try:
        return convert(annotation, written.value)
    except ValueError as error:
        what = f"option {written.key} of pass {item.name} has a value of the wrong type"
        raise source.error(written.value_pos, what, why=str(error), fix=table) from None


def _located(source: Source, item: ItemText, error: OptionError) -> OptionError:
    places = [option.value_pos for option in item.options if option.key == error.option]
    where = source.where(places[0] if places else item.pos)
    return OptionError(error.pass_name, error.option, error.why, fix=error.fix, where=where)


def _schedule(items: Sequence[Item]) -> tuple[tuple[Item, ...], list[str]]:
    notes: list[str] = []
    inner: list[Item] = []
    for item in items:
        nested, more = _schedule(item.nested)
        inner.append(Item(item.pass_, nested))
        notes += more
    ordered = sorted(inner, key=lambda item: item.pass_.stage)
    if ordered != inner:
        written = ",".join(item.pass_.name for item in inner)
        runs = " -> ".join(item.pass_.name for item in ordered)
        notes.append(f"order  {runs}  (you wrote {written}: {'; '.join(_reasons(inner))})")
    return tuple(ordered), notes


def _reasons(items: Sequence[Item]) -> list[str]:
    reasons: dict[str, None] = {}
    for at, item in enumerate(items):
        late = [other.pass_ for other in items[:at] if other.pass_.stage > item.pass_.stage]
        if late:
            works = f"{item.pass_.name} works before {late[0].name}"
            reasons[item.pass_.order_reason or works] = None
    return list(reasons)


def _check_items(
    items: Sequence[Item],
    order: Sequence[Pass],
    numbers: Iterator[int],
    level: str,
    facts: frozenset[str],
    registry: Registry | None,
) -> tuple[str, frozenset[str]]:
    for item in items:
        at = next(numbers)
        _check_level(order, at, level)
        for fact in sorted(item.pass_.requires - facts):
            raise _missing_fact(order, at, fact, registry)
        for fact in sorted(item.pass_.refuses & facts):
            raise _wrong_fact(order, at, fact)
        # What a pass gives holds once its nested passes are through, so those start from the state before it.
        level, facts = _check_items(item.nested, order, numbers, level, facts, registry)
        level, facts = item.pass_.level[1], item.pass_.facts_after(facts)
    return level, facts


def _check_level(order: Sequence[Pass], at: int, level: str) -> None:
    pass_ = order[at]
    low, high = pass_.level
    if LEVELS.index(low) <= LEVELS.index(level) <= LEVELS.index(high):
        return
    left_by = f" after {order[at - 1].name}" if at else ""
    takes = low if low == high else f"{low} to {high}"
    too_low = LEVELS.index(level) < LEVELS.index(low)
    fix = f"run a pass that leaves level {low} first" if too_low else "put the pass earlier, or start from the model"
    raise UnsupportedError(
        f"pass {pass_.name} cannot run on a program of level {level}",
        where=_place(order, at),
        why=f"it takes level {takes}, and the program is at level {level}{left_by}",
        fix=fix,
    )


def _missing_fact(order: Sequence[Pass], at: int, fact: str, registry: Registry | None) -> UnsupportedError:
    pass_ = order[at]
    before = [other.name for other in order[:at] if fact in other.removes]
    after = [other.name for other in order[at + 1 :] if fact in other.gives]
    why = f"it needs the fact {fact}, which does not hold there"
    if before:
        why += f": {before[-1]} ends it"
    if after and not before:
        fix = f"put {after[0]}, which gives {fact}, before {pass_.name}"
    else:
        givers, broken = _givers(fact, registry)
        fix = f"put {' or '.join(givers)} right before it" if givers else f"no installed pass gives {fact}"
        fix += "".join(f"; pass {name} could not be loaded" for name in broken)
    return UnsupportedError(f"pass {pass_.name} cannot run", where=_place(order, at), why=why, fix=fix)


def _wrong_fact(order: Sequence[Pass], at: int, fact: str) -> UnsupportedError:
    pass_ = order[at]
    giver = next((other.name for other in reversed(order[:at]) if fact in other.gives), "an earlier run")
    return UnsupportedError(
        f"pass {pass_.name} cannot run",
        where=_place(order, at),
        why=f"it would not keep the {fact} that {giver} left",
        fix=f"leave out {pass_.name} or {giver}",
    )


def _givers(fact: str, registry: Registry | None) -> tuple[list[str], list[str]]:
    kinds, broken = list(registry.values()) if registry is not None else [], []
    for name in pass_names() if registry is None else ():
        # A broken plugin must not hide the error that is being explained, so it is named in that error.
        try:
            kinds.append(load_pass(name))
        except UnsupportedError:
            broken.append(name)
    return [kind.name for kind in kinds if fact in kind.gives], broken


def _place(order: Sequence[Pass], at: int) -> str:
    return f"pass {at + 1} of {','.join(pass_.name for pass_ in order)}"
