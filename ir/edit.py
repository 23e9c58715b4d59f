"""The one place where graphs are changed: every edit keeps types, provenance and the program's version right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ir.errors import InvariantError
from ir.overloads import resolve
from ir.program import HELD, ORIGIN, PATH, TYPE, Program, rename
from ir.types import ValueType


class Editor:
    """Edits a program on behalf of one pass or rule, whose name is recorded on what it makes.

    New nodes are inserted before `at` (set by `before`), and copy type and module path of the node they are `like`.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program, self.by = program, by
        self._at: fx.Node | None = None
        self._attrs: dict[str, fx.Node] | None = None

    def before(self, node: fx.Node) -> Editor:
        """Insert what follows before `node`."""
        self._at = node
        return self

    def call(
        self,
        target: Any,
        *args: Any,
        like: fx.Node | None = None,
        type: ValueType = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert a call; its type is `type`, or that of `like`. Raises InvariantError when neither is given."""
        if like is None and type is None:
            raise InvariantError(f"{self.by} made a call of {target} without a type", fix="pass like= or type=")
        if self._at is None:
            raise InvariantError(f"{self.by} made a call of {target} without a place", fix="call before(node) first")
        overload = resolve(target, args, kwargs)
        with self.program.graph.inserting_before(self._at):
            node = self.program.graph.create_node("call_function", overload, args, kwargs, name)
        node.meta = dict(like.meta) if like is not None else {PATH: self._at.meta.get(PATH, "")}
        if type is not None:
            node.meta[TYPE] = type
        node.meta[ORIGIN] = self.by
        self._changed()
        return node

    def param(self, name: str, tensor: torch.Tensor | None = None) -> fx.Node:
        """Return the node of parameter `name`, writing `tensor` into the store first when given."""
        params = self.program.params
        if tensor is not None:
            params.put(name, tensor, self.by)
        name = params.resolve(name)
        existing = self._param_nodes().get(name)
        if existing is not None:
            existing.meta[TYPE] = params.type_of(name)
            self._changed()
            return existing
        graph = self.program.graph
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            node = graph.create_node("get_attr", name)
        node.meta = {TYPE: params.type_of(name), ORIGIN: self.by}
        self._param_nodes()[name] = node
        self._changed()
        return node

    def fresh(self, name: str) -> str:
        """Return `name`, or `name` with a number, such that no parameter carries it yet."""
        candidate, serial = name, 1
        while candidate in self.program.params:
            serial += 1
            candidate = f"{name}{serial}"
        return candidate

    def replace(self, old: fx.Node, new: fx.Node, keep_name: bool = False) -> None:
        """Make every user of `old` read `new`; the old node dies at the next sweep unless something still reads it.

        keep_name: give the new node the old one's name, so that dumps before and after line up.
        """
        old.replace_all_uses_with(new, propagate_meta=False)
        if keep_name:
            name, old_name = old.name, f"{old.name}_replaced"
            rename(old, old_name)
            rename(new, name)
        self._changed()

    def set_args(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Give a node new arguments."""
        node.args = args
        if kwargs is not None:
            node.kwargs = kwargs
        self._changed()

    def set_type(self, node: fx.Node, kind: ValueType) -> None:
        """Correct the recorded type of a node."""
        node.meta[TYPE] = kind
        self._changed()

    def erase(self, node: fx.Node) -> None:
        """Remove a node without users."""
        self.program.graph.erase_node(node)
        if node.op == "get_attr":
            self._attrs = None
        self._changed()

    def sweep(self) -> int:
        """Remove calls and parameter nodes without users, and parameters nothing reads; return how many nodes went."""
        graph, removed = self.program.graph, 0
        for node in reversed(list(graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                graph.erase_node(node)
                removed += 1
        self._attrs = None
        read = {str(n.target) for n in self.program.param_nodes()} | set(self.program.attributes.get(HELD, ()))
        for name in [n for n in self.program.params if n not in read]:
            self.program.params.drop(name)
        if removed:
            self._changed()
        return removed

    def _param_nodes(self) -> dict[str, fx.Node]:
        if self._attrs is None:
            self._attrs = {str(n.target): n for n in self.program.param_nodes()}
        return self._attrs

    def _changed(self) -> None:
        self.program.version += 1


def users_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the distinct users of several nodes, in first-seen order."""
    seen: dict[fx.Node, None] = {}
    for node in nodes:
        seen.update(dict.fromkeys(node.users))
    return list(seen)
