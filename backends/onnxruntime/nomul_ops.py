"""nomul's operators in ONNX: compressed linears in the kernels' tile order, and rotations by additions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from backends.native.layout import layout_of, pack, refuses
from backends.native.library import MODES
from backends.onnxruntime.coded import NAME as CODED
from backends.onnxruntime.coded import coded_function, coding_of
from backends.onnxruntime.contrib import add_contrib, refuses_contrib
from backends.onnxruntime.emitter import Emitter, Entry, Refused, Result
from backends.onnxruntime.twins import (
    DOMAIN,
    VERSION,
    linear_function,
    linear_overload,
    rotation_function,
    rotation_overload,
)
from ir.ops.hadamard import hadamard_factors
from ir.ops.nested import NestedCodes
from ir.ops.packing import unpack_bits
from ir.ops.quant import QuantCodes
from ir.ops.shiftcode import ShiftCodes
from ir.program import tensor_type_of

# Gives the tensor of an argument of a call.
Reader = Callable[[Any], Any]
nomul = torch.ops.nomul


def _shift_codes(args: Sequence[Any], read: Reader) -> ShiftCodes:
    x, signs, scales, exponents, offsets, _, group, terms, row_group, code = args
    parts = read(signs), read(scales), read(exponents), read(offsets)
    return ShiftCodes(*parts, group, terms, _inputs(x), row_group, code)


def _nested_codes(args: Sequence[Any], read: Reader) -> ShiftCodes:
    x, signs, scales, exponents, offsets, _, group, terms, row_group, precisions, precision = args
    parts = [tuple(map(read, several)) for several in (scales, exponents, offsets)]
    codes = NestedCodes(
        read(signs), parts[0], parts[1], parts[2], group, terms, _inputs(x), row_group, tuple(precisions)
    )
    return codes.at(precision)


def _quant_codes(args: Sequence[Any], read: Reader) -> QuantCodes:
    x, codes, scales, zeros, _, bits, group = args
    return QuantCodes(read(codes), read(scales), read(zeros), bits, group, _inputs(x))


# A linear's weight of the arguments of its call, whose tensors a function gives; the second one names the weight.
_CODES: dict[Any, Callable[[Sequence[Any], Reader], ShiftCodes | QuantCodes]] = {
    nomul.shiftadd_linear.default: _shift_codes,
    nomul.nested_linear.default: _nested_codes,
    nomul.quant_linear.default: _quant_codes,
}


def _linear(e: Emitter, node: fx.Node) -> Result:
    args = e.args(node)
    _require_floats(args[0])
    codes = _CODES[node.target](args, partial(_present, e))
    if isinstance(codes, ShiftCodes):
        if (no := refuses(codes)) is None:
            return _tiled(e, codes, args[0], args[1], args[5])
        e.detour("standard operators", no.reason)
        return _by_standard_operators(e, codes, args[0], args[1], args[5])
    if e.uniform == "contrib":
        if (no := refuses_contrib(codes)) is None:
            return add_contrib(e, codes, e.value(args[0]), e.program.params.resolve(str(args[1].target)), args[4])
        e.detour("the kernel of nomul", no.reason)
    return _tiled(e, codes, args[0], args[1], args[4])


def _require_floats(x: fx.Node) -> None:
    if tensor_type_of(x).dtype != torch.float32:
        raise Refused(f"the kernels take float32 activations, and these are {tensor_type_of(x).dtype}")


def _tiled(e: Emitter, codes: ShiftCodes | QuantCodes, x: fx.Node, stored: fx.Node, bias: fx.Node | None) -> Result:
    """Return x W^T + bias by a kernel that reads W in tile order."""
    layout = layout_of(codes)
    e.domain(DOMAIN, VERSION)
    name, shape = f"{e.program.params.resolve(str(stored.target))}.tiles", (layout.tiles, layout.tile_bytes)
    weight = e.initializer(name, shape, torch.uint8, lambda: pack(codes).data.view(shape))
    inputs = [e.value(x), weight, None if bias is None else e.value(bias)]
    overload = linear_overload(layout, bias is not None)
    if not e.has_function(DOMAIN, "TiledLinear", overload):
        e.function(linear_function(layout, bias is not None, e.opset))
    return e.add("TiledLinear", *inputs, domain=DOMAIN, overload=overload, mode=MODES[e.mode], **layout.attributes())


def _by_standard_operators(e: Emitter, codes: ShiftCodes, x: fx.Node, stored: fx.Node, bias: fx.Node | None) -> Result:
    """Return x W^T + bias by a function that reads W as it is stored."""
    e.domain(DOMAIN, VERSION)
    coding, name = coding_of(codes), f"{e.program.params.resolve(str(stored.target))}.{codes.planes}"
    inputs = [e.value(x)]
    for part, tensor in codes.tensors().items():
        inputs.append(e.initializer(f"{name}.{part}", tuple(tensor.shape), tensor.dtype, partial(_itself, tensor)))
    if bias is not None:
        inputs.append(e.value(bias))
    overload = coding.overload(bias is not None)
    if not e.has_function(DOMAIN, CODED, overload):
        e.function(coded_function(coding, bias is not None, e.opset))
    return e.add(CODED, *inputs, domain=DOMAIN, overload=overload)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _hadamard(e: Emitter, node: fx.Node) -> Result:
    x, signs, order, transposed = e.args(node)
    _require_floats(x)
    e.domain(DOMAIN, VERSION)
    diagonal = unpack_bits(_present(e, signs), 1, _inputs(x)).float() * 2 - 1
    factors = [(f if transposed else f.T).float().contiguous() for f in hadamard_factors(order)]
    constants = [e.constant(t) for t in (diagonal, *factors)]
    sizes = tuple(f.shape[0] for f in factors)
    overload = rotation_overload(_inputs(x), sizes, transposed)
    if not e.has_function(DOMAIN, "Hadamard", overload):
        e.function(rotation_function(_inputs(x), sizes, transposed, e.opset))
    return e.add("Hadamard", e.value(x), *constants, domain=DOMAIN, overload=overload, transposed=int(transposed))


def _inputs(x: fx.Node) -> int:
    return int(tensor_type_of(x).dims[-1])


def _present(e: Emitter, arg: Any) -> Any:
    """Return the tensor of an argument, None for one that is left out."""
    found = None if arg is None else e.tensor(arg)
    if found is None and arg is not None:
        raise Refused("its codes are computed, and kernels take constants")
    return found


TABLE: dict[Any, Entry] = {**dict.fromkeys(_CODES, _linear), nomul.hadamard.default: _hadamard}
