"""Pictures of graph fragments, drawn with ordinary torch calls, and the backtracking matcher that finds them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from ir.errors import InvariantError
from ir.overloads import bound_args, packet_of

aten = torch.ops.aten

COMMUTATIVE = frozenset(
    {
        aten.add,
        aten.mul,
        aten.eq,
        aten.ne,
        aten.logical_and,
        aten.logical_or,
        aten.logical_xor,
        aten.bitwise_and,
        aten.bitwise_or,
        aten.bitwise_xor,
        aten.maximum,
        aten.minimum,
        operator.add,
        operator.mul,
    }
)


@dataclass(frozen=True)
class Var:
    """A placeholder of a picture: it binds any value, the same one wherever it stands."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """A call in a picture; arguments are `Var`s, `Call`s, constants, and lists of them."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Picture:
    """A fragment to look for: its last call, its placeholder names, and how many calls and levels it has."""

    root: Call
    names: tuple[str, ...]
    size: int
    depth: int


@dataclass(frozen=True)
class Demands:
    """What bindings must be: parameters, parameters or absent, constants; `sole`: nothing else reads the inside."""

    params: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    consts: frozenset[str] = frozenset()
    sole: bool = False


@dataclass(frozen=True)
class Match:
    """A fragment found: what the placeholders bind, and the calls matched, root first."""

    values: dict[str, Any]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Miss:
    """A fragment not found: how many things fitted before it stopped; `shared`: only `sole` was in the way."""

    fitted: int = 0
    reason: str = ""
    node: fx.Node | None = None
    shared: bool = False


_MISS = Miss()


def draw(function: Callable[..., Any], names: tuple[str, ...], where: str) -> Picture:
    """Return the picture a function draws when it is traced once; an operator stands for its call on all of `names`.

    Raises InvariantError if the picture is not made of calls.
    """
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        return Picture(Call(function, tuple(map(Var, names)), {}), names, 1, 1)
    graph = fx.Tracer().trace(function)
    drawn: dict[fx.Node, Any] = {}
    levels: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            drawn[node], levels[node] = Var(str(node.target)), 0
        elif node.op == "call_function":
            kwargs = {name: _drawn(value, drawn) for name, value in node.kwargs.items()}
            drawn[node] = Call(node.target, _drawn(node.args, drawn), kwargs)
            levels[node] = 1 + max((levels[n] for n in node.all_input_nodes), default=0)
        elif node.op != "output":
            raise _undrawable(where, f"it uses {node.op} {node.target}")
    root = graph.output_node().args[0]
    if not isinstance(root, fx.Node) or not isinstance(drawn[root], Call):
        raise _undrawable(where, f"its output is {root}, not a call")
    names = tuple(v.name for v in drawn.values() if isinstance(v, Var))
    return Picture(drawn[root], names, sum(isinstance(v, Call) for v in drawn.values()), levels[root])


def _undrawable(where: str, why: str) -> InvariantError:
    return InvariantError(
        "a rule's picture cannot be read", where=where, why=why, fix="draw it with torch.ops calls on its arguments"
    )


def _drawn(value: Any, drawn: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return drawn[value]
    if isinstance(value, (list, tuple)):
        return tuple(_drawn(v, drawn) for v in value)
    if isinstance(value, slice):
        return slice(*(_drawn(v, drawn) for v in _slice_parts(value)))
    return value


def same_value(a: Any, b: Any) -> bool:
    """Return whether two arguments are the same node or equal constants; True is not 1, but 2 is 2.0."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, slice) and isinstance(b, slice):
        return same_value(_slice_parts(a), _slice_parts(b))
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return isinstance(a, bool) == isinstance(b, bool) and a == b
    return type(a) is type(b) and bool(a == b)


def _slice_parts(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def show(value: Any) -> str:
    """Return an argument as a reader knows it: a node with its target, a constant as Python writes it."""
    if isinstance(value, fx.Node):
        return f"{value.name} ({value.op if value.op != 'call_function' else target_text(value.target)})"
    if isinstance(value, Call):
        return target_text(value.target)
    if isinstance(value, Var):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(v) for v in value)}]"
    return repr(value)


def target_text(target: Any) -> str:
    """Return `aten.mul.Tensor` for an overload, `aten.mul` for a packet, `getitem` for a function."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return str(target)
    return str(getattr(target, "__name__", target))


def calls_target(node: fx.Node, target: Any) -> bool:
    """Return whether a node calls the overload, any overload of the packet, or the function given."""
    return node.op == "call_function" and (node.target is target or packet_of(node.target) is target)


@cache
def _picture_args(call: Call, overload: OpOverload) -> tuple[Any, ...] | None:
    return bound_args(overload, call.args, call.kwargs)


def _argument_name(target: Any, index: int) -> str:
    if isinstance(target, OpOverload):
        return str(target._schema.arguments[index].name)
    return f"argument {index}"


def _is_constant(pattern: Any) -> bool:
    return not isinstance(pattern, (Var, Call, list, tuple, slice))


def match(picture: Picture, root: fx.Node, demands: Demands, explain: bool = False) -> Match | Miss:
    """Look for a picture whose last call is `root`; reasons of a miss are worked out only when `explain` is set.

    Ways to order commutative arguments are tried as written first, and the first that fits the demands wins.
    """
    search = _Search(demands, explain)
    if search.solve((picture.root, root, None)):
        values = {name: search.values.get(name) for name in picture.names}
        return Match(values, tuple(dict.fromkeys(search.calls.values())))
    return search.shared or search.best


@dataclass
class _Search:
    demands: Demands
    explain: bool
    values: dict[str, Any] = field(default_factory=dict)
    calls: dict[Call, fx.Node] = field(default_factory=dict)
    trail: list[str | Call] = field(default_factory=list)
    best: Miss = _MISS
    shared: Miss | None = None

    def solve(self, goals: Any) -> bool:
        """Fit linked goals (picture, value, rest) one after the other."""
        while goals is not None:
            pattern, value, goals = goals
            if isinstance(pattern, Var):
                if not self.bind(pattern.name, value):
                    return False
            elif isinstance(pattern, Call):
                orders = self.enter(pattern, value)
                if len(orders) != 1:
                    return any(self.attempt(order, goals) for order in orders)
                goals = _push(orders[0], goals)
            elif isinstance(pattern, (list, tuple)) and isinstance(value, (list, tuple)):
                if len(pattern) != len(value):
                    return self.miss(value, f"{show(value)} has {len(value)} items, the picture {len(pattern)}")
                goals = _push(tuple(zip(pattern, value, strict=True)), goals)
            elif isinstance(pattern, slice) and isinstance(value, slice):
                goals = (_slice_parts(pattern), _slice_parts(value), goals)
            elif not same_value(pattern, value):
                return self.explain and self.miss(value, f"{show(value)} is not {show(pattern)}")
        return self.alone()

    def attempt(self, order: tuple[tuple[Any, Any], ...], goals: Any) -> bool:
        mark = len(self.trail)
        if self.solve(_push(order, goals)):
            return True
        while len(self.trail) > mark:
            key = self.trail.pop()
            self.calls.pop(key) if isinstance(key, Call) else self.values.pop(key)
        return False

    def bind(self, name: str, value: Any) -> bool:
        if name in self.values:
            if same_value(self.values[name], value):
                return True
            return self.explain and self.miss(value, f"{name} is {show(self.values[name])}, and here {show(value)}")
        is_param = isinstance(value, fx.Node) and value.op == "get_attr"
        if name in self.demands.params and not is_param:
            return self.explain and self.miss(value, f"{name} must be a parameter and is {show(value)}")
        if name in self.demands.optional and not is_param and value is not None:
            return self.explain and self.miss(value, f"{name} must be a parameter or absent and is {show(value)}")
        if name in self.demands.consts and _has_node(value):
            return self.explain and self.miss(value, f"{name} must be a constant and is {show(value)}")
        self.values[name] = value
        self.trail.append(name)
        return True

    def enter(self, call: Call, node: Any) -> tuple[tuple[tuple[Any, Any], ...], ...]:
        """Fit a call itself, and return the ways to pair its arguments with the node's (none if it does not fit)."""
        if call in self.calls:
            if self.calls[call] is node:
                return ((),)
            self.miss(node, f"{show(call)} is {show(self.calls[call])}, and here {show(node)}")
            return ()
        if not isinstance(node, fx.Node) or not calls_target(node, call.target):
            if self.explain:
                self.miss(node, f"{show(node)} is not {show(call)}")
            return ()
        wanted, given = _arguments(call, node)
        if wanted is None or given is None or len(wanted) != len(given):
            self.miss(node, f"the arguments of {show(node)} are not of the kind drawn")
            return ()
        commutes = _commutes(node, given)
        for index in range(2 if commutes else 0, len(wanted)):
            if _is_constant(wanted[index]) and not same_value(wanted[index], given[index]):
                if self.explain:
                    name = _argument_name(node.target, index)
                    self.miss(node, f"{name} of {show(node)} is {show(given[index])}, not {show(wanted[index])}")
                return ()
        self.calls[call] = node
        self.trail.append(call)
        pairs = tuple(zip(wanted, given, strict=True))
        if not commutes:
            return (pairs,)
        return (pairs, ((wanted[0], given[1]), (wanted[1], given[0]), *pairs[2:]))

    def alone(self) -> bool:
        """Check that nothing outside the match reads its inner calls, if that is demanded."""
        if not self.demands.sole:
            return True
        inside = list(self.calls.values())
        for node in inside[1:]:
            for user in node.users:
                if user not in inside:
                    reason = f"{node.name} is also read by {user.name}"
                    self.shared = Miss(len(self.trail), reason, node, shared=True)
                    return False
        return True

    def miss(self, value: Any, reason: str) -> bool:
        # Of equally far attempts the first counts: it is the order the picture was written in, which reads best.
        if self.explain and (not self.best.reason or len(self.trail) > self.best.fitted):
            self.best = Miss(len(self.trail), reason, value if isinstance(value, fx.Node) else None)
        return False


def _push(pairs: tuple[tuple[Any, Any], ...], goals: Any) -> Any:
    for pattern, value in reversed(pairs):
        goals = (pattern, value, goals)
    return goals


def _arguments(call: Call, node: fx.Node) -> tuple[tuple[Any, ...] | None, tuple[Any, ...] | None]:
    if isinstance(node.target, OpOverload):
        return _picture_args(call, node.target), bound_args(node.target, node.args, node.kwargs)
    if set(call.kwargs) != set(node.kwargs):
        return None, None
    names = sorted(call.kwargs)
    return (*call.args, *(call.kwargs[k] for k in names)), (*node.args, *(node.kwargs[k] for k in names))


def _commutes(node: fx.Node, given: tuple[Any, ...]) -> bool:
    packet: Any = packet_of(node.target)
    if packet not in COMMUTATIVE or len(given) < 2:
        return False
    return packet is not aten.add or len(given) < 3 or same_value(given[2], 1)


def _has_node(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_node, value))
    if isinstance(value, slice):
        return _has_node(_slice_parts(value))
    return isinstance(value, fx.Node)
