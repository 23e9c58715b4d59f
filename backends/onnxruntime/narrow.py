"""Weights that are 16-bit floats, or codes of 8 bits, in truth are stored as such: fewer bytes, and no value differs.

Published weights mostly are bfloat16 or float16 and only held as float32; tables of GGUF files often are 8-bit codes
with a float16 scale for every 32 inputs. A kernel multiplies with them as they are stored; its twin, and the look-up of
embeddings, widen them first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from backends.native.library import BLOCK, MODES
from backends.onnxruntime.bodies import Body
from backends.onnxruntime.emitter import Emitter
from backends.onnxruntime.twins import DOMAIN, VERSION
from ir.program import tensor_type_of

_FLOATS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MOST = 127
# Weights below this are read so quickly that a call of a kernel takes as long.
_LEAST = 1 << 16
# Values that are looked at together, so that no copy of a whole weight is made.
_PIECE = 1 << 22


@dataclass(frozen=True, eq=False)
class Narrow:
    """A weight [..., K] as initializers: 16-bit floats, or int8 codes with scales float16 [..., K / 32]."""

    values: Any
    scales: Any | None = None


def narrow_weight(e: Emitter, weight: fx.Node) -> Narrow | None:
    """Return a large float32 weight as what it consists of, None if that is nothing narrower."""
    if not e.narrow or weight.op != "get_attr" or tensor_type_of(weight).dtype != torch.float32:
        return None
    name = e.program.params.resolve(str(weight.target))
    dims = [int(d) for d in e.program.params.type_of(name).dims]
    if torch.Size(dims).numel() < _LEAST or (dtype := _dtype_of(e, name)) is None:
        return None

    def load() -> Tensor:
        return e.program.params.get(name).detach()

    if dtype != torch.int8:
        return Narrow(e.initializer(f"{name}.{_FLOATS[dtype]}", dims, dtype, lambda: load().to(dtype)))
    codes = e.initializer(f"{name}.codes", dims, torch.int8, lambda: codes_of(load()))
    blocks = [*dims[:-1], dims[-1] // BLOCK]
    return Narrow(codes, e.initializer(f"{name}.scales", blocks, torch.float16, lambda: scales_of(load()).half()))


def narrow_rows(e: Emitter, weight: fx.Node, ids: Any) -> Any | None:
    """Return the rows of a weight [rows, K] that ids choose, as float32; None where it is stored as float32."""
    if (stored := narrow_weight(e, weight)) is None:
        return None
    rows = e.cast(e.add("Gather", stored.values, ids, axis=0), torch.float32)
    if stored.scales is None:
        return rows
    scales = e.cast(e.add("Gather", stored.scales, ids, axis=0), torch.float32)
    return _scaled(e, rows, scales)


def narrow_product(e: Emitter, value: Any, weight: fx.Node, bias: Any | None) -> Any | None:
    """Return value W^T + bias by the kernel for stored weights, None where the weight is stored as float32."""
    if not e.fuse or len(tensor_type_of(weight).dims) != 2 or (stored := narrow_weight(e, weight)) is None:
        return None
    e.domain(DOMAIN, VERSION)
    coded = stored.scales is not None
    overload = f"{'codes' if coded else 'floats'}{'' if bias is None else '_bias'}"
    if not e.has_function(DOMAIN, "DenseLinear", overload):
        e.function(_function(overload, coded, bias is not None, e.opset))
    inputs = value, stored.values, stored.scales, bias
    return e.add("DenseLinear", *inputs, domain=DOMAIN, overload=overload, mode=MODES[e.mode])


def scales_of(weight: Tensor) -> Tensor:
    """Return what the scales [..., K / 32] of codes up to 127 would be, for a weight [..., K]."""
    largest: Tensor = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    return largest / _MOST


def codes_of(weight: Tensor) -> Tensor:
    """Return the int8 codes [..., K] of a weight of which `consists_of_codes` holds."""
    scales = scales_of(weight).unsqueeze(-1)
    codes = torch.where(scales > 0, weight.unflatten(-1, (-1, BLOCK)) / scales, 0.0)
    return codes.round().to(torch.int8).flatten(-2)


def consists_of_codes(weight: Tensor) -> bool:
    """Return whether every value of a weight [rows, K] is one of 255 multiples of a float16 that 32 inputs share."""
    if weight.shape[-1] % BLOCK:
        return False
    for piece in weight.split(max(1, _PIECE // weight.shape[-1])):
        scales = scales_of(piece)
        again = codes_of(piece).float().unflatten(-1, (-1, BLOCK)) * scales.unsqueeze(-1)
        if not torch.equal(scales.half().float(), scales) or not torch.equal(again.flatten(-2), piece):
            return False
    return True


def _dtype_of(e: Emitter, name: str) -> torch.dtype | None:
    """Return what every value of a weight is one of, int8 for codes, found out once a name."""
    if name not in e.narrow_dtypes:
        weight = e.program.params.get(name).detach()
        found = next((dtype for dtype in _FLOATS if _consists_of(weight, dtype)), None)
        e.narrow_dtypes[name] = torch.int8 if weight.ndim == 2 and consists_of_codes(weight) else found
    return e.narrow_dtypes[name]


def _consists_of(weight: Tensor, dtype: torch.dtype) -> bool:
    return all(torch.equal(piece.to(dtype).to(piece.dtype), piece) for piece in _pieces(weight))


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.reshape(-1).split(_PIECE)


def _scaled(b: Emitter | Body, codes: Any, scales: Any) -> Any:
    """Return float codes [..., K] times scales [..., K / 32]; some dims may be known only when it runs."""
    apart = b.add("Reshape", codes, b.add("Concat", b.add("Shape", scales), b.vector([BLOCK]), axis=0))
    found = b.add("Mul", apart, b.add("Unsqueeze", scales, [-1]))
    return b.add("Reshape", found, b.add("Shape", codes))


def _function(overload: str, coded: bool, bias: bool, opset: int) -> Any:
    """Return the twin of `nomul::DenseLinear`: x [..., inputs], weight [rows, inputs] as stored, bias [rows]."""
    b = Body(opset)
    x, weight, scales = b.input("x"), b.cast(b.input("weight"), torch.float32), b.input("scales")
    given = b.input("bias") if bias else None
    if coded:
        weight = _scaled(b, weight, b.cast(scales, torch.float32))
    y = b.add("MatMul", x, b.add("Transpose", weight, perm=[1, 0]))
    y = y if given is None else b.add("Add", y, given)
    doc = "x W^T + bias with W as it is stored, by standard operators; activations stay float in every mode."
    return b.function(DOMAIN, "DenseLinear", overload, y, ("mode",), doc)
