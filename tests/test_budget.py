"""Options within a budget of stored bits: never over it, monotone in it, and refused by name where nothing fits."""

import pytest

from ir.errors import UsageError
from ir.ops.codes import group_count
from passes.shiftcode.budget import choose
from passes.shiftcode.spec import ShiftSpec

INPUTS = [576, 1536]
QUICK = ShiftSpec(rounds=2, starts=1)


def stored_bits(spec: ShiftSpec) -> float:
    """Return bits per weight by hand: planes, a nibble a term for every scale and offset, two exponents a row."""
    nibbles = sum(group_count(k, spec.group) * spec.terms * (spec.bits + spec.offset) for k in INPUTS)
    return spec.bits + (4 * nibbles + 16 * len(INPUTS)) / sum(INPUTS)


@pytest.mark.parametrize("bpw", [1.4, 2.3, 2.75, 3.3, 4.3])
def test_the_budget_is_kept_and_hardly_left_unused(bpw: float) -> None:
    spec = choose(bpw, QUICK, INPUTS, stored_bits, rotated=False)
    assert bpw - 0.3 < stored_bits(spec) <= bpw
    assert all(k % spec.group == 0 for k in INPUTS) or spec.group == max(INPUTS)


def test_more_bits_are_not_spent_on_fewer_planes() -> None:
    planes = [choose(bpw, QUICK, INPUTS, stored_bits, rotated=False).bits for bpw in (1.3, 2.3, 3.3, 4.3)]
    assert planes == sorted(planes) and planes[0] == 1 and planes[-1] == 4


def test_rotated_rows_need_fewer_scales() -> None:
    """Normal rows lose little by larger groups, so that the budget buys offsets instead."""
    tails, normal = (choose(2.75, ShiftSpec(), INPUTS, stored_bits, rotated=rotated) for rotated in (False, True))
    assert normal.bits == tails.bits and normal.group > tails.group


def test_a_budget_below_one_plane_names_the_smallest() -> None:
    smallest = stored_bits(ShiftSpec(bits=1, group=max(INPUTS), terms=1, offset=False))
    with pytest.raises(UsageError, match=f"bpw={smallest:.3f}"):
        choose(1.0, QUICK, INPUTS, stored_bits, rotated=False)
    assert choose(smallest + 1e-9, QUICK, INPUTS, stored_bits, rotated=False).bits == 1
