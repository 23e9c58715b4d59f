"""`nomul::nested_linear`: one set of sign planes that runs at several precisions, each with scales of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ir.errors import UsageError
from ir.ops.codes import row_tiles
from ir.ops.cost import Cost
from ir.ops.shiftadd import by_shifts, shiftadd_cost
from ir.ops.shiftcode import ShiftCodes, dequantize


@dataclass(frozen=True)
class NestedCodes:
    """Sign planes [N, in_features], most significant first, of which precision p uses the first p (AnyBCQ, 2510.10467).

    signs: uint8 [P, N, ceil(K/8)]; precisions: ascending numbers of planes, the last one P; scales, exponents, offsets:
    one tensor a precision, as in `ir.ops.shiftcode.ShiftCodes` with p planes; exponents are empty with terms = 0,
    offsets where there are none.
    """

    signs: Tensor
    scales: tuple[Tensor, ...]
    exponents: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    group: int
    terms: int
    in_features: int
    row_group: int
    precisions: tuple[int, ...]

    @property
    def stored_bits(self) -> int:
        """Bits of all stored tensors of all precisions, padding included."""
        tensors = (self.signs, *self.scales, *self.exponents, *self.offsets)
        return sum(8 * t.numel() * t.element_size() for t in tensors)

    def at(self, precision: int) -> ShiftCodes:
        """Return the codes of one precision, its planes a view of the first ones; UsageError for one not there."""
        check_precision(precision, self.precisions)
        which = self.precisions.index(precision)
        return ShiftCodes(
            self.signs[:precision],
            self.scales[which],
            self.exponents[which] if self.exponents else None,
            self.offsets[which] if self.offsets else None,
            self.group,
            self.terms,
            self.in_features,
            self.row_group,
        )


def check_precision(precision: int, precisions: Sequence[int]) -> None:
    """Raise UsageError when a precision is not among those stored."""
    if precision not in precisions:
        raise UsageError(
            f"there is no precision of {precision} planes", fix=f"use one of {', '.join(map(str, precisions))}"
        )


def nest(codes: Sequence[ShiftCodes]) -> NestedCodes:
    """Return codes of the same weight at ascending precisions as one, the planes of the last one kept.

    Raises UsageError when the planes of one are not the first planes of the next (a negative scale turns its plane
    around, so scales must not be negative), or when their layouts differ.
    """
    codes = sorted(codes, key=lambda c: c.planes)
    last = codes[-1]
    for one in codes:
        if _layout(one) != _layout(last) or one.code != "planes":
            raise UsageError("codes of different layouts cannot be nested", why=f"{one.planes} planes differ")
        if not torch.equal(one.signs, last.signs[: one.planes]):
            raise UsageError(
                f"the planes of precision {one.planes} are not the first ones of precision {last.planes}",
                fix="freeze the planes of lower precisions, and keep their scales from turning negative",
            )
    return NestedCodes(
        last.signs,
        tuple(c.scales for c in codes),
        tuple(c.exponents for c in codes if c.exponents is not None),
        tuple(c.offsets for c in codes if c.offsets is not None),
        last.group,
        last.terms,
        last.in_features,
        last.row_group,
        tuple(c.planes for c in codes),
    )


def _layout(codes: ShiftCodes) -> tuple[object, ...]:
    return codes.group, codes.terms, codes.row_group, codes.in_features, codes.code, codes.offsets is None


def take_nested_rows(codes: NestedCodes, start: int, stop: int) -> NestedCodes:
    """Return the codes of a range of rows at all precisions; errors as for `ir.ops.shiftcode.take_rows`."""
    tiles = row_tiles(start, stop, codes.signs.shape[1], codes.row_group)
    return replace(
        codes,
        signs=codes.signs[:, start:stop].contiguous(),
        scales=tuple(t[tiles].contiguous() for t in codes.scales),
        exponents=tuple(t[tiles].contiguous() for t in codes.exponents),
        offsets=tuple(t[tiles].contiguous() for t in codes.offsets),
    )


@torch.library.custom_op("nomul::nested_linear", mutates_args=())
def nested_linear(
    x: Tensor,
    signs: Tensor,
    scales: list[Tensor],
    exponents: list[Tensor],
    offsets: list[Tensor],
    bias: Tensor | None,
    group: int,
    terms: int,
    row_group: int,
    precisions: list[int],
    precision: int,
) -> Tensor:
    """Return x W^T + bias with the weight W that `precision` planes stand for.

    x: float [..., K]; signs to precisions: the stored form of `NestedCodes` with N rows; bias: [N]. Returns [..., N] in
    x's dtype. Of the planes only the first `precision` are read, of the scales only that precision's.
    """
    codes = _at(x, signs, scales, exponents, offsets, group, terms, row_group, precisions, precision)
    return functional.linear(x, dequantize(codes, x.dtype), bias)


def _at(x, signs, scales, exponents, offsets, group, terms, row_group, precisions, precision) -> ShiftCodes:  # type: ignore[no-untyped-def]
    stored = (tuple(scales), tuple(exponents), tuple(offsets))
    return NestedCodes(signs, *stored, group, terms, x.shape[-1], row_group, tuple(precisions)).at(precision)


@nested_linear.register_fake
def _(x, signs, scales, exponents, offsets, bias, group, terms, row_group, precisions, precision):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], signs.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, signs, scales, exponents, offsets, bias, *layout = inputs
    codes = _at(x, signs, scales, exponents, offsets, *layout)
    ctx.has_bias, ctx.counts = bias is not None, [len(scales), len(exponents), len(offsets)]
    ctx.layout = (codes.group, codes.terms, codes.in_features, codes.row_group)
    ctx.save_for_backward(codes.signs, codes.scales, codes.exponents, codes.offsets)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The map is linear in x with constant codes, so the gradient flows through W alone."""
    weight = dequantize(ShiftCodes(*ctx.saved_tensors, *ctx.layout), grad.dtype)
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    lists = ([None] * count for count in ctx.counts)
    return grad @ weight, None, *lists, grad_bias, None, None, None, None, None


nested_linear.register_autograd(_backward, setup_context=_save)


def nested_by_shifts(
    x: Tensor,
    signs: Tensor,
    scales: list[Tensor],
    exponents: list[Tensor],
    offsets: list[Tensor],
    bias: Tensor | None,
    group: int,
    terms: int,
    row_group: int,
    precisions: list[int],
    precision: int,
) -> Tensor:
    """Evaluate `nomul::nested_linear` by signed sums and shifts, as `ir.ops.shiftadd.shiftadd_by_shifts` does."""
    codes = _at(x, signs, scales, exponents, offsets, group, terms, row_group, precisions, precision)
    total = by_shifts(x, codes)
    return total if bias is None else total + bias


def nested_cost(codes: NestedCodes, precision: int, tokens: int, element: int = 4) -> Cost:
    """Return the cost of one call at a precision: that of its own codes, the other planes and scales lie still."""
    return shiftadd_cost(codes.at(precision), tokens, element)
