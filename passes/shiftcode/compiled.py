"""Compiling the solver's loops, with a cache on disk that knows every file that compiled code comes from.

numba dates what it keeps by the one file a function stands in, but a function takes in others that it calls: after a
change to one of these it would go on with the old code. Here all are dated by the text of all such files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

SOURCES = ("rounding.py", "levels.py", "value_fit.py", "kernels.py", "joint.py")
_STAMP = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in SOURCES)).hexdigest()
_FAST = {"reassoc", "contract", "arcp", "nsz"}

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Return a function as machine code, compiled on its first call; it runs without the interpreter's lock.

    The function's file must be one of `SOURCES`. Sums may be taken in another order, everything else is as written.
    """
    made: Any = njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")(function)
    made._cache._cache_file._source_stamp = _STAMP
    return made
