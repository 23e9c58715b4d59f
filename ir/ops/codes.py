"""What the planes of a shift-add weight mean, which tensors store them, and how groups and row tiles are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.packing import packed_length
from ir.ops.trits import trit_bytes


@dataclass(frozen=True)
class Code:
    """What the planes of a weight mean.

    tied: one scale a group serves all planes, instead of one a plane; trits: a plane holds -1, 0, +1 and counts as two
    planes of signs, equal at -1 and +1 and opposite at 0; powers: plane -> exponents of the powers of two whose sum
    times the stored scale is the scale of its sign plane, or of each of the two.
    """

    tied: bool
    trits: bool
    powers: Callable[[int], tuple[int, ...]]

    def sets(self, planes: int) -> int:
        """Return the scales stored a group."""
        return 1 if self.tied else planes

    def digit_powers(self, plane: int) -> tuple[int, ...]:
        """Return the exponents for the digits of a plane: a trit is half the sum of its two signs."""
        return tuple(e + 1 for e in self.powers(plane)) if self.trits else self.powers(plane)


CODES = {
    "planes": Code(tied=False, trits=False, powers=lambda plane: (0,)),
    # Bit i of an unsigned code is worth scale * 2**i, and a sign half of that up or down.
    "uniform": Code(tied=True, trits=False, powers=lambda plane: (plane - 1,)),
    # The same equidistant levels around an offset of any value, where uniform codes have a whole zero point.
    "steps": Code(tied=True, trits=False, powers=lambda plane: (plane - 1,)),
    "trits": Code(tied=False, trits=True, powers=lambda plane: (-1,)),
    # scale * (3 t_0 + t_1): nine equidistant levels.
    "trits31": Code(tied=True, trits=True, powers=lambda plane: (-1,) if plane else (0, -1)),
}


def meaning(code: str, planes: int) -> Code:
    """Return the row of `CODES`; raises UsageError for an unknown code or a number of planes it cannot have."""
    if code not in CODES:
        raise UsageError(f"there is no code {code}", fix=f"use one of {', '.join(CODES)}")
    if (code == "trits31" and planes != 2) or (code in ("uniform", "steps") and not 1 <= planes <= 8):
        raise UsageError(f"code {code} cannot have {planes} planes", fix="uniform and steps have 1 to 8, trits31 has 2")
    return CODES[code]


def part_types(
    planes: int,
    rows: int,
    in_features: int,
    group: int,
    terms: int,
    row_group: int = 1,
    code: str = "planes",
    offset: bool = True,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and dims of the stored tensors by field name, absent ones left out; UsageError as for `meaning`."""
    kind, groups, tiles = meaning(code, planes), group_count(in_features, group), group_count(rows, row_group)
    width = trit_bytes(in_features) if kind.trits else packed_length(in_features, 1)
    found = {"signs": (torch.uint8, (planes, rows, width)), "scales": _values(tiles, groups * kind.sets(planes), terms)}
    if terms:
        found["exponents"] = (torch.int8, (tiles, 2))
    if offset:
        zeros = (torch.uint8, (tiles, packed_length(groups, planes))) if code == "uniform" else None
        found["offsets"] = zeros or _values(tiles, groups, terms)
    return found


def _values(tiles: int, count: int, terms: int) -> tuple[torch.dtype, tuple[int, ...]]:
    return (torch.uint8, (tiles, packed_length(count * terms, 4))) if terms else (torch.float16, (tiles, count))


def group_count(in_features: int, group: int) -> int:
    """Return the number of groups of `group` inputs, a ragged last one included."""
    return -(-in_features // group)


def row_tiles(start: int, stop: int, rows: int, row_group: int) -> slice:
    """Return the tiles of a range of rows; raises UsageError when it cuts through one."""
    if start % row_group or (stop % row_group and stop != rows):
        raise UsageError(
            f"rows {start} to {stop} cannot be taken by themselves",
            why=f"{row_group} rows share one set of scales",
            fix="cut at multiples of that, or fit the parts apart",
        )
    return slice(start // row_group, group_count(stop, row_group))


def expand_groups(values: Tensor, group: int, in_features: int) -> Tensor:
    """Repeat each entry of the last dim (groups) over its inputs: [..., G] -> [..., in_features]."""
    return (
        values.repeat_interleave(group, -1)[..., :in_features]
        if group < in_features
        else values.expand(*values.shape[:-1], in_features)
    )


def expand_rows(values: Tensor, row_group: int, rows: int) -> Tensor:
    """Repeat each entry of the first dim (row tiles) over its rows: [tiles, ...] -> [rows, ...]."""
    return values if row_group == 1 else values.repeat_interleave(min(row_group, rows), 0)[:rows]
