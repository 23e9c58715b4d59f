"""Structure read off the dataflow: what carries tokens, where a program can be cut, and which parts repeat."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ir.program import PATH, Program, is_call
from ir.region import Region, region
from ir.types import Dim, TensorType

if TYPE_CHECKING:
    import networkx as nx

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """One repetition of the repeated part of a program, usually a decoder layer.

    index: position, 0 first; path: the longest module path its nodes share (may be empty); entry: the value that flows
    in from the block before; exit: the value that flows on; nodes: all calls between, in graph order.
    """

    index: int
    path: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]

    def region(self, program: Program, outputs: Iterable[fx.Node] | None = None) -> Region:
        """Return the block as a region; outputs default to its exit and the other values read outside."""
        return region(program, self.nodes, outputs)


@dataclass(frozen=True)
class Layout:
    """A program as prologue, equal blocks and epilogue.

    prologue: everything the first block needs, the ambient values (masks, positions, rotary angles, sizes) included;
    epilogue: what follows the last block. `blocks` is empty when nothing repeats, and then the prologue is everything.
    """

    prologue: tuple[fx.Node, ...]
    blocks: tuple[Block, ...]
    epilogue: tuple[fx.Node, ...]


def graph_view(program: Program) -> nx.DiGraph:
    """Return the dataflow as a networkx graph of node names; a view to be thrown away, never storage."""
    import networkx as nx

    view = nx.DiGraph()
    for node in program.graph.nodes:
        view.add_node(node.name, op=_label(node))
        view.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return view


# Key of `Program.attributes`: names of the results of a program that is no causal language model.
RESULTS = "outputs"
IDS = "input_ids"


def predicts_tokens(program: Program) -> bool:
    """Return whether a program is a causal language model: token ids in, logits of the next token and a cache out."""
    return RESULTS not in program.attributes


def result_names(program: Program) -> tuple[str, ...]:
    """Return what the results of a program are called: as in the model it came from, or by their nodes."""
    names = tuple(str(name) for name in program.attributes.get(RESULTS, ()))
    return names if len(names) == len(program.outputs) else tuple(node.name for node in program.outputs)


def stream_input(program: Program) -> fx.Node:
    """Return the input that the blocks work on: the token ids, or else the first input of floats, or the first."""
    inputs = program.inputs
    if predicts_tokens(program):
        return inputs[0]
    floats = [n for n in inputs if isinstance(k := n.meta["type"], TensorType) and k.dtype.is_floating_point]
    return next((n for n in inputs if n.name == IDS), (floats or inputs)[0])


def token_carriers(program: Program) -> dict[fx.Node, None]:
    """Return the calls that depend on the values of the token ids (`stream_input`), not only on its shape, in order."""
    start = stream_input(program)
    carriers: dict[fx.Node, None] = {start: None}
    for node in program.graph.nodes:
        computed = node.op == "call_function" and not is_call(node, aten.sym_size)
        if computed and any(source in carriers for source in node.all_input_nodes):
            carriers[node] = None
    del carriers[start]
    return carriers


def cut_points(program: Program) -> list[fx.Node]:
    """Return the token-carrying values through which every path from the token ids to the logits passes, in order.

    They are the dominators of the logits in the graph of token carriers: the residual stream between its branches. An
    input of floats, which may be such a stream already, is one too.
    """
    import networkx as nx

    carriers = token_carriers(program)
    logits, start = program.outputs[0], stream_input(program)
    view = nx.DiGraph()
    for node in carriers:
        view.add_edges_from((s, node) for s in node.all_input_nodes if s in carriers or s is start)
    if logits not in view:
        return []
    above = nx.immediate_dominators(view, start)
    chain, node = [], logits
    while node is not start:
        chain.append(node)
        node = above[node]
    if not predicts_tokens(program) and start.meta["type"].dtype.is_floating_point:
        chain.append(start)
    return chain[::-1]


def layout(program: Program) -> Layout:
    """Split a program into prologue, repeated blocks and epilogue.

    Between neighbouring cut points lies a segment; segments with equal Weisfeiler-Lehman hashes over operator labels
    are alike, and the longest run of a repeating sequence of segments gives the blocks. No names are used. Whether a
    linear is coded and its input rotated makes no difference, so that blocks compressed differently stay blocks.
    """
    cuts = cut_points(program)
    segments = _segments(program, cuts)
    labels = [_signature(program, nodes) for nodes in segments]
    start, period, count = _repetition(labels)
    if count < 2:
        start, period, count = _single_block(cuts, segments)
    if not count:
        return Layout(tuple(n for n in program.graph.nodes if n.op == "call_function"), (), ())
    blocks = []
    for index in range(count):
        first = start + index * period
        nodes = _ordered(program, (n for s in segments[first : first + period] for n in s))
        blocks.append(Block(index, _common_path(nodes), cuts[first], cuts[first + period], nodes))
    inside = {n for block in blocks for n in block.nodes}
    late = _reach(cuts[start + count * period], inside)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n not in inside]
    return Layout(tuple(n for n in calls if n not in late), tuple(blocks), tuple(n for n in calls if n in late))


def blocks(program: Program) -> tuple[Block, ...]:
    """Return the repeated blocks of a program, empty when nothing repeats."""
    return layout(program).blocks


def _segments(program: Program, cuts: list[fx.Node]) -> list[list[fx.Node]]:
    """Return, for each pair of neighbouring cuts, the token carriers computed after the first, up to the second."""
    owner: dict[fx.Node, int] = {}
    position = {cut: i for i, cut in enumerate(cuts)}
    segments: list[list[fx.Node]] = [[] for _ in cuts[1:]]
    for node in (*cuts[:1], *token_carriers(program)):
        if node in position:
            owner[node] = position[node]
        else:
            sources = [owner[s] + (s in position) for s in node.all_input_nodes if s in owner]
            owner[node] = max(sources, default=0)
        # A cut closes the segment before it; what reads a cut belongs to the segment after it.
        if 1 <= owner[node] < len(cuts):
            segments[owner[node] - 1].append(node)
    return segments


def _signature(program: Program, nodes: list[fx.Node]) -> str:
    import networkx as nx

    inside, view = set(nodes), nx.DiGraph()
    for node in nodes:
        if _is_rotation(node):
            continue
        view.add_node(node.name, op=_label(node))
        for source in map(_before_rotation, node.all_input_nodes):
            if source in inside:
                view.add_edge(source.name, node.name)
            elif source.op == "get_attr" and not _is_linear(node):
                view.add_node(f"{node.name}<{source.name}", op=str(source.meta["type"]))
                view.add_edge(f"{node.name}<{source.name}", node.name)
    if not len(view):
        return ""
    with warnings.catch_warnings():
        # networkx announces that directed hashes changed in 3.5; ours never leave this process.
        warnings.filterwarnings("ignore", message="The hashes produced for")
        return str(nx.weisfeiler_lehman_graph_hash(view, node_attr="op", iterations=4))


def _label(node: fx.Node) -> str:
    """Return what makes nodes of two blocks alike: a linear is one however its weight is stored."""
    if _is_linear(node):
        return f"linear {_width(node)}"
    return str(node.target) if node.op == "call_function" else node.op


def _is_linear(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return name == "aten::linear" or (name.startswith("nomul::") and name.endswith("_linear"))


def _is_rotation(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "name", "") == "nomul::hadamard"


def _before_rotation(node: fx.Node) -> fx.Node:
    """Return what a rotation of activations reads: blocks stay alike when only some of them are rotated."""
    while _is_rotation(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _repetition(labels: list[str]) -> tuple[int, int, int]:
    """Return start, period and count of the repetition that covers most labels; ties go to the shortest period."""
    best = (0, 1, 1)
    for period in range(1, len(labels) // 2 + 1):
        start = 0
        while start + 2 * period <= len(labels):
            count = 1
            pattern = labels[start : start + period]
            while labels[start + count * period : start + (count + 1) * period] == pattern:
                count += 1
            if count >= 2 and count * period > best[1] * best[2]:
                best = (start, period, count)
            start += max(1, (count - 1) * period)
    return best


def _single_block(cuts: list[fx.Node], segments: list[list[fx.Node]]) -> tuple[int, int, int]:
    """Return start, period and count (1, or 0 for none) of a model with one layer.

    It runs from the first segment with a linear (what comes before are positions and scales of the embedding) to the
    last residual sum, with the reshapes that undo a flattening.
    """
    sums = [i for i, cut in enumerate(cuts) if i and is_call(cut, aten.add) and _width(cut) == _width(cuts[0])]
    if not sums:
        return 0, 1, 0
    end = sums[-1]
    while end + 1 < len(cuts) and is_call(cuts[end + 1], aten.view, aten.reshape):
        end += 1
    start = next((i for i, nodes in enumerate(segments[:end]) if any(is_call(n, aten.linear) for n in nodes)), 0)
    return start, end - start, 1


def _width(node: fx.Node) -> Dim | None:
    kind = node.meta["type"]
    return kind.dims[-1] if isinstance(kind, TensorType) and kind.dims else None


def _ordered(program: Program, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    wanted = set(nodes)
    return tuple(n for n in program.graph.nodes if n in wanted)


def _reach(exit_node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Return the calls outside the blocks that depend on the last block's exit."""
    late: set[fx.Node] = set()
    stack = [exit_node]
    while stack:
        for user in stack.pop().users:
            if user.op == "call_function" and user not in inside and user not in late:
                late.add(user)
                stack.append(user)
    return late


def _common_path(nodes: Iterable[fx.Node]) -> str:
    paths = [str(n.meta.get(PATH, "")).split(".") for n in nodes if n.meta.get(PATH)]
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def between(program: Program, entry: fx.Node, exit_node: fx.Node, outside: set[fx.Node]) -> tuple[fx.Node, ...]:
    """Return the calls that `exit_node` needs and that come after `entry`, in graph order.

    outside: values to stop at, such as the prologue's. Unlike `Block.nodes` this is right after a pass replaced nodes.
    """
    found: set[fx.Node] = set()
    stack = [exit_node]
    while stack:
        node = stack.pop()
        if node in found or node is entry or node in outside or node.op != "call_function":
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return _ordered(program, found)


BRANCH = ".branch"
# Key of `Program.attributes`: {site: number of weights it stands for}, where factors took the place of whole ones.
FACTORED = "factored"


def is_branch(node: fx.Node) -> bool:
    """Return whether a call lies on a branch beside a linear, whose weights stand for none of the model's own."""
    return str(node.meta.get(PATH, "")).endswith(BRANCH)


@dataclass(frozen=True)
class LinearSite:
    """A linear that a compressing pass may rewrite: its node, its weight's name and shape [rows, inputs], its bias."""

    name: str
    node: fx.Node
    weight: str
    rows: int
    inputs: int
    bias: fx.Node | None


def site_name(node: fx.Node) -> str:
    """Return how a site is called in tables and patterns: its module path, or its node name when it has none."""
    return str(node.meta.get(PATH) or node.name)


def linear_sites(program: Program, nodes: Iterable[fx.Node]) -> tuple[list[LinearSite], list[tuple[str, str]]]:
    """Return the linears among `nodes` that own their weight, and (site, reason) for those that do not.

    A weight that is computed, or that something else reads too (a tied embedding, a shared projection), is not theirs.
    """
    found, left = [], []
    ties = set(program.params.aliases().values())
    for node in nodes:
        if is_call(node, torch.ops.nomul.grouped_linear):
            left.append((site_name(node), "its weights are stacked per expert, which only stays float so far"))
        if not is_call(node, aten.linear):
            continue
        weight = node.args[1]
        name = site_name(node)
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            left.append((name, "its weight is computed, not stored"))
        elif len(weight.users) > 1 or str(weight.target) in ties:
            left.append((name, f"its weight {weight.target} is shared with another reader"))
        else:
            kind = weight.meta["type"]
            assert isinstance(kind, TensorType)
            bias = node.args[2] if len(node.args) > 2 else None
            rows, inputs = (int(d) for d in kind.dims)
            found.append(LinearSite(name, node, str(weight.target), rows, inputs, bias))  # type: ignore[arg-type]
    return found, left


def sibling_sites(sites: Iterable[LinearSite]) -> list[list[LinearSite]]:
    """Group sites that read the same value, in order: they share their input's second moments."""
    groups: dict[fx.Node, list[LinearSite]] = {}
    for site in sites:
        groups.setdefault(site.node.args[0], []).append(site)  # type: ignore[arg-type]
    return list(groups.values())


def matches(pattern: str, name: str) -> bool:
    """Return whether a site name matches a pattern with `*` for any text; a bare word matches any dotted part."""
    if "*" not in pattern and "." not in pattern:
        return pattern in name.split(".")
    return re.fullmatch(".*".join(re.escape(p) for p in pattern.split("*")), name) is not None
