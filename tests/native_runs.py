"""Pieces of Python that use the kernels in a process of their own, which a missing check would end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What every piece of code below starts from; `told` prints the message of the error that a call must raise.
START = """
import ctypes, sys
from pathlib import Path
import numpy as np, torch
from backends.native.layout import Packed, pack
from backends.native.library import MODES, load
from tests.coded_weights import quant_codes, shift_codes
PACKED = pack(shift_codes(40, 96, 3, 32, 2, True, seed=3, spread=2))
def told(call, kind=Exception):
    try:
        call()
    except kind as error:
        print(" ".join(str(error).split()))
    else:
        raise AssertionError("nothing was raised")
"""


def lines_of(code: str, *arguments: object, **environment: str) -> list[str]:
    """Return the lines that Python code prints in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", START + code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()
