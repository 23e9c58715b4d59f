"""Writing the folded weights: the factors of all groups are gathered first, so that every weight is rounded once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ir.edit import Editor
from ir.program import TYPE, Program
from ir.types import TensorType
from passes.equiv.constants import constant_value
from passes.equiv.groups import EquivGroup, Slot
from passes.equiv.producers import bias_of, gain_of
from passes.equiv.transfer import expand, fold_cols, fold_norm, fold_rows


@dataclass
class Factors:
    """What every weight is to be scaled by, in float64, by node name.

    rows: divisors of a linear's outputs; cols: multipliers of its inputs; gains: divisors of a norm's output.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    cols: dict[str, Tensor] = field(default_factory=dict)
    gains: dict[str, Tensor] = field(default_factory=dict)

    def add(self, group: EquivGroup, s: Tensor) -> None:
        """Take in the scales of one group; s: f64[size]."""
        for slot in group.slots:
            self._add(slot, expand(slot.tie, s))

    def _add(self, slot: Slot, s: Tensor) -> None:
        table = getattr(self, slot.axis if slot.axis != "gain" else "gains")
        divides = slot.axis != "cols"
        factor = s if divides == (slot.power < 0) else 1 / s
        table[slot.node] = table[slot.node] * factor if slot.node in table else factor


def apply(program: Program, factors: Factors, by: str) -> int:
    """Scale the weights of a program; return how many linears and norms changed. Factors of one write nothing."""
    editor, changed = Editor(program, by), 0
    for node in list(program.graph.nodes):
        rows, cols, gain = (table.get(node.name) for table in (factors.rows, factors.cols, factors.gains))
        rows, cols, gain = (None if f is None or bool((f == 1).all()) else f for f in (rows, cols, gain))
        if rows is not None or cols is not None:
            _scale_linear(editor, node, rows, cols)
            changed += 1
        if gain is not None:
            _scale_norm(editor, node, gain)
            changed += 1
    return changed


def _scale_linear(editor: Editor, node: fx.Node, rows: Tensor | None, cols: Tensor | None) -> None:
    weight, bias = node.args[1], bias_of(node)
    assert isinstance(weight, fx.Node)
    editor.param(str(weight.target), _scaled_weight(editor.program.value(weight), rows, cols))
    if rows is not None and bias is not None:
        tensor = editor.program.value(bias)
        write_operand(editor, node, bias, (tensor.double() / rows).to(tensor.dtype))


def _scaled_weight(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """Return a weight scaled in float64 and rounded once, one expert at a time so that memory stays bounded."""
    if weight.dim() > 2:
        return torch.stack([_scaled_weight(part, rows, cols) for part in weight])
    wide = weight.double()
    if rows is not None:
        wide, _ = fold_rows(wide, None, rows)
    if cols is not None:
        wide = fold_cols(wide, cols)
    return wide.to(weight.dtype)


def norm_operands(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    """Return a norm's gain (ones where it has none) and offset in float64."""
    gain, beta = gain_of(node), bias_of(node)
    shape = [int(d) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    value = torch.ones(shape, dtype=torch.float64) if gain is None else constant_value(program, gain)
    return value, None if beta is None else constant_value(program, beta)


def _scale_norm(editor: Editor, node: fx.Node, s: Tensor) -> None:
    gain, beta = norm_operands(editor.program, node)
    new_gain, new_beta = fold_norm(gain, beta, s.view(gain.shape))
    if beta is not None and new_beta is not None:
        operand = bias_of(node)
        assert operand is not None
        write_operand(editor, node, operand, new_beta.to(_dtype(operand)))
    if bool((new_gain == 1).all()):
        drop_gain(editor, node)
        return
    operand = gain_of(node)
    if operand is not None:
        write_operand(editor, node, operand, new_gain.to(_dtype(operand)))
        return
    name = editor.fresh(f"{node.meta.get('path') or node.name}.gain")
    _set_gain(editor, node, editor.param(name, new_gain.to(_dtype(node))))


def drop_gain(editor: Editor, node: fx.Node) -> None:
    """Remove the gain operand of a norm, which is then one everywhere."""
    _set_gain(editor, node, None)


def _set_gain(editor: Editor, node: fx.Node, gain: fx.Node | None) -> None:
    kwargs = {k: v for k, v in node.kwargs.items() if k != "weight"}
    editor.set_args(node, (*node.args[:2], gain, *node.args[3:]), kwargs)


def write_operand(editor: Editor, reader: fx.Node, operand: fx.Node, tensor: Tensor) -> None:
    """Give one reader a new value of an operand: in place when it is a parameter of its own, else as a new one."""
    own = operand.op == "get_attr"
    readers = [u for n in editor.program.param_nodes() if own and n.target == operand.target for u in n.users]
    if own and readers == [reader]:
        editor.param(str(operand.target), tensor)
        return
    stem = str(operand.target) if own else f"{reader.meta.get('path') or reader.name}.gain"
    new = editor.param(editor.fresh(stem), tensor)
    reader.replace_input_with(operand, new)


def _dtype(node: fx.Node) -> torch.dtype:
    kind = node.meta[TYPE]
    assert isinstance(kind, TensorType)
    return kind.dtype
