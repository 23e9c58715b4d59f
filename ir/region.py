"""A slice of a program that can be run and differentiated on its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from ir.decode import decode_linears
from ir.program import Program, flat_name, graph_module
from ir.straight import pass_straight
from ir.weights import multiply_by


@dataclass(frozen=True)
class Region:
    """Nodes of a program cut out as a function of the values that flow in.

    program: the program it is a view of (its params are read at `module()` time, so later writes are seen).
    nodes: call nodes in graph order; inputs: values computed outside that the nodes read, parameters excepted;
    outputs: values computed inside that are read outside, or those asked for.
    """

    program: Program
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters the region reads, in order of first use."""
        seen: dict[str, None] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    seen[str(source.target)] = None
        return tuple(seen)

    def graph(self) -> fx.Graph:
        """Return the region as a graph of its own, one placeholder per input."""
        graph, copies = fx.Graph(), {}
        for source in self.inputs:
            copies[source] = graph.placeholder(source.name)
            copies[source].meta = dict(source.meta)
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in copies:
                    copies[source] = graph.node_copy(source)
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[n] for n in self.outputs))
        return graph

    def module(self, overrides: dict[str, torch.Tensor] | None = None, decode: bool = False) -> nn.Module:
        """Return a module that maps the inputs, in order, to the tuple of outputs.

        overrides: canonical name -> tensor to use instead of the store's; an `nn.Parameter` there is trained in place.
        decode: hold the weights of coded linears as floats, decoded once.
        """
        overrides = overrides or {}
        trainable = {n: t for n, t in overrides.items() if isinstance(t, nn.Parameter)}

        def load(name: str) -> torch.Tensor:
            return overrides[name] if name in overrides else self.program.params.get(name)

        return graph_module(self.graph(), load, trainable, decode)

    def function(self, free: Sequence[str]) -> nn.Module:
        """Return a module that maps values of the parameters `free`, then the inputs, to the tuple of outputs.

        Coded linears are float ones in it, each with a weight of the name that `ir.decode.decoded_name` gives. It can
        be differentiated where tokens are rounded, and then takes caches for empty. The value of a linear's weight may
        be a `LinearWeight` instead of a tensor.
        """
        graph = self.graph()
        pass_straight(graph)
        decoded = decode_linears(graph, self.program.params.get, free)
        with graph.inserting_before(next(iter(graph.nodes))):
            given = {name: graph.placeholder(flat_name(name)) for name in free}
        for node in [n for n in graph.nodes if n.op == "get_attr" and n.target in given]:
            node.replace_all_uses_with(given[str(node.target)])
            graph.erase_node(node)
        multiply_by(graph, set(given.values()))
        return graph_module(graph, lambda name: decoded[name] if name in decoded else self.program.params.get(name))


def region(program: Program, nodes: Iterable[fx.Node], outputs: Iterable[fx.Node] | None = None) -> Region:
    """Cut `nodes` out of a program; outputs default to every value that is read outside the slice."""
    inside = {n for n in nodes if n.op == "call_function"}
    ordered = tuple(n for n in program.graph.nodes if n in inside)
    inputs: dict[fx.Node, None] = {}
    for node in ordered:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr":
                inputs[source] = None
    if outputs is None:
        outputs = [n for n in ordered if any(user not in inside for user in n.users)]
    return Region(program, ordered, tuple(inputs), tuple(outputs))
