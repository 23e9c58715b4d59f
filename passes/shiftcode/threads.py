"""Running work on independent tiles on all cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

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


def side_by_side(count: int, run: Callable[[int], Result]) -> list[Result]:
    """Return `run(i)` for each i below `count`, on as many threads as torch uses; torch takes one core in each.

    Tensor operations and compiled loops take turns in `run`, and cores that wait for the next operation of one kind
    would keep the other kind from them.
    """
    threads = torch.get_num_threads()
    if min(threads, count) <= 1:
        return [run(i) for i in range(count)]
    torch.set_num_threads(1)
    try:
        # Each thread of torch's own has its count from when it starts.
        with ThreadPoolExecutor(min(threads, count), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, range(count)))
    finally:
        torch.set_num_threads(threads)
