"""Turning the channels of a weight by random rotations made of signs and Hadamard matrices: plain algorithms."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ir.ops.hadamard import hadamard
from ir.ops.packing import pack_bits, packed_length, unpack_bits


@dataclass(frozen=True, eq=False)
class Turn:
    """A change of basis of some channels of a linear: its columns w become w D H^T scale, its rows H D W scale.

    channels: i64[n], in the order in which blocks of `order` are turned together; signs: u8[n], 1 is +1, the diagonal
    D; H: the matrix of `nomul::hadamard`, with H^T H = order I.
    """

    axis: Literal["rows", "cols"]
    channels: Tensor
    signs: Tensor
    order: int
    scale: float


def random_signs(seed: int, place: str, count: int) -> Tensor:
    """Return `count` random bits u8 that depend on the seed and the place alone, the same on every machine."""
    digest = hashlib.shake_256(f"{seed}:{place}".encode()).digest(packed_length(count, 1))
    return unpack_bits(torch.frombuffer(bytearray(digest), dtype=torch.uint8), 1, count)


def turned_weight(weight: Tensor, turns: Iterable[Turn]) -> Tensor:
    """Return a weight f64[N, K] in its new basis; each channel may be in one turn of rows and one of columns."""
    out = weight.clone()
    for turn in turns:
        if turn.axis == "cols":
            out[:, turn.channels] = _turned(out[:, turn.channels], turn)
        else:
            out[turn.channels] = _turned(out[turn.channels].T, turn).T
    return out


def turned_bias(bias: Tensor, turns: Iterable[Turn]) -> Tensor:
    """Return the bias f64[N] of such a weight, which follows the rows."""
    out = bias.clone()
    for turn in turns:
        if turn.axis == "rows":
            out[turn.channels] = _turned(out[turn.channels], turn)
    return out


def _turned(x: Tensor, turn: Turn) -> Tensor:
    turned: Tensor = hadamard(x, pack_bits(turn.signs, 1), turn.order)
    return turned * turn.scale


def peak(weight: Tensor) -> float:
    """Return the largest magnitude relative to the root mean square, 0 for a weight of zeros: what rotations lower.

    It is the incoherence of QuIP (2307.13304, definition 1).
    """
    rms = float(weight.square().mean().sqrt())
    return float(weight.abs().max()) / rms if rms else 0.0
