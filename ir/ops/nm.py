"""N:M masks: which n of every m neighbouring inputs a row keeps, as one bit an input."""

from __future__ import annotations

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.packing import pack_bits, unpack_bits


def kept_inputs(inputs: int, n: int, m: int) -> int:
    """Return how many weights a row of an n:m pattern keeps; UsageError where m does not divide its inputs."""
    if not 1 <= n < m or m > 64:
        raise UsageError(
            f"{n}:{m} is no pattern", why="n of m weights are kept", fix="use 1 <= n < m <= 64, such as 2:4"
        )
    if inputs % m:
        raise UsageError(f"a pattern {n}:{m} does not fit {inputs} inputs", why=f"{m} does not divide them")
    return inputs // m * n


def pack_mask(mask: Tensor, n: int, m: int) -> Tensor:
    """Return a mask, bool [N, K] with True where a weight is kept, as a bit stream uint8 [N, ceil(K/8)].

    Raises UsageError unless every m neighbours of a row keep exactly n.
    """
    kept_inputs(mask.shape[1], n, m)
    counts = mask.unflatten(1, (-1, m)).sum(-1)
    if bool((counts != n).any()):
        row, group = (int(i) for i in torch.nonzero(counts != n)[0])
        raise UsageError(
            f"a mask must keep {n} of every {m} inputs",
            where=f"row {row}, inputs {group * m} to {group * m + m - 1}",
            why=f"it keeps {int(counts[row, group])}",
        )
    return pack_bits(mask.to(torch.uint8), 1)


def unpack_mask(packed: Tensor, inputs: int) -> Tensor:
    """Return a packed mask as bool [N, K]."""
    return unpack_bits(packed, 1, inputs).bool()


def gather_kept(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the kept weights of each row in order, [N, kept]; mask: bool [N, K], as many True in every row."""
    return weight[mask].view(weight.shape[0], -1)


def scatter_kept(kept: Tensor, mask: Tensor) -> Tensor:
    """Return the weight [N, K] with the kept weights of each row, [N, kept], in their places and zeros elsewhere."""
    dense = kept.new_zeros(mask.shape)
    dense[mask] = kept.flatten()
    return dense


def kept_index(mask: Tensor) -> Tensor:
    """Return which inputs each row keeps, i64 [N, kept], ascending."""
    return torch.nonzero(mask)[:, 1].view(mask.shape[0], -1)
