"""nomul's operators in ONNX: compressed linears in the kernels' tile order, and rotations by additions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from backends.native.layout import refuses
from backends.onnxruntime.coded import NAME as CODED
from backends.onnxruntime.coded import coded_function, coding_of
from backends.onnxruntime.contrib import add_contrib, refuses_contrib
from backends.onnxruntime.emitter import Emitter, Entry, Result
from backends.onnxruntime.siblings import siblings
from backends.onnxruntime.tiled import (
    CODED_CALLS,
    Part,
    add_tiled,
    bias_of,
    codes_of,
    constant_of,
    inputs_of,
    require_floats,
)
from backends.onnxruntime.twins import DOMAIN, VERSION, rotation_function, rotation_overload
from ir.ops.hadamard import hadamard_factors
from ir.ops.packing import unpack_bits
from ir.ops.shiftcode import ShiftCodes

nomul = torch.ops.nomul


def _linear(e: Emitter, node: fx.Node) -> Result:
    args = e.args(node)
    require_floats(args[0])
    codes, bias = codes_of(node.target, args, partial(constant_of, e)), bias_of(node.target, args)
    if isinstance(codes, ShiftCodes):
        if (no := refuses(codes)) is None:
            return add_tiled(e, args[0], [Part(codes, args[1], bias)])
        e.detour("standard operators", no.reason)
        return _by_standard_operators(e, codes, args[0], args[1], bias)
    if e.uniform == "contrib":
        if (no := refuses_contrib(codes)) is None:
            return add_contrib(e, codes, e.value(args[0]), e.program.params.resolve(str(args[1].target)), bias)
        e.detour("the kernel of nomul", no.reason)
    return add_tiled(e, args[0], [Part(codes, args[1], bias)])


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


# Channels that a kernel turns at once: what of a factor is larger takes more additions and saves none.
_VECTOR = 16


def _hadamard(e: Emitter, node: fx.Node) -> Result:
    x, signs, order, transposed = e.args(node)
    require_floats(x)
    e.domain(DOMAIN, VERSION)
    packed = constant_of(e, signs)
    assert packed is not None
    diagonal = unpack_bits(packed, 1, inputs_of(x)).float() * 2 - 1
    factors = [(f if transposed else f.T).float().contiguous() for f in hadamard_factors(order, _VECTOR)]
    constants = [e.constant(t) for t in (diagonal, *factors)]
    sizes = tuple(f.shape[0] for f in factors)
    overload = rotation_overload(inputs_of(x), sizes, transposed)
    if not e.has_function(DOMAIN, "Hadamard", overload):
        e.function(rotation_function(inputs_of(x), sizes, transposed, e.opset))
    return e.add("Hadamard", e.value(x), *constants, domain=DOMAIN, overload=overload, transposed=int(transposed))


TABLE: dict[Any, Entry] = {**dict.fromkeys(CODED_CALLS, _linear), nomul.hadamard.default: _hadamard}
GROUPS = (siblings,)
