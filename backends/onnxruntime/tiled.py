"""Compressed linears as `nomul::TiledLinear`: what a call's weight is, and the operator on it in tile order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from backends.native.layout import Layout, layout_of, pack
from backends.native.library import MODES
from backends.onnxruntime.emitter import Emitter, Refused
from backends.onnxruntime.twins import DOMAIN, VERSION, linear_function, linear_overload
from ir.ops.nested import NestedCodes
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.program import tensor_type_of

# Gives the tensor of an argument of a call.
Reader = Callable[[Any], Any]
nomul = torch.ops.nomul


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a linear: their codes, the argument that names where these are stored, and the bias, if there is one."""

    codes: ShiftCodes | QuantCodes
    stored: fx.Node
    bias: fx.Node | None


def _shift_codes(args: Sequence[Any], read: Reader) -> ShiftCodes:
    x, signs, scales, exponents, offsets, _, group, terms, row_group, code = args
    parts = read(signs), read(scales), read(exponents), read(offsets)
    return ShiftCodes(*parts, group, terms, inputs_of(x), row_group, code)


def _nested_codes(args: Sequence[Any], read: Reader) -> ShiftCodes:
    x, signs, scales, exponents, offsets, _, group, terms, row_group, precisions, precision = args
    parts = [tuple(map(read, several)) for several in (scales, exponents, offsets)]
    codes = NestedCodes(
        read(signs), parts[0], parts[1], parts[2], group, terms, inputs_of(x), row_group, tuple(precisions)
    )
    return codes.at(precision)


def _quant_codes(args: Sequence[Any], read: Reader) -> QuantCodes:
    x, codes, scales, zeros, _, bits, group = args
    return QuantCodes(read(codes), read(scales), read(zeros), bits, group, inputs_of(x))


_CODES: dict[Any, Callable[[Sequence[Any], Reader], ShiftCodes | QuantCodes]] = {
    nomul.shiftadd_linear.default: _shift_codes,
    nomul.nested_linear.default: _nested_codes,
    nomul.quant_linear.default: _quant_codes,
}
CODED_CALLS = tuple(_CODES)


def codes_of(target: Any, args: Sequence[Any], read: Reader) -> ShiftCodes | QuantCodes:
    """Return the weight of a call of one of `CODED_CALLS`, of the tensors that `read` gives for its arguments."""
    return _CODES[target](args, read)


def bias_of(target: Any, args: Sequence[Any]) -> fx.Node | None:
    """Return the bias of a call of one of `CODED_CALLS`."""
    found: fx.Node | None = args[4 if target is nomul.quant_linear.default else 5]
    return found


def inputs_of(x: fx.Node) -> int:
    """Return the number of channels of a value."""
    return int(tensor_type_of(x).dims[-1])


def constant_of(e: Emitter, arg: fx.Node | None) -> Tensor | None:
    """Return the tensor of an argument, None for one that is left out; raises Refused for one that is computed."""
    found = None if arg is None else e.tensor(arg)
    if found is None and arg is not None:
        raise Refused("its codes are computed, and kernels take constants")
    return found


def require_floats(x: fx.Node) -> None:
    """Raise Refused where activations are not of float32."""
    if tensor_type_of(x).dtype != torch.float32:
        raise Refused(f"the kernels take float32 activations, and these are {tensor_type_of(x).dtype}")


def add_tiled(e: Emitter, x: fx.Node, parts: Sequence[Part]) -> Any:
    """Return x W^T + bias by a kernel that reads W in tile order, for several parts the tuple of their results.

    The rows of the parts follow each other in W; their layouts differ in rows only, which fill whole tiles.
    """
    layouts = [layout_of(part.codes) for part in parts]
    layout = replace(layouts[0], rows=sum(one.rows for one in layouts))
    e.domain(DOMAIN, VERSION)
    names = [e.program.params.resolve(str(part.stored.target)) for part in parts]
    shape = layout.tiles, layout.tile_bytes
    weight = e.initializer(f"{'+'.join(names)}.tiles", shape, torch.uint8, lambda: _packed(parts, layout))
    biases = [part.bias for part in parts if part.bias is not None]
    inputs = [e.value(x), weight, _bias(e, biases)]
    rows = [one.rows for one in layouts]
    overload = linear_overload(layout, bool(biases), rows)
    if not e.has_function(DOMAIN, "TiledLinear", overload):
        e.function(linear_function(layout, bool(biases), e.opset, rows))
    attributes = {"mode": MODES[e.mode], "parts": rows if len(rows) > 1 else None, **layout.attributes()}
    return e.add("TiledLinear", *inputs, domain=DOMAIN, overload=overload, outputs=len(rows), **attributes)


def _packed(parts: Sequence[Part], layout: Layout) -> Tensor:
    return torch.cat([pack(part.codes).data for part in parts]).view(layout.tiles, layout.tile_bytes)


def _bias(e: Emitter, biases: Sequence[fx.Node]) -> Any:
    if len(biases) > 1:
        return e.add("Concat", *[e.value(bias) for bias in biases], axis=0)
    return e.value(biases[0]) if biases else None
