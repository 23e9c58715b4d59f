"""nomul's operators in ONNX: compressed linears in the kernels' tile order, and rotations by additions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from backends.native.build import built_library
from backends.native.layout import layout_of, pack, refuses
from backends.native.library import MODES
from backends.onnxruntime.coded import NAME as CODED
from backends.onnxruntime.coded import coded_function, coding_of
from backends.onnxruntime.contrib import add_contrib, refuses_contrib
from backends.onnxruntime.emitter import Emitter, Entry, Refused, Result
from backends.onnxruntime.twins import (
    DOMAIN,
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
from ir.program import Program, tensor_type_of

VERSION = 1
nomul = torch.ops.nomul


def library(program: Program) -> Path | None:
    """Return the library with nomul's operators; raises UnsupportedError where it can be neither found nor built."""
    return built_library()


def _shiftadd(e: Emitter, node: fx.Node) -> Result:
    x, signs, scales, exponents, offsets, bias, group, terms, row_group, code = e.args(node)
    stored = _present(e, signs), _present(e, scales), _stored(e, exponents), _stored(e, offsets)
    codes = ShiftCodes(*stored, group, terms, _inputs(x), row_group, code)
    return _tiled(e, node, codes, x, signs, bias)


def _nested(e: Emitter, node: fx.Node) -> Result:
    x, signs, scales, exponents, offsets, bias, group, terms, row_group, precisions, precision = e.args(node)
    parts = _all_present(e, scales), _all_present(e, exponents), _all_present(e, offsets)
    codes = NestedCodes(_present(e, signs), *parts, group, terms, _inputs(x), row_group, tuple(precisions))
    return _tiled(e, node, codes.at(precision), x, signs, bias)


def _quant(e: Emitter, node: fx.Node) -> Result:
    x, codes, scales, zeros, bias, bits, group = e.args(node)
    parts = _present(e, codes), _present(e, scales), _stored(e, zeros)
    weight = QuantCodes(*parts, bits, group, _inputs(x))
    if e.uniform == "contrib":
        no = refuses_contrib(weight)
        if no is None:
            return add_contrib(e, weight, e.value(x), e.program.params.resolve(str(codes.target)), bias)
        e.detour("the kernel of nomul", no.reason)
    return _tiled(e, node, weight, x, codes, bias)


def _tiled(
    e: Emitter, node: fx.Node, codes: ShiftCodes | QuantCodes, x: fx.Node, stored: fx.Node, bias: fx.Node | None
) -> Result:
    """Return x W^T + bias by a kernel that reads W in tile order."""
    if tensor_type_of(x).dtype != torch.float32:
        raise Refused(f"the kernels take float32 activations, and these are {tensor_type_of(x).dtype}")
    if (no := refuses(codes)) is not None:
        assert isinstance(codes, ShiftCodes)
        e.detour("standard operators", no.reason)
        return _by_standard_operators(e, codes, x, stored, bias)
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
    if tensor_type_of(x).dtype != torch.float32:
        raise Refused(f"the kernels take float32 activations, and these are {tensor_type_of(x).dtype}")
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


def _stored(e: Emitter, arg: Any) -> Tensor | None:
    return None if arg is None else _present(e, arg)


def _all_present(e: Emitter, parts: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(_present(e, part) for part in parts)


def _present(e: Emitter, arg: Any) -> Tensor:
    found = e.tensor(arg)
    if found is None:
        raise Refused("its codes are computed, and kernels take constants")
    return found


TABLE: dict[Any, Entry] = {
    nomul.shiftadd_linear.default: _shiftadd,
    nomul.nested_linear.default: _nested,
    nomul.quant_linear.default: _quant,
    nomul.hadamard.default: _hadamard,
}
