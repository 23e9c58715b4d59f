"""`nomul::tiled_linear`: the kernels as an operator of eager torch, and programs that call it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from backends.native.layout import Layout, Packed, pack, refuses
from backends.native.library import DEFAULT_MODE, MODES, load
from ir.decode import Codes, arguments, codes_of, is_coded
from ir.edit import Editor
from ir.errors import UnsupportedError, UsageError
from ir.ops.nested import NestedCodes
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import SparseCodes
from ir.program import Program, tensor_type_of
from ir.rewrite import No

# Weights times tokens below which starting threads takes longer than they save, as in ONNX Runtime.
_SMALL = 1 << 18
_ROWS = 5


@torch.library.custom_op("nomul::tiled_linear", mutates_args=(), device_types="cpu")
def tiled_linear(x: Tensor, tiles: Tensor, bias: Tensor | None, layout: list[int], mode: str) -> Tensor:
    """Return x W^T + bias by the kernels, float32 [..., N]; there is no gradient.

    x: float32 [..., K]; tiles: uint8, W in tile order; bias: float32 [N]; layout: the fields of
    `backends.native.layout.Layout`, in order; mode: one of `backends.native.library.MODES`. Raises UsageError or
    UnsupportedError for what does not fit.
    """
    weight = Packed(tiles, Layout(*layout))
    large = x.numel() * layout[_ROWS] >= _SMALL
    return load().linear(x, weight, bias, mode, torch.get_num_threads() if large else 1)


@tiled_linear.register_fake
def _(x: Tensor, tiles: Tensor, bias: Tensor | None, layout: list[int], mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], layout[_ROWS])


def with_kernels(program: Program, mode: str = DEFAULT_MODE) -> Program:
    """Return a copy of a program whose compressed linears are `nomul::tiled_linear`; other calls stay as they are.

    mode: how kernels take activations, one of `backends.native.library.MODES`. Raises UsageError for another mode,
    UnsupportedError that names the first linear without a kernel.
    """
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode}", where="mode", fix=f"use one of {', '.join(MODES)}")
    copy = program.clone()
    editor = Editor(copy, "kernels")
    for node in [n for n in copy.graph.nodes if is_coded(n)]:
        if (no := lacks_kernel(copy, node)) is not None:
            raise UnsupportedError("there is no kernel for a linear", where=node.name, why=no.reason)
        codes, values = _stored(copy, node), arguments(node)
        assert not isinstance(codes, SparseCodes)
        packed = pack(codes)
        editor.before(node)
        tiles = editor.param(editor.fresh(f"{node.name}.tiles"), packed.data)
        fields = list(packed.layout.attributes().values())
        call = editor.call(torch.ops.nomul.tiled_linear, values["x"], tiles, values["bias"], fields, mode, like=node)
        editor.replace(node, call, keep_name=True)
        editor.sweep()
    return copy


def lacks_kernel(program: Program, node: fx.Node) -> No | None:
    """Return why there is no kernel for a compressed linear, or None when there is one."""
    kind = tensor_type_of(arguments(node)["x"])
    if kind.dtype != torch.float32:
        return No(f"the kernels take float32 activations, and these are {kind.dtype}", node)
    codes = _stored(program, node)
    if isinstance(codes, SparseCodes):
        return No("there is no kernel for weights of a sparse pattern yet", node)
    no = refuses(codes)
    return None if no is None else No(no.reason, node)


def _stored(program: Program, node: fx.Node) -> ShiftCodes | QuantCodes | SparseCodes:
    codes: Codes = codes_of(node, program.params.get)
    return codes.at(arguments(node)["precision"]) if isinstance(codes, NestedCodes) else codes
