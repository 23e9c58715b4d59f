"""An ONNX graph as a torch module, one submodule a node, so that what is traced is known by the names of nodes."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as onnx
import torch
from torch import nn

from frontend.onnx.caches import Positions, next_positions
from frontend.onnx.call import Refused
from frontend.onnx.dtypes import torch_dtype
from frontend.onnx.interpreter import Env, Interpreter
from frontend.onnx.values import as_tensor

# Where torch's exporter writes the modules that a node lies in, from the outermost on.
_SCOPES = "pkg.torch.onnx.name_scopes"
_NUMBERED = re.compile(r"val_\d+")


class GraphModule(nn.Module):
    """A graph whose weights are parameters without values, and whose constants are tensors with theirs.

    paths: under which path each weight is a parameter, by the name of its initializer; scopes: by path of a node, the
    module that it came from, where the model tells; positions: the input of token
    positions with those of ids and a cache that tell them, where the module is not given them.
    """

    def __init__(
        self,
        run: Interpreter,
        graph: onnx.Graph,
        env: Env,
        folded: set[onnx.Node],
        inputs: Sequence[onnx.Value],
        weights: Mapping[str, Any],
        positions: Positions | None = None,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.known, self.inputs, self.results = env, list(inputs), list(graph.outputs)
        place = _Places(self)
        self.steps = [Step(run, node) for node in needed(graph) if node not in folded]
        self.scopes: dict[str, str] = {}
        for step in self.steps:
            scope, own = scope_of(step.node), str(step.node.name or step.node.op_type)
            path = place.module(f"{scope}.{own}" if scope else own, step)
            if scope:
                self.scopes[path] = scope
        self.paths: dict[str, str] = {}
        self.weights: dict[onnx.Value, str] = {}
        for value in graph.initializers.values():
            if value.name in weights:
                stored = weights[str(value.name)]
                tensor = torch.empty([int(d) for d in stored.shape], dtype=torch_dtype(int(stored.dtype)))
                path = place.parameter(weight_name(value), nn.Parameter(tensor, requires_grad=False))
                self.paths[str(value.name)] = self.weights[value] = path

    def forward(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run all nodes; return the outputs as tensors. A graph without inputs is given one, which it does not read."""
        env: Env = dict(self.known)
        env.update(zip(self.inputs, inputs, strict=False))
        if self.positions is not None:
            env[self.positions.value] = next_positions(env[self.positions.ids], env[self.positions.past])
        env.update({value: self.get_parameter(path) for value, path in self.weights.items()})
        for step in self.steps:
            step(env)
        missing = [value.name for value in self.results if value not in env]
        if missing:
            raise Refused(f"the output {missing[0]} is never computed", where=str(missing[0]))
        return tuple(as_tensor(env[value]) for value in self.results)


class Step(nn.Module):
    """One node."""

    def __init__(self, run: Interpreter, node: onnx.Node) -> None:
        super().__init__()
        self.run, self.node = run, node

    def forward(self, env: Env) -> None:
        """Run the node, adding its results to known values."""
        self.run.step(self.node, env, {})


def needed(graph: onnx.Graph) -> list[onnx.Node]:
    """Return the nodes that outputs depend on, in order."""
    wanted, found = set(graph.outputs), list[onnx.Node]()
    for node in reversed(list(graph)):
        if any(value in wanted for value in node.outputs):
            found.append(node)
            wanted.update(value for value in node.inputs if value is not None)
            for attribute in node.attributes.values():
                if isinstance(attribute.value, onnx.Graph):
                    inner = attribute.value
                    wanted.update(v for n in inner.all_nodes() for v in n.inputs if v is not None)
                    wanted.update(inner.outputs)
    return found[::-1]


def scope_of(node: onnx.Node) -> str:
    """Return the path of the module that a node was exported from, empty where the model does not tell."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    # The last is the operator itself, and what was no module has the name of none.
    found = scopes[-2] if isinstance(scopes, list) and len(scopes) > 1 else ""
    return found if isinstance(found, str) else ""


def weight_name(value: onnx.Value) -> str:
    """Return the name of an initializer, or one of the module that reads it where an exporter only numbered it."""
    readers = [node for node, _ in value.uses()]
    scope = scope_of(readers[0]) if len(readers) == 1 and _NUMBERED.fullmatch(str(value.name)) else ""
    return f"{scope}.weight" if scope else str(value.name)


class _Places:
    """Puts parameters and modules under the paths that the dots and slashes of names make, each in one of its own."""

    def __init__(self, root: nn.Module) -> None:
        self._owners: dict[tuple[str, ...], nn.Module] = {(): root}
        self._taken: set[tuple[str, ...]] = set()

    def parameter(self, name: str, parameter: nn.Parameter) -> str:
        """Put a parameter into its place; return its path."""
        path = self._free(name)
        self._owner(path[:-1]).register_parameter(path[-1], parameter)
        return ".".join(path)

    def module(self, name: str, module: nn.Module) -> str:
        """Put a module into its place; return its path."""
        path = self._free(name)
        self._owner(path[:-1]).add_module(path[-1], module)
        self._taken.remove(path)
        self._owners[path] = module
        return ".".join(path)

    def _free(self, name: str) -> tuple[str, ...]:
        """Return a path that nothing has, no part of it being a leaf."""
        parts = [re.sub(r"\W", "_", part) for part in re.split(r"[./:]+", name) if part] or ["value"]
        found: tuple[str, ...] = ()
        for part in parts[:-1]:
            while (*found, part) in self._taken or self._reserved(found, part):
                part = f"{part}_"  # noqa: PLW2901 - the next name to try
            found = (*found, part)
        last, serial = parts[-1], 1
        while (*found, last) in self._taken or (*found, last) in self._owners or self._reserved(found, last):
            serial += 1
            last = f"{parts[-1]}_{serial}"
        self._taken.add((*found, last))
        return (*found, last)

    def _reserved(self, owner: tuple[str, ...], part: str) -> bool:
        """Return whether a module has an attribute of that name which is no part of ours."""
        known = self._owners.get(owner)
        return (*owner, part) not in self._owners and hasattr(known if known is not None else nn.Module(), part)

    def _owner(self, path: tuple[str, ...]) -> nn.Module:
        if path not in self._owners:
            owner = self._owners[path] = nn.Module()
            self._owner(path[:-1]).add_module(path[-1], owner)
        return self._owners[path]
