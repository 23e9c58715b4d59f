"""The coded weights of a block, and the gains of its norms, as functions of what `tune-scales` trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ir.decode import arguments, code_nodes, codes_of, decoded_name
from ir.ops.nested import NestedCodes
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.program import Program
from passes.training.scales import CodedWeight, coded_weight


@dataclass(frozen=True, eq=False)
class TunedWeights:
    """Coded linears whose scales and offsets are trained, and names of gains that are trained with them."""

    program: Program
    nodes: Mapping[str, fx.Node]
    weights: Mapping[str, CodedWeight]
    gains: tuple[str, ...]

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that depend on the state, those of decoded weights first."""
        return (*(decoded_name(node) for node in self.nodes.values()), *self.gains)

    def start(self) -> dict[str, Tensor]:
        """Return the state under which all is as it is stored."""
        state = {f"{site}/{part}": t for site, w in self.weights.items() for part, t in w.start().items()}
        return state | {f"gain/{name}": torch.zeros_like(self.program.params.get(name)) for name in self.gains}

    def params(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of `free` under a state, with gradients."""
        found = {decoded_name(self.nodes[site]): w.weight(_part(state, site)) for site, w in self.weights.items()}
        return found | {name: self._gain(state, name) for name in self.gains}

    def changed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored parameters that a state changes, by name."""
        found = {name: self._gain(state, name) for name in self.gains}
        for site, weight in self.weights.items():
            found |= _changed(self.nodes[site], weight.coded(_part(state, site)), self.program)
        return found

    def _gain(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        return self.program.params.get(name) * (1 + state[f"gain/{name}"])


def tuned_weights(program: Program, nodes: Sequence[fx.Node], gains: Sequence[str]) -> TunedWeights:
    """Return coded linears as trained; nested ones at the precision that they run at."""
    weights = {node.name: _weight(node, program) for node in nodes}
    return TunedWeights(program, {node.name: node for node in nodes}, weights, tuple(gains))


def _weight(node: fx.Node, program: Program) -> CodedWeight:
    codes = codes_of(node, program.params.get)
    return coded_weight(codes.at(arguments(node)["precision"]) if isinstance(codes, NestedCodes) else codes)


def _part(state: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
    """Return a site's part of the state."""
    return {name.rpartition("/")[2]: t for name, t in state.items() if name.rpartition("/")[0] == site}


def _changed(node: fx.Node, codes: QuantCodes | ShiftCodes, program: Program) -> dict[str, Tensor]:
    """Return the parameters of a coded linear that differ from those stored, by name."""
    values, stored = arguments(node), code_nodes(node)
    which = list(values["precisions"]).index(values["precision"]) if "precision" in values else 0
    found: dict[str, Tensor] = {}
    for part in ("scales", "exponents", "offsets"):
        if part in stored and getattr(codes, part) is not None:
            name = str(stored[part][which].target)
            if not torch.equal(program.params.get(name), getattr(codes, part)):
                found[name] = getattr(codes, part)
    return found
