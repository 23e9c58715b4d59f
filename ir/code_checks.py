"""What the `nomul` operators demand: code tensors of integer dtype whose shapes fit width, group and bits."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch

from ir.errors import UsageError
from ir.op_checks import Check, Dims, Site, differ, same_dims, tensor_of
from ir.ops.codes import group_count, meaning, part_types
from ir.ops.nm import kept_inputs
from ir.ops.packing import packed_length
from ir.ops.powerterms import MAX_TERMS
from ir.rotation_checks import hadamard
from ir.token_checks import decode_tokens, encode_tokens
from ir.types import TensorType


def stored(site: Site, name: str, dtype: torch.dtype, dims: Dims | None) -> Iterator[str]:
    """Yield what is wrong with a stored tensor of fixed dtype and dims; an absent optional one is right."""
    yield from _stored(site.tensor(name), name, dtype, dims)


def _stored(kind: TensorType | None, name: str, dtype: torch.dtype, dims: Dims | None) -> Iterator[str]:
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
    """The stored tensors that `ir.ops.codes.part_types` gives for these numbers of planes, terms and rows a tile."""
    sizes = yield from _plane_sizes(site)
    if sizes is None:
        return
    planes, rows, width = sizes
    yield from _plane_parts(site, planes, rows, width)
    yield from _out(site, rows)


def _plane_parts(site: Site, planes: int, rows: int, width: int) -> Iterator[str]:
    """Yield what is wrong with the stored tensors of planes over `width` inputs."""
    try:
        meaning(site.args["code"], planes)
    except UsageError as error:
        yield f"{error.what}; {error.fix}"
        return
    types = part_types(planes, rows, width, *(site.args[n] for n in ("group", "terms", "row_group", "code")))
    for name, (dtype, dims) in types.items():
        yield from stored(site, name, dtype, dims)
    if (site.tensor("exponents") is None) != (site.args["terms"] == 0):
        yield "exponents belong to scales of one or more terms, and to these only"


def _plane_sizes(site: Site) -> Generator[str, None, tuple[int, int, int] | None]:
    """Yield what is wrong with group, tile, terms and signs; return planes, rows and inputs where all are numbers."""
    problems = list(_positive(site, "group", "row_group"))
    terms = site.args["terms"]
    if not isinstance(terms, int) or not 0 <= terms <= MAX_TERMS:
        problems.append(f"terms must be 0 to {MAX_TERMS}, but they are {terms}")
    yield from problems
    signs = site.dims("signs")
    if problems or signs is None:
        return None
    if len(signs) != 3:
        yield f"signs must have three dims [planes, rows, bytes], but they are {site.tensor('signs')}"
        return None
    sizes = _rows_and_width(site, signs[1])
    return None if sizes is None or not isinstance(signs[0], int) else (signs[0], *sizes)


def nested_linear(site: Site) -> Iterator[str]:
    """signs of the highest precision, and scales, exponents and offsets of every precision as for its planes alone."""
    precisions, precision = site.args["precisions"], site.args["precision"]
    if not precisions or list(precisions) != sorted(set(precisions)) or precisions[0] < 1:
        yield f"precisions must be ascending positive numbers of planes, but they are {precisions}"
        return
    if precision not in precisions:
        yield f"precision must be one of {precisions}, but it is {precision}"
    sizes = yield from _plane_sizes(site)
    if sizes is None:
        return
    planes, rows, width = sizes
    if planes != precisions[-1]:
        yield f"signs must have the {precisions[-1]} planes of the highest precision, but they have {planes}"
    group, terms, row_group = (site.args[n] for n in ("group", "terms", "row_group"))
    count = len(precisions)
    for name, lengths in (("scales", {count}), ("exponents", {count if terms else 0}), ("offsets", {0, count})):
        if len(site.args[name]) not in lengths:
            yield f"{name} must be {max(lengths)} tensors, but they are {len(site.args[name])}"
    for which, used in enumerate(precisions):
        for name, (dtype, dims) in part_types(used, rows, width, group, terms, row_group).items():
            values = [site.args["signs"]] * count if name == "signs" else site.args[name]
            expected = (planes, *dims[1:]) if name == "signs" else dims
            yield from _stored(tensor_of((*values, *[None] * count)[which]), f"{name}[{which}]", dtype, expected)
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


def sparse_linear(site: Site) -> Iterator[str]:
    """values float [N, kept] or u8 [N, ceil(kept bits/8)] with scales f16 [N, G]; mask u8 [N, ceil(K/8)]."""
    sizes = yield from _mask_sizes(site)
    if sizes is None:
        return
    rows, kept = sizes
    bits, group, values = site.args["bits"], site.args["group"], site.tensor("values")
    if bits not in range(9):
        yield f"bits must be 0 to 8, but they are {bits}"
        return
    if (site.tensor("scales") is None) != (bits == 0):
        yield "scales belong to codes, and to these only"
    if bits:
        yield from _positive(site, "group")
        yield from stored(site, "values", torch.uint8, (rows, packed_length(kept, bits)))
        if isinstance(group, int) and group > 0:
            yield from stored(site, "scales", torch.float16, (rows, group_count(kept, group)))
    elif values is not None:
        yield from same_dims("the dims of values", values.dims, (rows, kept))
        if not values.dtype.is_floating_point:
            yield f"values without bits must be float, but they are {values}"
    yield from _out(site, rows)


def sparse_shiftadd_linear(site: Site) -> Iterator[str]:
    """mask u8 [N, ceil(K/8)], and the tensors of `shiftadd_linear` for the kept inputs of a row."""
    sizes = yield from _mask_sizes(site)
    found = yield from _plane_sizes(site)
    if sizes is None or found is None:
        return
    if found[1] != sizes[0]:
        yield f"signs must have the {sizes[0]} rows of the mask, but they have {found[1]}"
        return
    yield from _plane_parts(site, found[0], *sizes)
    yield from _out(site, sizes[0])


def _mask_sizes(site: Site) -> Generator[str, None, tuple[int, int] | None]:
    """Yield what is wrong with the pattern and the mask; return rows and kept inputs where all are numbers."""
    mask = site.dims("mask")
    if mask is None:
        return None
    if len(mask) != 2:
        yield f"mask must have two dims [rows, bytes], but it is {site.tensor('mask')}"
        return None
    sizes = _rows_and_width(site, mask[0])
    if sizes is None:
        return None
    try:
        kept = kept_inputs(sizes[1], site.args["n"], site.args["m"])
    except UsageError as error:
        yield f"{error.what}: {error.why}"
        return None
    yield from stored(site, "mask", torch.uint8, (sizes[0], packed_length(sizes[1], 1)))
    return sizes[0], kept


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
    "nomul.nested_linear": nested_linear,
    "nomul.quant_linear": quant_linear,
    "nomul.sparse_linear": sparse_linear,
    "nomul.sparse_shiftadd_linear": sparse_shiftadd_linear,
    "nomul.rope": rope,
    "nomul.grouped_linear": grouped_linear,
    "nomul.hadamard": hadamard,
    "nomul.encode_tokens": encode_tokens,
    "nomul.decode_tokens": decode_tokens,
}
