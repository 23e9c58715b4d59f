"""Running a compiled loop over independent tiles on all cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_PIECES_PER_THREAD = 4
_FEW = 16


def over_tiles(count: int, run: Callable[[int, int], None]) -> None:
    """Call `run(first, last)` on consecutive ranges that make up `count` tiles, on as many threads as torch uses.

    Compiled loops release the interpreter's lock. What they write for a tile must not depend on the ranges.
    """
    threads = min(torch.get_num_threads(), count // _FEW)
    if threads <= 1:
        run(0, count)
        return
    pieces = threads * _PIECES_PER_THREAD
    borders = [count * i // pieces for i in range(pieces + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, borders, borders[1:]))
