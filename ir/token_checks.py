"""What the operators that round values token by token demand of the types around them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ir.op_checks import Site, same_dims
from ir.ops.tokens import row_bytes


def _bits(site: Site) -> Iterator[str]:
    if site.args["bits"] not in range(2, 9):
        yield f"bits must be 2 to 8, but they are {site.args['bits']}"


def encode_tokens(site: Site) -> Iterator[str]:
    """x [..., K] -> u8 [..., bytes of a row]."""
    yield from _bits(site)
    x, out = site.tensor("x"), site.out
    if x is None or out is None or list(_bits(site)):
        return
    if not x.dtype.is_floating_point:
        yield f"x must be floating point, but it is {x}"
    if not x.dims or not isinstance(x.dims[-1], int):
        yield f"the last dim of x must be a number, but x is {x}"
        return
    yield from same_dims("the result's dims", out.dims, (*x.dims[:-1], row_bytes(x.dims[-1], site.args["bits"])))
    if out.dtype != torch.uint8:
        yield f"the result must be u8, but it is {out}"


def decode_tokens(site: Site) -> Iterator[str]:
    """u8 [..., bytes of a row] -> [..., width] of the dtype asked for."""
    yield from _bits(site)
    rows, out, width = site.tensor("rows"), site.out, site.args["width"]
    if rows is None or out is None or list(_bits(site)):
        return
    if not isinstance(width, int) or width < 1:
        yield f"width must be a positive number, but it is {width}"
        return
    if rows.dtype != torch.uint8:
        yield f"rows must be u8, but they are {rows}"
    yield from same_dims("the dims of rows", rows.dims, (*rows.dims[:-1], row_bytes(width, site.args["bits"])))
    yield from same_dims("the result's dims", out.dims, (*rows.dims[:-1], width))
    if out.dtype != site.args["dtype"] or not out.dtype.is_floating_point:
        yield f"the result must be of the floating dtype {site.args['dtype']}, but it is {out}"
