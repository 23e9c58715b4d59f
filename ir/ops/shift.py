"""Shifting floats: multiplication by a power of two as an exact operation on the exponent."""

from __future__ import annotations

from torch import Tensor

from ir.ops.powerterms import power_of_two


def shift(x: Tensor, exponent: Tensor) -> Tensor:
    """Return ldexp(x, exponent): x times 2**exponent with one rounding, right on zeros, subnormals, overflow and NaN.

    x: any floating dtype; exponent: integer tensor that broadcasts against x, in [-1022, 1023]. For dtypes narrower
    than float64 the product in float64 is exact, so the cast back is the only rounding.
    """
    return (x.double() * power_of_two(exponent)).to(x.dtype)
