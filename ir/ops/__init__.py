"""Operators of namespace `nomul`, one file a family; importing this package registers them all with torch."""

from ir.ops import grouped, quant, rope, shiftadd

__all__ = ["grouped", "quant", "rope", "shiftadd"]
