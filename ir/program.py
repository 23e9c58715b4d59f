"""The program every pass reads and rewrites: a graph of ATen and nomul ops over a store of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn

from ir.decode import decode_linears
from ir.params import ParamStore
from ir.types import ORIGIN, PATH, TYPE, TensorType, ValueType

__all__ = [
    "HELD",
    "LEVELS",
    "ORIGIN",
    "PATH",
    "TYPE",
    "Program",
    "flat_name",
    "graph_module",
    "is_call",
    "release",
    "rename",
    "tensor_type_of",
    "type_of",
]

# Key of `Program.attributes`: parameters that no node reads but a later pass will, such as scales still to be folded.
HELD = "held"

LEVELS = ("model", "compressed", "target")


def type_of(node: fx.Node) -> ValueType:
    """Return the type recorded on a node; raises KeyError when a pass forgot to give one."""
    kind: ValueType = node.meta[TYPE]
    return kind


def tensor_type_of(node: fx.Node) -> TensorType:
    """Return the type of a node that must be a single tensor; raises TypeError otherwise."""
    kind = node.meta.get(TYPE)
    if not isinstance(kind, TensorType):
        raise TypeError(f"{node.name} is {kind}, not a tensor")
    return kind


@dataclass
class Program:
    """One model as a graph: placeholders in, logits and key/value cache out, weights as `get_attr` nodes.

    graph: `torch.fx.Graph`; every node carries `meta["type"]` (`ir.types`), and `path` / `origin` for provenance.
    params: the store that `get_attr` targets name (canonical names only).
    level: `model`, `compressed` or `target`; facts: what passes established; history: pass texts run so far.
    symbols: declared names of dynamic dims; attributes: small JSON-able facts of the model (its name, its cache).
    version: grows with every edit, so that analyses and "did this pass change anything" never lie.
    """

    graph: fx.Graph
    params: ParamStore
    name: str = "program"
    level: str = "model"
    facts: frozenset[str] = frozenset()
    history: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    version: int = 0

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The placeholder nodes, in order."""
        return tuple(n for n in self.graph.nodes if n.op == "placeholder")

    @property
    def output(self) -> fx.Node:
        """The single output node."""
        return self.graph.output_node()

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes returned, logits first."""
        values = self.output.args[0]
        return tuple(values) if isinstance(values, (tuple, list)) else (values,)  # type: ignore[arg-type, return-value]

    def node(self, name: str) -> fx.Node:
        """Return the node of that name; raises KeyError."""
        for candidate in self.graph.nodes:
            if candidate.name == name:
                return cast(fx.Node, candidate)
        raise KeyError(f"no node named {name}")

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """Yield call nodes whose overload or overload packet is one of `targets`, in graph order."""
        for node in self.graph.nodes:
            if node.op == "call_function" and is_call(node, *targets):
                yield node

    def param_nodes(self) -> Iterator[fx.Node]:
        """Yield the `get_attr` nodes."""
        return (n for n in self.graph.nodes if n.op == "get_attr")

    def value(self, node: fx.Node) -> torch.Tensor:
        """Return the tensor behind a `get_attr` node."""
        if node.op != "get_attr":
            raise TypeError(f"{node.name} is computed, not a parameter")
        return self.params.get(str(node.target))

    def clone(self) -> Program:
        """Return a program with its own graph and store whose tensors are shared with this one."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, copies)
        graph.output(output)
        graph.output_node().meta.update(self.output.meta)
        for old, new in copies.items():
            new.meta = dict(old.meta)
            rename(new, old.name)
        return Program(
            graph,
            self.params.clone(),
            self.name,
            self.level,
            self.facts,
            self.history,
            self.symbols,
            dict(self.attributes),
            self.version,
        )

    def module(self, load: Callable[[str], torch.Tensor] | None = None, decode: bool = False) -> nn.Module:
        """Return a runnable module that takes the inputs in order and returns the tuple of outputs.

        load: name -> tensor for parameters (default: the store's); tensors are buffers, so nothing is trained.
        decode: hold the weights of coded linears as floats, decoded once, instead of decoding them in every call.
        """
        return graph_module(self.graph, load or self.params.get, decode=decode)


def rename(node: fx.Node, name: str) -> None:
    """Give a node exactly this name; the caller sees to it that no other node carries it.

    fx never gives a name out twice, not even after its first bearer is gone, which would make dumps depend on history.
    """
    node.name = name
    node.graph._graph_namespace._used_names.add(name)


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether a value is a call of one of the overloads, overload packets or functions given."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    if target in targets:
        return True
    packet = getattr(target, "overloadpacket", None)
    return packet is not None and packet in targets


def flat_name(name: str) -> str:
    """Return the attribute under which a module holds parameter `name`; dots would nest modules and slow access."""
    return "p_" + "".join(c if c.isalnum() else "_" for c in name)


def graph_module(
    graph: fx.Graph,
    load: Callable[[str], torch.Tensor],
    trainable: dict[str, nn.Parameter] | None = None,
    decode: bool = False,
) -> fx.GraphModule:
    """Return a `GraphModule` over a copy of `graph`, parameters flattened to one attribute each.

    load: name -> tensor; trainable: parameters to register as `nn.Parameter` instead, by canonical name; decode: turn
    coded linears into float ones.
    """
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, copies))
    decoded = decode_linears(copy, load) if decode else {}
    root = nn.Module()
    taken: dict[str, str] = {}
    for node in copy.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in taken:
            flat = flat_name(name)
            if flat in taken.values():
                flat = f"{flat}_{len(taken)}"
            taken[name] = flat
            if trainable is not None and name in trainable:
                root.register_parameter(flat, trainable[name])
            else:
                tensor = decoded[name] if name in decoded else load(name)
                root.register_buffer(flat, tensor, persistent=False)
        node.target = taken[name]
    return fx.GraphModule(root, copy, class_name="ProgramModule")


def release(module: nn.Module) -> None:
    """Let go of a module's tensors now: module and graph refer to each other, so they would wait for a collection."""
    module._buffers.clear()
    module._parameters.clear()
