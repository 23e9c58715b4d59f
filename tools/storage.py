"""How many bits a program's weights take where they are stored, site by site, read off headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

import ir.ops  # noqa: F401 - registers the nomul operators
from ir.analysis import FACTORED, is_branch, linear_sites, site_name
from ir.decode import arguments, code_nodes
from ir.program import Program, is_call, tensor_type_of
from ir.text import op_name

_DENSE = (torch.ops.nomul.grouped_linear,)


@dataclass(frozen=True)
class Site:
    """One linear: its operator, shape [rows, inputs], and what is stored for its weight (its bias excluded).

    bits: width of a code, or None; planes, group: of shift-add and grouped codes, or None; stored_bytes: all tensors;
    branch: whether it lies beside another linear, to which it adds; stands_for: how many weights the linear has that it
    is a factor of, None where it is whole.
    """

    name: str
    op: str
    rows: int
    inputs: int
    bits: int | None
    planes: int | None
    group: int | None
    stored_bytes: int
    branch: bool = False
    stands_for: int | None = None

    @property
    def weights(self) -> int:
        """Number of the model's weights that the site stands for: none on a branch beside another."""
        whole = self.rows * self.inputs if self.stands_for is None else self.stands_for
        return 0 if self.branch else whole

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, its own where it is a branch: codes, scales, offsets, masks and padding."""
        return 8 * self.stored_bytes / (self.rows * self.inputs)

    @property
    def compressed(self) -> bool:
        """Whether the weight is stored as codes."""
        return self.op.startswith("nomul.")


@dataclass(frozen=True)
class Storage:
    """A program's stored weights: its linears (tied heads and embeddings excluded), all bytes and all weights."""

    sites: tuple[Site, ...]
    total_bytes: int
    total_weights: int

    @property
    def compressed_bits(self) -> float | None:
        """Stored bits per weight of the compressed linears, None when there are none."""
        return _bits([s for s in self.sites if s.compressed])

    @property
    def linear_bits(self) -> float | None:
        """Stored bits per weight of all linears that own their weight, those left alone included."""
        return _bits(self.sites)

    @property
    def model_bits(self) -> float:
        """Stored bits per weight of the whole model, embeddings, norms and constants included."""
        return 8 * self.total_bytes / max(1, self.total_weights)

    def as_json(self) -> dict[str, float | int | None]:
        """Return the totals by name."""
        return {
            "linears": len(self.sites),
            "compressed_linears": sum(s.compressed for s in self.sites),
            "bits_per_weight_compressed": self.compressed_bits,
            "bits_per_weight_linears": self.linear_bits,
            "bits_per_weight_model": self.model_bits,
            "stored_bytes": self.total_bytes,
            "weights": self.total_weights,
        }


def storage(program: Program, written: bool = False) -> Storage:
    """Return what a program's weights take in their files: for a checkpoint the bytes of its own format.

    written: as an artifact stores them instead, which decodes the formats of checkpoints.
    """
    compressed = {node: _code_params(node) for node in program.graph.nodes if _is_compressed(node)}
    for node, names in _indices(compressed).items():
        compressed[node] = [*compressed[node], *names]
    floats = {site.node: site for site in linear_sites(program, program.graph.nodes)[0]}
    sites, factored = [], program.attributes.get(FACTORED, {})
    for node in program.graph.nodes:
        if node in compressed:
            sites.append(_compressed_site(program, node, compressed[node], written))
        elif node in floats:
            site = floats[node]
            size = _stored_bytes(program, [site.weight], written)
            place = (site.name, op_name(node.target), site.rows, site.inputs)
            sites.append(Site(*place, None, None, None, size, is_branch(node), factored.get(site.name)))
    coded = {name for names in compressed.values() for name in names}
    coded |= {site.weight for site in floats.values() if is_branch(site.node)}
    plain = [name for name in program.params if name not in coded]
    dense = sum(math.prod(int(d) for d in program.params.type_of(name).dims) for name in plain)
    weights = dense + sum(s.weights for s in sites if s.compressed)
    weights += sum(s.weights - s.rows * s.inputs for s in sites if not s.compressed and s.stands_for is not None)
    return Storage(tuple(sites), _stored_bytes(program, program.params, written), weights)


def _is_compressed(node: fx.Node) -> bool:
    target = node.target
    is_linear = isinstance(target, torch._ops.OpOverload) and op_name(target).endswith("_linear")
    return is_linear and target.namespace == "nomul" and not is_call(node, *_DENSE)  # type: ignore[union-attr]


def _compressed_site(program: Program, node: fx.Node, names: list[str], written: bool) -> Site:
    values = arguments(node)
    rows, inputs = (int(tensor_type_of(n).dims[-1]) for n in (node, values["x"]))
    planes = tensor_type_of(values["signs"]).dims[0] if "signs" in values else None
    figures = {key: values[key] if isinstance(values.get(key), int) else None for key in ("bits", "group")}
    size = _stored_bytes(program, names, written)
    plane_count = None if planes is None else int(planes)
    place = (site_name(node), op_name(node.target), rows, inputs)
    stands_for = program.attributes.get(FACTORED, {}).get(site_name(node))
    return Site(*place, figures["bits"], plane_count, figures["group"], size, is_branch(node), stands_for)


def _code_params(node: fx.Node) -> list[str]:
    return [str(code.target) for codes in code_nodes(node).values() for code in codes]


def _indices(compressed: Iterable[fx.Node]) -> dict[fx.Node, list[str]]:
    """Return the stored indices by which coded linears pick their inputs, each at the first linear that it serves."""
    found: dict[fx.Node, list[str]] = {}
    counted: set[fx.Node] = set()
    for node in compressed:
        x = arguments(node)["x"]
        if is_call(x, torch.ops.aten.index_select) and x.args[2].op == "get_attr" and x.args[2] not in counted:
            counted.add(x.args[2])
            found[node] = [str(x.args[2].target)]
    return found


def _stored_bytes(program: Program, names: Iterable[str], written: bool) -> int:
    if written:
        return sum(program.params.nbytes(name) for name in names)
    entries = [program.params.entry(name) for name in names]
    return sum(entry.source.stored_bytes(entry.key) for entry in entries)


def _bits(sites: Iterable[Site]) -> float | None:
    chosen = list(sites)
    return 8 * sum(s.stored_bytes for s in chosen) / sum(s.weights for s in chosen) if chosen else None
