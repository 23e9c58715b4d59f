"""Linears whose codes have no tile order: a function that decodes them as they are stored, by standard operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from backends.onnxruntime import coded_values as values
from backends.onnxruntime.bodies import Body, result_of, rows_of
from backends.onnxruntime.twins import DOMAIN
from ir.ops.codes import Code, group_count, meaning
from ir.ops.shiftcode import ShiftCodes

NAME = "CodedLinear"
_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Coding:
    """What a function must know of a weight [rows, inputs]; the fields are those of `ShiftCodes`, offset: has any."""

    code: str
    planes: int
    group: int
    terms: int
    row_group: int
    offset: bool
    rows: int
    inputs: int

    @property
    def meaning(self) -> Code:
        """The row of `ir.ops.codes.CODES`."""
        return meaning(self.code, self.planes)

    @property
    def sets(self) -> int:
        """Scales stored a group."""
        return self.meaning.sets(self.planes)

    @property
    def groups(self) -> int:
        """Groups of a row, the ragged last one included."""
        return group_count(self.inputs, self.group)

    @property
    def width(self) -> int:
        """Inputs of a whole group."""
        return min(self.group, self.inputs)

    @property
    def tiles_at_once(self) -> int:
        """Tiles of rows with common scales that are decoded in one step."""
        return group_count(_ROWS_AT_ONCE, self.row_group)

    @property
    def uniform(self) -> bool:
        """Whether the offsets are zero points."""
        return self.code == "uniform"

    def overload(self, bias: bool) -> str:
        """Return the overload of `nomul::CodedLinear` that decodes this, with or without a bias."""
        kind = f"{self.code}{self.planes}_group{self.group}_terms{self.terms}_rows{self.row_group}"
        return f"{kind}{'_offset' * self.offset}_{self.rows}x{self.inputs}{'_bias' * bias}"


def coding_of(codes: ShiftCodes) -> Coding:
    """Return what a function must know to decode codes."""
    settings = codes.group, codes.terms, codes.row_group, codes.offsets is not None
    return Coding(codes.code, codes.planes, *settings, codes.rows, codes.in_features)


def coded_function(coding: Coding, bias: bool, opset: int) -> Any:
    """Return `nomul::CodedLinear`: x [..., inputs], then the stored tensors that there are, then a bias [rows].

    Some rows are decoded in a step of a loop. That bounds memory, and keeps the runtime from decoding all weights to
    float when a file is opened, since what a step reads depends on its number.
    """
    b = Body(opset)
    x, stored = b.input("x"), {"signs": b.input("signs"), "scales": b.input("scales")}
    for name, there in (("exponents", coding.terms > 0), ("offsets", coding.offset)):
        if there:
            stored[name] = b.input(name)
    given = b.input("bias") if bias else None
    columns = rows_of(b, x, coding.inputs)
    steps = b.constant(torch.tensor(group_count(coding.rows, coding.tiles_at_once * coding.row_group)))
    none = b.cut(columns, 0, 0, 0)
    found = b.add("Loop", steps, None, none, body=_step(b.inner(), coding, columns, stored))
    y = result_of(b, found, x, given, coding.rows)
    doc = "x W^T + bias with W as stored, decoded by standard operators."
    return b.function(DOMAIN, NAME, coding.overload(bias), y, (), doc)


def _step(b: Body, coding: Coding, columns: Any, stored: dict[str, Any]) -> Any:
    """Return the graph of a step: the results so far [rows, tokens] with those of the next rows after them."""
    number, go_on = b.input("step", torch.int64, []), b.input("go_on", torch.bool, [])
    so_far = b.input("so_far", torch.float32, [None, None])
    first = b.add("Mul", number, b.constant(torch.tensor(coding.tiles_at_once)))
    parts = {name: _part(b, coding, name, value, first) for name, value in stored.items()}
    product = b.add("MatMul", _weight(b, coding, parts), columns)
    result = b.typed(b.add("Concat", so_far, product, axis=0), torch.float32, [None, None])
    more = b.typed(b.add("Identity", go_on), torch.bool, [])
    return b.graph([more, result], "rows")


def _part(b: Body, coding: Coding, name: str, value: Any, first: Any) -> Any:
    """Return the part of a stored tensor that belongs to the tiles of a step, from the first one on."""
    last = b.add("Add", first, b.constant(torch.tensor(coding.tiles_at_once)))
    ends = [first, last]
    if name == "signs":
        ends = [b.add("Mul", end, b.constant(torch.tensor(coding.row_group))) for end in ends]
    axis = 1 if name == "signs" else 0
    # The last step may reach beyond the end, where a slice stops by itself.
    return b.add("Slice", value, *(b.add("Unsqueeze", end, [0]) for end in ends), [axis])


def _weight(b: Body, coding: Coding, parts: dict[str, Any]) -> Any:
    """Return the decoded rows [rows, inputs]."""
    scale, z = _scales(b, coding, parts)
    worth = [sum(2.0**e for e in coding.meaning.digit_powers(plane)) for plane in range(coding.planes)]
    alpha = b.add("Mul", scale, b.constant(torch.tensor(worth)))
    digits = _digits(b, coding, parts["signs"])
    planes = b.add("Unsqueeze", b.add("Transpose", _for_rows(b, coding, alpha, digits), perm=[2, 0, 1]), [-1])
    total = b.add("ReduceSum", b.add("Mul", digits, planes), [0], keepdims=0)
    if z is not None:
        total = b.add("Add", total, b.add("Unsqueeze", _for_rows(b, coding, z, digits), [-1]))
    return b.cut(b.add("Reshape", total, b.vector([0, -1])), 0, coding.inputs, 1)


def _for_rows(b: Body, coding: Coding, of_tiles: Any, digits: Any) -> Any:
    """Return values of tiles [tiles, ...] repeated for their rows, of which digits [planes, rows, ...] has so many."""
    if coding.row_group == 1:
        return of_tiles
    rows = b.add("Squeeze", b.add("Shape", digits, start=1, end=2), [0])
    return b.add("Gather", of_tiles, b.quotients(rows, coding.row_group), axis=0)


def _digits(b: Body, coding: Coding, stored: Any) -> Any:
    """Return the digits of planes uint8 [planes, rows, bytes] by group, filled up with zeros: [..., groups, width]."""
    decode = values.trits if coding.meaning.trits else values.signs
    flat = b.add("Reshape", decode(b, b.cast(stored, torch.int32)), b.vector([0, 0, -1]))
    flat = b.cut(flat, 0, coding.inputs, 2)
    missing = coding.groups * coding.width - coding.inputs
    if missing:
        flat = b.add("Pad", flat, b.vector([0, 0, 0, 0, 0, missing]))
    return b.add("Reshape", flat, b.vector([0, 0, coding.groups, coding.width]))


def _scales(b: Body, coding: Coding, parts: dict[str, Any]) -> tuple[Any, Any | None]:
    """Return scales [tiles, groups, sets] and offsets [tiles, groups] or None."""
    power = None
    if coding.terms:
        # A negative exponent is looked up by the byte that it is stored as.
        stored = b.add("BitwiseAnd", b.cast(parts["exponents"], torch.int32), b.constant(_int32(255)))
        power = values.powers(b, stored)
    nibbles = [coding.groups, coding.sets, coding.terms]
    scale = _numbers(b, parts["scales"], nibbles, power, 0)
    if coding.uniform:
        return scale, b.add("Mul", b.take(scale, 0, 2), _from_zeros(b, coding, parts.get("offsets")))
    if not coding.offset:
        return scale, None
    return scale, b.take(_numbers(b, parts["offsets"], [coding.groups, 1, coding.terms], power, 1), 0, 2)


def _numbers(b: Body, stored: Any, sizes: list[int], power: Any | None, column: int) -> Any:
    """Return numbers [tiles, groups, sets] stored in nibbles or, without powers of two [tiles, 2], as float16.

    sizes: groups, sets and terms; column: 0 for scales and 1 for offsets.
    """
    groups, sets, count = sizes
    if power is None:
        return b.add("Reshape", b.cast(stored, torch.float32), b.vector([-1, groups, sets]))
    pairs = values.nibbles(b, b.cast(stored, torch.int32))
    flat = b.cut(b.add("Reshape", pairs, b.vector([0, -1])), 0, groups * sets * count, 1)
    each = b.add("Reshape", flat, b.vector([-1, groups, sets, count]))
    terms = [b.take(each, i, 3) for i in range(count)]
    found = (values.offset if column else values.scale)(b, terms)
    return b.add("Mul", found, b.add("Unsqueeze", b.take(power, column, 1), [1, 2]))


def _from_zeros(b: Body, coding: Coding, stored: Any | None) -> Any:
    """Return what zero points, uint8 bit streams [tiles, bytes] or None, shift codes by, [tiles, groups] or 0-d."""
    middle, planes = (2**coding.planes - 1) / 2, coding.planes
    if stored is None:
        return b.constant(torch.tensor(middle - 2 ** (planes - 1)))
    stream = b.add("Reshape", values.bits(b, b.cast(stored, torch.int32)), b.vector([0, -1]))
    each = b.add("Reshape", b.cut(stream, 0, coding.groups * planes, 1), b.vector([-1, coding.groups, planes]))
    points = b.add("ReduceSum", b.add("Mul", each, b.constant(2.0 ** torch.arange(planes))), [2], keepdims=0)
    return b.add("Sub", b.constant(torch.tensor(middle)), points)


def _int32(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int32)
