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


@dataclass(frozen=True, eq=False)
class Mix:
    """A further change of basis by orthogonal matrices: columns w of a linear become w M^T, its rows M W.

    channels: i64[b * k]; matrices: [b, k, k], one for each k channels in that order.
    """

    axis: Literal["rows", "cols"]
    channels: Tensor
    matrices: Tensor


def cayley(entries: Tensor) -> Tensor:
    """Return orthogonal matrices [..., k, k] for any entries [..., k, k], the identity for zeros; differentiable.

    (I - A/2)^-1 (I + A/2) of the skew part A of the entries: the Cayley transform, by whose steps SpinQuant
    (2405.16406, section 3.3) learns rotations.
    """
    half = (entries - entries.mT) / 4
    one = torch.eye(entries.shape[-1], dtype=entries.dtype)
    found: Tensor = torch.linalg.solve(one - half, one + half)
    return found


def random_signs(seed: int, place: str, count: int) -> Tensor:
    """Return `count` random bits u8 that depend on the seed and the place alone, the same on every machine."""
    digest = hashlib.shake_256(f"{seed}:{place}".encode()).digest(packed_length(count, 1))
    return unpack_bits(torch.frombuffer(bytearray(digest), dtype=torch.uint8), 1, count)


def turned_weight(weight: Tensor, turns: Iterable[Turn | Mix]) -> Tensor:
    """Return a weight [N, K] in its new basis, one turn after another; differentiable."""
    for turn in turns:
        weight = _replaced(weight, turn) if turn.axis == "cols" else _replaced(weight.T, turn).T
    return weight


def turned_inputs(x: Tensor, turns: Iterable[Turn | Mix]) -> Tensor:
    """Return inputs [..., K] that give a linear whose columns are turned so what x gave it before."""
    for turn in turns:
        if turn.axis == "cols":
            x = _replaced(x, turn)
            if isinstance(turn, Turn):  # W D H^T s needs H D x / (s order)
                x = x.index_copy(-1, turn.channels, x[..., turn.channels] / (turn.scale**2 * turn.order))
    return x


def turned_bias(bias: Tensor, turns: Iterable[Turn | Mix]) -> Tensor:
    """Return the bias [N] of such a weight, which follows the rows."""
    for turn in turns:
        if turn.axis == "rows":
            bias = _replaced(bias, turn)
    return bias


def _replaced(x: Tensor, turn: Turn | Mix) -> Tensor:
    """Return x [..., K] with the channels of a turn in its basis."""
    if torch.equal(turn.channels, torch.arange(x.shape[-1])):
        return _turned(x, turn)
    return x.index_copy(-1, turn.channels, _turned(x[..., turn.channels], turn))


def _turned(x: Tensor, turn: Turn | Mix) -> Tensor:
    if isinstance(turn, Mix):
        parts = x.unflatten(-1, turn.matrices.shape[:2])
        return torch.einsum("bij,...bj->...bi", turn.matrices, parts).flatten(-2)
    turned: Tensor = hadamard(x, pack_bits(turn.signs, 1), turn.order)
    return turned * turn.scale


def peak(weight: Tensor) -> float:
    """Return the largest magnitude relative to the root mean square, 0 for a weight of zeros: what rotations lower.

    It is the incoherence of QuIP (2307.13304, definition 1).
    """
    rms = float(weight.square().mean().sqrt())
    return float(weight.abs().max()) / rms if rms else 0.0
