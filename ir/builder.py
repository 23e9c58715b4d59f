"""What the body of a rewrite rule may do: look at the fragment found and build its replacement, or be undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir.edit import Editor
from ir.errors import InvariantError
from ir.params import Entry
from ir.program import PATH, TYPE, Program, tensor_type_of
from ir.types import TensorType, ValueType


class Builder:
    """Builds the replacement of one matched fragment before its root; `undo` leaves the program as it was.

    root: the node to be replaced; nodes: all calls matched, root first.
    """

    def __init__(self, editor: Editor, nodes: tuple[fx.Node, ...]) -> None:
        self.root, self.nodes = nodes[0], nodes
        self.created: list[fx.Node] = []
        self._editor = editor.before(self.root)
        self._overwritten: dict[str, Entry | None] = {}
        self._types: list[tuple[fx.Node, ValueType]] = []
        self._version, self._writes = self.program.version, len(self.program.params.writes)

    @property
    def program(self) -> Program:
        """The program being rewritten; bodies read it and change it only through the builder."""
        return self._editor.program

    def call(
        self, target: Any, *args: Any, like: fx.Node | None = None, type: ValueType = None, **kwargs: Any
    ) -> fx.Node:
        """Insert a call of an overload, a packet or a function, typed by `type` or as the node it is `like`.

        Raises InvariantError when neither is given, no overload takes the arguments, or one is computed too late.
        """
        node = self._editor.call(target, *args, like=like, type=type, **kwargs)
        self.created.append(node)
        node.meta[PATH] = self.root.meta.get(PATH, "")
        for source in node.all_input_nodes:
            self._check_early(source)
        return node

    def param(self, name: str | fx.Node, tensor: torch.Tensor | None = None) -> fx.Node:
        """Return the node of a parameter, writing `tensor` into the store first when given.

        name: a parameter's name, or a parameter node, for "this one rewritten": under its own name if nothing else
        reads it, else under a fresh name.
        """
        if isinstance(name, fx.Node):
            own = str(name.target)
            name = self.fresh(own) if tensor is not None and self.shared(name) else own
        if tensor is not None:
            self._remember(name)
        known = set(self.program.graph.find_nodes(op="get_attr", sort=False))
        self._types += [(n, n.meta[TYPE]) for n in known if n.target == name]
        node = self._editor.param(name, tensor)
        if node not in known:
            self.created.append(node)
        elif not node < self.root:
            next(iter(self.program.graph.nodes)).prepend(node)
        return node

    def fresh(self, name: str) -> str:
        """Return `name`, or `name` with a number, such that no parameter carries it yet."""
        return self._editor.fresh(name)

    def value(self, node: fx.Node) -> torch.Tensor:
        """Return the tensor behind a parameter node; raises TypeError for a computed one."""
        return self.program.value(node)

    def type(self, node: fx.Node) -> TensorType:
        """Return the type of a node that is a single tensor; raises TypeError otherwise."""
        return tensor_type_of(node)

    def users(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that read a node."""
        return tuple(node.users)

    def shared(self, node: fx.Node) -> bool:
        """Return whether a parameter has more than one reader or a tied name; raises TypeError for a computed one."""
        if node.op != "get_attr":
            raise TypeError(f"{node.name} is computed, not a parameter")
        name = str(node.target)
        twins = self.program.graph.find_nodes(op="get_attr", target=name, sort=False)
        return sum(len(n.users) for n in twins) > 1 or name in self.program.params.aliases().values()

    def undo(self) -> None:
        """Take back every node and parameter made here."""
        for node in reversed(self.created):
            self._editor.erase(node)
        params = self.program.params
        for name, entry in self._overwritten.items():
            if entry is not None:
                params.enter(name, entry)
            elif name in params:
                params.drop(name)
        for node, kind in reversed(self._types):
            node.meta[TYPE] = kind
        del params.writes[self._writes :]
        self.created, self._overwritten, self._types = [], {}, []
        self.program.version = self._version

    def check_result(self, node: fx.Node) -> None:
        """Raise InvariantError unless a node may stand where the root stands."""
        if node is self.root:
            raise InvariantError("the body returned the root unchanged", fix="return No(reason) to leave it alone")
        self._check_early(node)
        old, new = self.root.meta.get(TYPE), node.meta.get(TYPE)
        if (
            isinstance(old, TensorType)
            and isinstance(new, TensorType)
            and (old.dtype, len(old.dims)) != (new.dtype, len(new.dims))
        ):
            raise InvariantError(f"the replacement {node.name} is {new}, but {self.root.name} is {old}")

    def _check_early(self, node: fx.Node) -> None:
        if node.graph is not self.root.graph or not node < self.root:
            raise InvariantError(
                f"{node.name} is not computed before {self.root.name}",
                why="a replacement may read only what comes before the root of the match",
            )

    def _remember(self, name: str) -> None:
        params = self.program.params
        name = params.aliases().get(name, name)
        self._overwritten.setdefault(name, params.entry(name) if name in params else None)
