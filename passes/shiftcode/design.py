"""Code books of the solver: what each code stands for, and the scales a fit starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ir.errors import UsageError
from passes.shiftcode.rounding import Floats

# Steps of a uniform start as multiples of the group's spread, around the Lloyd-Max step of a Gaussian for 1..4 bits.
_STEPS = {1: (1.6,), 2: (0.8, 1.0, 1.25), 3: (0.45, 0.6, 0.8), 4: (0.26, 0.34, 0.48)}
_TRIT_STEPS = {1: (1.2, 1.0, 1.5), 2: (0.55, 0.7, 0.42)}


@dataclass(frozen=True, eq=False)
class Design:
    """A code book: w = z + design[code] @ scales.

    code: as in `ir.ops.shiftcode.ShiftCodes`; bits: planes, or trits for the ternary codes; matrix: float64 [codes,
    scales]; starts: float64 [count, scales], scales of a fit's starts as multiples of the spread, a negative row asks
    for residual greedy coding; sortable: whether permuting or negating scales only permutes the codes.
    """

    code: str
    bits: int
    matrix: Floats
    starts: Floats
    sortable: bool

    def digits(self, codes: Tensor) -> Tensor:
        """Return the planes of codes [...]: bool [bits, ...] with True for +1, or int8 trits -1, 0, 1."""
        if self.code == "planes":
            return torch.stack([(codes >> i & 1).bool() for i in range(self.bits)])
        return torch.stack([(codes.long() // 3**i % 3 - 1).to(torch.int8) for i in range(self.bits)])


@lru_cache(maxsize=32)
def design_of(code: str, bits: int, starts: int) -> Design:
    """Return the code book of `bits` planes (code `planes`) or trits (`trits`, `trits31`) with `starts` starts."""
    if code == "planes":
        each = np.arange(2**bits)
        matrix = np.stack([(each >> i & 1) * 2.0 - 1.0 for i in range(bits)], 1)
        ladder = 2.0 ** np.arange(bits - 2, -2, -1)
        steps = _STEPS.get(bits, (3.0 / 2**bits, 4.0 / 2**bits, 6.0 / 2**bits))
        rows = [-np.ones(bits)] + [step * ladder for step in steps]
    elif code in ("trits", "trits31"):
        each = np.arange(3**bits)
        trits = np.stack([each // 3**i % 3 - 1.0 for i in range(bits)], 1)
        ladder = 3.0 ** np.arange(bits - 1, -1, -1)
        rows = [step * ladder for step in _TRIT_STEPS.get(bits, (2.0 / 3**bits,))]
        matrix = trits
        if code == "trits31":
            matrix, rows = trits @ ladder[:, None], [row[-1:] for row in rows]
    else:
        raise UsageError(f"no code book is named {code}", fix="use planes, trits or trits31")
    return Design(code, bits, np.ascontiguousarray(matrix), np.array(rows[: max(starts, 1)]), code != "trits31")
