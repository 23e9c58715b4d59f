"""Rewrite rules: pictures of graph fragments with bodies that build the replacement or say why not."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ir.builder import Builder
from ir.edit import Editor
from ir.errors import InvariantError
from ir.overloads import packet_of
from ir.pattern import Demands, Match, Miss, Picture, draw, match, show, target_text
from ir.program import Program

HITS_PER_NODE = 8


@dataclass(frozen=True)
class No:
    """A body's refusal: why the fragment stays as it is, and the node to blame."""

    reason: str
    node: fx.Node | None = None


Body = Callable[..., fx.Node | No]


@dataclass(frozen=True, eq=False)
class Rule:
    """Pictures, tried in order, with one body; `where` is its file and line."""

    name: str
    owner: str
    pictures: tuple[Picture, ...]
    demands: Demands
    body: Body
    where: str


@dataclass(frozen=True)
class Hit:
    """A rule replaced the node of this name."""

    rule: str
    node: str


@dataclass(frozen=True)
class Refusal:
    """A rule matched at the node of this name and left it alone; `culprit` names the node to blame, if any."""

    rule: str
    node: str
    reason: str
    culprit: str = ""


@dataclass(frozen=True)
class RewriteLog:
    """What one application of a rule set did, and what it declined at nodes that are still there."""

    hits: tuple[Hit, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def counts(self) -> dict[str, int]:
        """Return rule -> number of hits, in order of first hit."""
        counted: dict[str, int] = {}
        for hit in self.hits:
            counted[hit.rule] = counted.get(hit.rule, 0) + 1
        return counted


class Rules:
    """An ordered set of rules; at a node, the first rule that matches and does not refuse replaces it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rules: list[Rule] = []

    def __call__(
        self, *pictures: Callable[..., Any], params: str = "", consts: str = "", sole: bool = False
    ) -> Callable[[Body], Body]:
        """Return a decorator that enters a body under one or more pictures, of which the first that matches is used.

        pictures: functions of the same arguments as the body; an operator alone is a call of it on all of them.
        params: bindings that must be parameters, `bias?` one that may also be absent; consts: bindings that must be
        constants; sole: refuse where anything outside the match reads its inner calls.
        Raises InvariantError when a picture cannot be read or names do not agree.
        """

        def enter(body: Body) -> Body:
            self.rules.append(_rule(self.name, pictures, body, params, consts, sole))
            _check_names(self.rules)
            return body

        return enter

    def __add__(self, other: Rules) -> Rules:
        """Return the rules of both, this set's first; raises InvariantError when two share a name."""
        both = Rules(f"{self.name}+{other.name}")
        both.rules = list(dict.fromkeys([*self.rules, *other.rules]))
        _check_names(both.rules)
        return both

    def apply(self, program: Program, by: str = "") -> RewriteLog:
        """Rewrite a program in place until no rule fires, then sweep dead nodes and parameters.

        by: the pass to record as origin instead of the rule set. Raises InvariantError when rules undo each other, or
        when a body returns anything but a node or `No`.
        """
        return _Run(program, self.rules, by).run()

    def explain(self, program: Program, node: str) -> list[str]:
        """Return a line per rule that tells how far it gets at a node, and why it stops; the program stays as it is.

        Raises KeyError for an unknown node.
        """
        copy = program.clone()
        return [f"{rule.name}: {_explain(rule, copy, copy.node(node))}" for rule in self.rules]


def _rule(
    owner: str, functions: tuple[Callable[..., Any], ...], body: Body, params: str, consts: str, sole: bool
) -> Rule:
    code = inspect.unwrap(body).__code__
    where = f"{code.co_filename}:{code.co_firstlineno}"
    name = code.co_name
    given = tuple(inspect.signature(body).parameters)[1:]
    pictures = tuple(draw(function, given, where) for function in functions)
    if not pictures or any(set(p.names) != set(given) for p in pictures):
        drawn = " and ".join(f"({', '.join(p.names)})" for p in pictures) or "none"
        raise InvariantError(f"rule {name} takes ({', '.join(given)}) but its pictures bind {drawn}", where=where)
    words = params.split()
    demands = Demands(
        frozenset(w for w in words if not w.endswith("?")),
        frozenset(w[:-1] for w in words if w.endswith("?")),
        frozenset(consts.split()),
        sole,
    )
    unknown = (demands.params | demands.optional | demands.consts) - set(given)
    if unknown:
        raise InvariantError(f"rule {name} demands something of {', '.join(sorted(unknown))}, not bound", where=where)
    return Rule(name, owner, pictures, demands, body, where)


def _check_names(rules: list[Rule]) -> None:
    seen: dict[str, Rule] = {}
    for rule in rules:
        if rule.name in seen:
            raise InvariantError(f"two rules are called {rule.name}", where=f"{seen[rule.name].where} and {rule.where}")
        seen[rule.name] = rule


def _find(rule: Rule, node: fx.Node, explain: bool = False) -> Match | Miss:
    """Return the match of the first picture that fits, else the miss that got furthest."""
    furthest = Miss()
    for picture in rule.pictures:
        found = match(picture, node, rule.demands, explain)
        if isinstance(found, Match):
            return found
        if not furthest.reason or (found.shared, found.fitted) > (furthest.shared, furthest.fitted):
            furthest = found
    return furthest


def _build(rule: Rule, editor: Editor, found: Match) -> tuple[Builder, fx.Node | No]:
    """Run a body; anything but a usable node leaves the program as it was."""
    builder = Builder(editor, found.nodes)
    place = f"rule {rule.name} ({rule.where}) at {builder.root.name}"
    try:
        result: object = rule.body(builder, **found.values)
        if not isinstance(result, (fx.Node, No)):
            raise InvariantError("the body returned neither a node nor No", why=f"it returned {result!r}")
        if isinstance(result, fx.Node):
            builder.check_result(result)
    except InvariantError as error:
        builder.undo()
        where = f"{place}, {error.where}" if error.where else place
        raise InvariantError(error.what, where=where, why=error.why, fix=error.fix) from error
    except Exception as error:
        builder.undo()
        error.add_note(f"in {place}")
        raise
    if isinstance(result, No):
        builder.undo()
    return builder, result


def _explain(rule: Rule, program: Program, node: fx.Node) -> str:
    found = _find(rule, node, explain=True)
    if isinstance(found, Miss):
        if not found.fitted:
            wanted = " or ".join(dict.fromkeys(target_text(p.root.target) for p in rule.pictures))
            return found.reason if packet_of(node.target) in _roots(rule) else f"{show(node)} is not {wanted}"
        return f"stops: {found.reason} ({found.fitted} fitted before)"
    builder, result = _build(rule, Editor(program, rule.name), found)
    builder.undo()
    if isinstance(result, No):
        return f"refuses: {result.reason}" + (f" (at {result.node.name})" if result.node else "")
    return "fires"


def _roots(rule: Rule) -> dict[Any, None]:
    return dict.fromkeys(packet_of(p.root.target) for p in rule.pictures)


class _Run:
    """One application of a rule set: a forward sweep, then a worklist of what the changes may have enabled."""

    def __init__(self, program: Program, rules: Iterable[Rule], by: str) -> None:
        self.program, self.by = program, by
        self.editor = Editor(program, by)
        self.index: dict[Any, list[Rule]] = {}
        self.reach = 0
        for rule in rules:
            self.reach = max(self.reach, *(p.depth for p in rule.pictures))
            for root in _roots(rule):
                self.index.setdefault(root, []).append(rule)
        self.hits: list[Hit] = []
        self.refusals: dict[tuple[Rule, fx.Node], Refusal] = {}
        self.ahead: set[fx.Node] = set()
        self.queue: deque[fx.Node] = deque()

    def run(self) -> RewriteLog:
        count = len(self.program.graph.nodes)
        self.queue.extend(n for n in self.program.graph.nodes if self._indexed(n))
        self.ahead.update(self.queue)
        while self.queue:
            node = self.queue.popleft()
            self.ahead.discard(node)
            # A node that nothing reads is dead or dying, and rewriting it would only inflate the counts.
            if node._erased or not node.users or not self._visit(node):
                continue
            if len(self.hits) > HITS_PER_NODE * count:
                raise self._alternating(count)
        if self.hits:
            self.editor.sweep()
        left = tuple(refusal for (_, node), refusal in self.refusals.items() if not node._erased)
        return RewriteLog(tuple(self.hits), left)

    def _indexed(self, node: fx.Node) -> bool:
        return node.op == "call_function" and packet_of(node.target) in self.index

    def _visit(self, node: fx.Node) -> bool:
        for rule in self.index[packet_of(node.target)]:
            found = _find(rule, node)
            if isinstance(found, Miss):
                self.refusals.pop((rule, node), None)
                if found.shared:
                    self._refuse(rule, node, found.reason, found.node)
                continue
            self.editor.by = f"{self.by or rule.owner}/{rule.name}"
            builder, result = _build(rule, self.editor, found)
            if isinstance(result, No):
                self._refuse(rule, node, result.reason, result.node)
                continue
            self.hits.append(Hit(rule.name, node.name))
            self._replace(node, result, builder.created)
            return True
        return False

    def _refuse(self, rule: Rule, node: fx.Node, reason: str, culprit: fx.Node | None) -> None:
        self.refusals[rule, node] = Refusal(rule.name, node.name, reason, culprit.name if culprit else "")

    def _replace(self, root: fx.Node, new: fx.Node, created: list[fx.Node]) -> None:
        fresh_call = new in created and new.op == "call_function"
        self.editor.replace(root, new, keep_name=fresh_call)
        survivors = self._bury([root, *created])
        self._revisit([new, *(n for n in created if not n._erased), *survivors])

    def _bury(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Erase calls that nothing reads any more, at once, since they would count as readers of what they read."""
        stack, survivors = list(nodes), dict[fx.Node, None]()
        while stack:
            node = stack.pop()
            if node._erased:
                continue
            if node.op != "call_function" or node.users:
                survivors[node] = None
                continue
            sources = node.all_input_nodes
            self.editor.erase(node)
            stack.extend(reversed(sources))
        return [n for n in survivors if not n._erased]

    def _revisit(self, changed: list[fx.Node]) -> None:
        """Queue changed nodes and whatever a picture could connect to them."""
        seen = dict.fromkeys(changed)
        frontier = list(seen)
        for _ in range(self.reach):
            users = [u for n in frontier for u in n.users if u not in seen]
            frontier = list(dict.fromkeys(users))
            seen.update(dict.fromkeys(frontier))
        for node in seen:
            if node not in self.ahead and self._indexed(node):
                self.ahead.add(node)
                self.queue.append(node)

    def _alternating(self, count: int) -> InvariantError:
        recent = self.hits[-count:]
        names = dict.fromkeys(hit.rule for hit in recent)
        return InvariantError(
            f"rewriting does not end: {' and '.join(names)} keep firing",
            where=f"node {recent[-1].node} of {self.program.name}",
            why=f"{len(self.hits)} hits on a program of {count} nodes",
            fix="make one of them refuse what the other makes",
        )
