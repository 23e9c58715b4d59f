"""What the `nomul` operators demand: code tensors of integer dtype whose shapes fit width, group and bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ir.op_checks import Check, Dims, Site, differ, same_dims
from ir.ops.packing import packed_length
from ir.ops.shiftcode import group_count


def stored(site: Site, name: str, dtype: torch.dtype, dims: Dims | None) -> Iterator[str]:
    """Yield what is wrong with a stored tensor of fixed dtype and dims; an absent optional one is right."""
    kind = site.tensor(name)
    if kind is None:
        return
    if kind.dtype != dtype:
        yield f"{name} must be {dtype}, but it is {kind}"
    yield from same_dims(f"the dims of {name}", kind.dims, dims)


def _positive(site: Site, *names: str) -> Iterator[str]:
    for name in names:
        if not isinstance(site.args[name], int) or site.args[name] < 1:
            yield f"{name} must be a positive number, but it is {site.args[name]}"


def _rows_and_width(site: Site, rows: object) -> tuple[int, int] | None:
    x = site.dims("x")
    if not x or not isinstance(x[-1], int) or not isinstance(rows, int):
        return None
    return rows, x[-1]


def _out(site: Site, rows: int) -> Iterator[str]:
    x, out = site.tensor("x"), site.out
    if x is None or out is None:
        return
    yield from same_dims("the result's dims", out.dims, (*x.dims[:-1], rows))
    if out.dtype != x.dtype:
        yield f"the result must have the input's dtype, but it is {out} and the input {x}"
    yield from same_dims("the bias's dims", site.dims("bias"), (rows,))


def shiftadd_linear(site: Site) -> Iterator[str]:
    """signs u8 [P, N, ceil(K/8)], scales u8 [N, ceil(G P T/2)], exponents i8 [N, 2], offsets u8 [N, ceil(G T/2)]."""
    problems = list(_positive(site, "group", "terms"))
    yield from problems
    signs = site.dims("signs")
    if problems or signs is None:
        return
    if len(signs) != 3:
        yield f"signs must have three dims [planes, rows, bytes], but they are {site.tensor('signs')}"
        return
    sizes = _rows_and_width(site, signs[1])
    if sizes is None or not isinstance(signs[0], int):
        return
    (rows, width), planes = sizes, signs[0]
    pieces = group_count(width, site.args["group"]) * site.args["terms"]
    yield from stored(site, "signs", torch.uint8, (planes, rows, packed_length(width, 1)))
    yield from stored(site, "scales", torch.uint8, (rows, packed_length(pieces * planes, 4)))
    yield from stored(site, "exponents", torch.int8, (rows, 2))
    yield from stored(site, "offsets", torch.uint8, (rows, packed_length(pieces, 4)))
    yield from _out(site, rows)


def quant_linear(site: Site) -> Iterator[str]:
    """codes u8 [N, ceil(K bits/8)], scales f16 [N, G], zeros u8 [N, ceil(G bits/8)]."""
    problems = list(_positive(site, "group", "bits"))
    yield from problems
    codes = site.dims("codes")
    if problems or codes is None:
        return
    if len(codes) != 2:
        yield f"codes must have two dims [rows, bytes], but they are {site.tensor('codes')}"
        return
    sizes = _rows_and_width(site, codes[0])
    if sizes is None:
        return
    rows, width = sizes
    bits, groups = site.args["bits"], group_count(width, site.args["group"])
    if bits > 8:
        yield f"bits must be at most 8, but they are {bits}"
    yield from stored(site, "codes", torch.uint8, (rows, packed_length(width, bits)))
    yield from stored(site, "scales", torch.float16, (rows, groups))
    yield from stored(site, "zeros", torch.uint8, (rows, packed_length(groups, bits)))
    yield from _out(site, rows)


def rope(site: Site) -> Iterator[str]:
    """x [batch, heads, seq, d]; cos and sin [..., seq, r] alike, r even and at most d."""
    x, cos, sin = site.dims("x"), site.dims("cos"), site.dims("sin")
    if x is None or cos is None:
        return
    if len(x) != 4 or len(cos) < 2:
        yield f"x must have four dims and cos at least two, but they are {site.tensor('x')} and {site.tensor('cos')}"
        return
    yield from same_dims("the dims of sin", sin, cos)
    if isinstance(cos[-1], int) and isinstance(x[-1], int) and (cos[-1] > x[-1] or cos[-1] % 2):
        yield f"cos must cover an even number of at most {x[-1]} channels, but it covers {cos[-1]}"
    if cos[-2] != 1 and differ(cos[-2], x[-2]):
        yield f"cos must have a row for each of {x[-2]} positions, but it has {cos[-2]}"
    yield from same_dims("the result's dims", site.out.dims if site.out else None, x)


def grouped_linear(site: Site) -> Iterator[str]:
    """x [rows, K], weight [experts, N, K], ends i32 [experts] -> [rows, N]."""
    x, weight = site.dims("x"), site.dims("weight")
    if x is None or weight is None:
        return
    if len(x) != 2 or len(weight) != 3:
        yield f"x must have two dims and the weight three: {site.tensor('x')} and {site.tensor('weight')}"
        return
    if differ(x[1], weight[2]):
        yield f"the input's last dim must be the weight's {weight[2]}, but it is {x[1]}"
    yield from stored(site, "ends", torch.int32, weight[:1])
    yield from same_dims("the result's dims", site.out.dims if site.out else None, (x[0], weight[1]))


CODE_CHECKS: dict[str, Check] = {
    "nomul.shiftadd_linear": shiftadd_linear,
    "nomul.quant_linear": quant_linear,
    "nomul.rope": rope,
    "nomul.grouped_linear": grouped_linear,
}
