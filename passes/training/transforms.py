"""The weights of a block as differentiable functions of the scales and shifts of its equivalence groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ir.edit import Editor
from ir.program import Program, is_call
from passes.equiv.apply import Factors
from passes.equiv.groups import EquivGroup
from passes.equiv.operands import drop_bias, drop_gain, own_bias, own_gain
from passes.equiv.producers import bias_of
from passes.equiv.rules import NORMS
from passes.equiv.transfer import fold_linear, fold_norm


@dataclass(frozen=True, eq=False)
class Transforms:
    """Groups whose scales are trained, every operand they act on a parameter of its own.

    weights, biases: parameter names by node name; the weight of a norm is its gain. shifted: sites of the groups that
    get a shift as well; norms, made: names of the nodes that are norms, and of those that had no bias before.
    """

    groups: tuple[EquivGroup, ...]
    shifted: frozenset[str]
    weights: Mapping[str, str]
    biases: Mapping[str, str]
    norms: frozenset[str]
    made: frozenset[str]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that change."""
        return (*self.weights.values(), *self.biases.values())

    def apply(
        self, originals: Mapping[str, Tensor], scales: Mapping[str, Tensor], shifts: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the parameters under scales and shifts by site, in the dtype of the originals; pure, as `fold` is.

        originals: the parameters under scales of one and shifts of zero, by name.
        """
        factors = Factors()
        for group in self.groups:
            factors.add(group, scales[group.site], shifts.get(group.site))
        changed: dict[str, Tensor] = {}
        for node, weight in self.weights.items():
            bias = self.biases.get(node)
            old = None if bias is None else originals[bias]
            if node in self.norms:
                s, shape = factors.gains[node], originals[weight].shape
                shift = factors.out.get(node)
                new = fold_norm(originals[weight], old, s.view(shape), None if shift is None else shift.view(shape))
            else:
                parts = (getattr(factors, table).get(node) for table in ("rows", "cols", "into", "out"))
                new = fold_linear(originals[weight], old, *parts)
            changed[weight] = new[0]
            if bias is not None and new[1] is not None:
                changed[bias] = new[1]
        return changed


def transforms(program: Program, groups: Sequence[EquivGroup], shift: bool, by: str) -> Transforms:
    """Make every operand of the groups a parameter of its own, and return what their scales and shifts act on.

    shift: give one to every group that is exact under it. Norms without a gain get one of ones, what has no bias but
    is to take in a shift gets one of zeros.
    """
    editor = Editor(program, by)
    shifted = frozenset(g.site for g in groups if shift and "shift" in g.supports)
    weights: dict[str, str] = {}
    biases: dict[str, str] = {}
    norms: set[str] = set()
    made: set[str] = set()
    for group in groups:
        for slot in group.slots:
            node = program.node(slot.node)
            if is_call(node, *NORMS):
                norms.add(slot.node)
                weights[slot.node] = own_gain(editor, node)
            else:
                weights[slot.node] = slot.weight
            if slot.node not in biases and (group.site in shifted or bias_of(node) is not None):
                made |= {slot.node} if bias_of(node) is None else set()
                biases[slot.node] = own_bias(editor, node)
    return Transforms(tuple(groups), shifted, weights, biases, frozenset(norms), frozenset(made))


def drop_idle(program: Program, found: Transforms, by: str) -> None:
    """Remove gains of norms that are one everywhere, and the biases made for shifts that are zero everywhere."""
    editor = Editor(program, by)
    for name in found.norms:
        if bool((program.params.get(found.weights[name]) == 1).all()):
            drop_gain(editor, program.node(name))
    for name in found.made:
        if not bool(program.params.get(found.biases[name]).any()):
            drop_bias(editor, program.node(name))
    editor.sweep()
