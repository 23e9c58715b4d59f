"""Gains, offsets and biases of norms and linears as parameters of their own: read, written, made and dropped."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ir.edit import Editor
from ir.program import Program, is_call, tensor_type_of
from passes.equiv.constants import constant_value
from passes.equiv.producers import bias_of, gain_of
from passes.equiv.rules import offset_after

aten = torch.ops.aten


def norm_operands(program: Program, node: fx.Node) -> tuple[Tensor, Tensor | None]:
    """Return a norm's gain (ones where it has none) and offset in float64."""
    gain, beta = gain_of(node), bias_of(node)
    shape = [int(d) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    value = torch.ones(shape, dtype=torch.float64) if gain is None else constant_value(program, gain)
    return value, None if beta is None else constant_value(program, beta)


def own_gain(editor: Editor, node: fx.Node) -> str:
    """Give a norm a gain parameter that nothing else reads, ones where it had none, and return its name."""
    operand, value = gain_of(node), norm_operands(editor.program, node)[0]
    if operand is not None and _is_own(editor.program, node, operand):
        return str(operand.target)
    name = editor.fresh(f"{node.meta.get('path') or node.name}.gain")
    set_gain(editor, node, editor.param(name, value.to(tensor_type_of(node).dtype)))
    return name


def own_bias(editor: Editor, node: fx.Node) -> str:
    """Give a linear or layer norm a bias parameter that nothing else reads, zeros where it had none; return its name.

    The bias of an RMS norm is an addition behind it, and read by all that read the norm.
    """
    operand = bias_of(node)
    if operand is not None and _is_own(editor.program, node, operand):
        return str(operand.target)
    kind, name = tensor_type_of(node), editor.fresh(f"{node.meta.get('path') or node.name}.bias")
    if operand is not None:
        value = constant_value(editor.program, operand).to(kind.dtype)
    else:
        value = torch.zeros(int(kind.dims[-1]), dtype=kind.dtype)
    made = editor.param(name, value)
    if is_call(node, aten.rms_norm):
        _add_after(editor, node, made)
    else:
        _set_bias(editor, node, made)
    return name


def write_operand(editor: Editor, reader: fx.Node, operand: fx.Node, tensor: Tensor) -> None:
    """Give one reader a new value of an operand: in place when it is a parameter of its own, else as a new one."""
    if _is_own(editor.program, reader, operand):
        editor.param(str(operand.target), tensor)
        return
    stem = str(operand.target) if operand.op == "get_attr" else f"{reader.meta.get('path') or reader.name}.gain"
    new = editor.param(editor.fresh(stem), tensor)
    reader.replace_input_with(operand, new)


def drop_gain(editor: Editor, node: fx.Node) -> None:
    """Remove the gain operand of a norm, which is then one everywhere."""
    set_gain(editor, node, None)


def set_gain(editor: Editor, node: fx.Node, gain: fx.Node | None) -> None:
    """Give a norm another gain operand, or none."""
    kwargs = {k: v for k, v in node.kwargs.items() if k != "weight"}
    editor.set_args(node, (*node.args[:2], gain, *node.args[3:]), kwargs)


def _set_bias(editor: Editor, node: fx.Node, bias: fx.Node) -> None:
    place = 2 if is_call(node, aten.linear) else 3
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    head = node.args[:place] if len(node.args) >= place else (*node.args, gain_of(node))
    editor.set_args(node, (*head, bias, *node.args[place + 1 :]), kwargs)


def drop_bias(editor: Editor, node: fx.Node) -> None:
    """Remove the bias of a linear or the offset behind an RMS norm, which is then zero everywhere."""
    added = offset_after(node)
    if added is not None:
        added.replace_all_uses_with(node, propagate_meta=False)
        editor.erase(added)
    elif is_call(node, aten.linear):
        kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
        editor.set_args(node, node.args[:2], kwargs)


def _add_after(editor: Editor, node: fx.Node, bias: fx.Node) -> None:
    added = editor.before(node.next).call(aten.add, node, bias, like=node, name=f"{node.name}_offset")
    node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added, propagate_meta=False)


def _is_own(program: Program, reader: fx.Node, operand: fx.Node) -> bool:
    """Return whether an operand is a parameter that only this reader reads."""
    if operand.op != "get_attr":
        return False
    readers = [u for n in program.param_nodes() if n.target == operand.target for u in n.users]
    return readers in ([reader], [offset_after(reader)])
