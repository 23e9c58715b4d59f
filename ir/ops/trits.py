"""Dense streams of trits: digits -1, 0 and +1 packed along the last dim, five to a byte (1.6 bits each)."""

from __future__ import annotations

import torch
from torch import Tensor

from ir.errors import UsageError

PER_BYTE = 5


def trit_bytes(n: int) -> int:
    """Return the bytes that `n` trits occupy."""
    return -(-n // PER_BYTE)


def pack_trits(digits: Tensor) -> Tensor:
    """Pack digits into bytes: digit i of a byte adds (digit + 1) * 3**i; the last byte is filled up with zeros.

    digits: [..., n] of any number type, values -1, 0 and 1; returns uint8 [..., ceil(n/5)]. Raises UsageError for other
    values.
    """
    if not bool(((digits == -1) | (digits == 0) | (digits == 1)).all()):
        raise UsageError("trits must be -1, 0 or 1", fix="round the digits before they are packed")
    n = digits.shape[-1]
    codes = torch.nn.functional.pad(digits.to(torch.int8) + 1, (0, trit_bytes(n) * PER_BYTE - n), value=1)
    weights = torch.tensor([3**i for i in range(PER_BYTE)], dtype=torch.uint8, device=digits.device)
    values: Tensor = codes.to(torch.uint8).unflatten(-1, (-1, PER_BYTE)) * weights
    return values.sum(-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """Return the first `n` digits of a stream written by `pack_trits`.

    packed: uint8 [..., bytes]; returns int8 [..., n]. Raises UsageError for another dtype or a stream of the wrong
    length.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != trit_bytes(n):
        raise UsageError(
            f"a stream of {n} trits must be uint8 with {trit_bytes(n)} bytes",
            why=f"it is {packed.dtype} with {packed.shape[-1]}",
        )
    weights = torch.tensor([3**i for i in range(PER_BYTE)], dtype=torch.uint8, device=packed.device)
    digits: Tensor = packed.unsqueeze(-1).div(weights, rounding_mode="floor") % 3
    return digits.flatten(-2)[..., :n].to(torch.int8) - 1
