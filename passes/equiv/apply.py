"""Writing the folded weights: the factors of all groups are gathered first, so that every weight is rounded once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ir.edit import Editor
from ir.program import Program, tensor_type_of
from passes.equiv.groups import EquivGroup, Slot
from passes.equiv.operands import drop_gain, norm_operands, own_bias, set_gain, write_operand
from passes.equiv.producers import bias_of, gain_of
from passes.equiv.transfer import expand, fold_linear, fold_norm, scale_weight


@dataclass
class Factors:
    """What every weight is to be changed by, by node name; tensors with gradients stay differentiable.

    rows: divisors of a linear's outputs; cols: multipliers of its inputs; gains: divisors of a norm's output; into:
    what was taken from a linear's inputs before they were divided; out: what is to be taken from the outputs of a
    linear or norm before they are.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    cols: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)
    into: dict[str, Tensor] = field(default_factory=dict)
    out: dict[str, Tensor] = field(default_factory=dict)

    def add(self, group: EquivGroup, s: Tensor, shift: Tensor | None = None) -> None:
        """Take in the scales of one group, and its shift where it has one; both [size]."""
        for slot in group.slots:
            self._scale(slot, expand(slot.tie, s))
            if shift is not None:
                table, moved = self.into if slot.axis == "cols" else self.out, expand(slot.tie, shift, 0.0)
                table[slot.node] = table[slot.node] + moved if slot.node in table else moved

    def _scale(self, slot: Slot, s: Tensor) -> None:
        table = getattr(self, slot.axis if slot.axis != "gain" else "gains")
        divides = slot.axis != "cols"
        factor = s if divides == (slot.power < 0) else 1 / s
        table[slot.node] = table[slot.node] * factor if slot.node in table else factor


def apply(program: Program, factors: Factors, by: str) -> int:
    """Change the weights of a program; return how many linears and norms changed.

    Factors of one and shifts of zero write nothing, and make no bias where there was none.
    """
    editor, changed = Editor(program, by), 0
    for node in list(program.graph.nodes):
        rows, cols, gain = (_unless(t.get(node.name), 1) for t in (factors.rows, factors.cols, factors.gains))
        into, out = (_unless(table.get(node.name), 0) for table in (factors.into, factors.out))
        if node.name in factors.gains and (gain is not None or out is not None):
            _change_norm(editor, node, gain, out)
            changed += 1
        elif any(f is not None for f in (rows, cols, into, out)):
            _change_linear(editor, node, rows, cols, into, out)
            changed += 1
    return changed


def _unless(factor: Tensor | None, nothing: int) -> Tensor | None:
    return None if factor is None or bool((factor == nothing).all()) else factor


def _change_linear(
    editor: Editor, node: fx.Node, rows: Tensor | None, cols: Tensor | None, into: Tensor | None, out: Tensor | None
) -> None:
    if into is not None or out is not None:
        own_bias(editor, node)
    weight, bias = node.args[1], bias_of(node)
    assert isinstance(weight, fx.Node)
    value = editor.program.value(weight)
    if value.dim() > 2:  # one expert at a time, so that memory stays bounded
        new = torch.stack([scale_weight(part.double(), rows, cols).to(value.dtype) for part in value])
        new_bias = None
    else:
        old = None if bias is None else editor.program.value(bias).double()
        wide, new_bias = fold_linear(value.double(), old, rows, cols, into, out)
        new = wide.to(value.dtype)
    if rows is not None or cols is not None:
        editor.param(str(weight.target), new)
    if bias is not None and new_bias is not None and (rows is not None or into is not None or out is not None):
        write_operand(editor, node, bias, new_bias.to(tensor_type_of(bias).dtype))


def _change_norm(editor: Editor, node: fx.Node, s: Tensor | None, shift: Tensor | None) -> None:
    gain, beta = norm_operands(editor.program, node)
    s = torch.ones_like(gain).flatten() if s is None else s
    offset = None if shift is None else own_bias(editor, node)
    if offset is not None and beta is None:
        beta = editor.program.params.get(offset).double()
    new_gain, new_beta = fold_norm(gain, beta, s.view(gain.shape), None if shift is None else shift.view(gain.shape))
    if offset is not None and new_beta is not None:
        editor.param(offset, new_beta.to(editor.program.params.get(offset).dtype))
    elif beta is not None and new_beta is not None:
        operand = bias_of(node)
        assert operand is not None
        write_operand(editor, node, operand, new_beta.to(tensor_type_of(operand).dtype))
    _write_gain(editor, node, new_gain)


def _write_gain(editor: Editor, node: fx.Node, gain: Tensor) -> None:
    if bool((gain == 1).all()):
        drop_gain(editor, node)
        return
    operand = gain_of(node)
    if operand is not None:
        write_operand(editor, node, operand, gain.to(tensor_type_of(operand).dtype))
        return
    name = editor.fresh(f"{node.meta.get('path') or node.name}.gain")
    set_gain(editor, node, editor.param(name, gain.to(tensor_type_of(node).dtype)))
