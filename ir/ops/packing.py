"""Dense little-endian bit streams: unsigned codes of 1 to 8 bits packed along the last dim into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ir.errors import UsageError


def packed_length(n: int, bits: int) -> int:
    """Return the bytes that `n` codes of `bits` bits occupy."""
    return (n * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into a bit stream in which code i occupies bits [i*bits, i*bits+bits), low bit first.

    codes: uint8 [..., n] with values below 2**bits; returns uint8 [..., ceil(n*bits/8)], pad bits 0. Raises UsageError
    for a width outside 1..8, another dtype or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise UsageError("codes to pack must be uint8", why=f"the dtype is {codes.dtype}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise UsageError(
            "a code does not fit its width", why=f"the largest is {int(codes.max())}, the width {bits} bits"
        )
    n = codes.shape[-1]
    if 8 % bits == 0:  # codes do not cross bytes: no need to take them apart bit by bit
        whole = torch.nn.functional.pad(codes, (0, packed_length(n, bits) * 8 // bits - n))
        shifted: Tensor = whole.unflatten(-1, (-1, 8 // bits)) << _places(bits, codes.device)
        return shifted.sum(-1, dtype=torch.uint8)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, packed_length(n, bits) * 8 - n * bits))
    return _join(stream.unflatten(-1, (-1, 8)))


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the first `n` codes of a bit stream written by `pack_bits`.

    packed: uint8 [..., bytes]; returns uint8 [..., n]. Raises UsageError for a width outside 1..8, another dtype or a
    stream of the wrong length.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_length(n, bits):
        raise UsageError(
            f"a stream of {n} codes of {bits} bits must be uint8 with {packed_length(n, bits)} bytes",
            why=f"it is {packed.dtype} with {packed.shape[-1]}",
        )
    if 8 % bits == 0:
        parts: Tensor = (packed.unsqueeze(-1) >> _places(bits, packed.device)) & (2**bits - 1)
        return parts.flatten(-2)[..., :n]
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)
    return _join(stream[..., : n * bits].unflatten(-1, (n, bits)))


def _places(bits: int, device: torch.device) -> Tensor:
    """Return the places of the codes in a byte, uint8 [8 / bits]."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _join(stream: Tensor) -> Tensor:
    """Return the numbers whose bits, low first, are the last dim: uint8 [..., width] -> uint8 [...]."""
    weights = 1 << torch.arange(stream.shape[-1], dtype=torch.uint8, device=stream.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UsageError("the code width must be 1 to 8 bits", why=f"it is {bits}")
