"""What `nomul.hadamard` demands of the types around it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ir.op_checks import Site, same_dims
from ir.ops.hadamard import block_order
from ir.ops.packing import packed_length


def hadamard(site: Site) -> Iterator[str]:
    """x [..., K] with K a multiple of a Hadamard order, signs u8 [ceil(K/8)] -> like x."""
    x, signs, order = site.tensor("x"), site.tensor("signs"), site.args["order"]
    if x is None:
        return
    if not x.dtype.is_floating_point:
        yield f"x must be floating point, but it is {x}"
    if not isinstance(order, int) or order < 1 or block_order(order) != order:
        yield f"order must be one of a known Hadamard matrix, but it is {order}"
        return
    if not x.dims or not isinstance(x.dims[-1], int):
        yield f"the last dim of x must be a number, but x is {x}"
        return
    if x.dims[-1] % order:
        yield f"order must divide the {x.dims[-1]} channels of x, but it is {order}"
    if signs is not None:
        if signs.dtype != torch.uint8:
            yield f"signs must be u8, but they are {signs}"
        yield from same_dims("the dims of signs", signs.dims, (packed_length(x.dims[-1], 1),))
    if site.out is not None:
        yield from same_dims("the result's dims", site.out.dims, x.dims)
        if site.out.dtype != x.dtype:
            yield f"the result must have the input's dtype, but it is {site.out} and the input {x}"
