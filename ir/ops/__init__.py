"""Operators of namespace `nomul`, one file a family; importing this package registers them all with torch."""

from ir.ops import grouped, hadamard, nested, quant, rope, shiftadd, sparse, tokens

__all__ = ["grouped", "hadamard", "nested", "quant", "rope", "shiftadd", "sparse", "tokens"]
