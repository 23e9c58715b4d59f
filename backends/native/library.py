"""The kernel library in Python: loaded once, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from backends.native.build import built_library
from backends.native.layout import VERSION, Layout, Packed
from ir.errors import UnsupportedError, UsageError

MODES = {"exact": 0, "14bit": 1, "8bit": 2}
DEFAULT_MODE = "14bit"


class _Layout(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("version", "planes", "group", "terms", "tied", "offset")),
        *((name, c_int64) for name in ("rows", "inputs")),
    )


_SIGNATURES = {
    "nomul_weight_bytes": (c_int64, [POINTER(_Layout)]),
    "nomul_scratch_bytes": (c_int64, [POINTER(_Layout), c_int64, c_int32]),
    "nomul_prepare": (c_int, [POINTER(_Layout), c_int32, c_void_p, c_int64, c_void_p]),
    "nomul_stream": (c_uint64, [c_void_p, c_int64, c_int64, c_int32, c_int32]),
    "nomul_linear": (
        c_int,
        [POINTER(_Layout), c_int32, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int32],
    ),
    "nomul_hadamard": (
        c_int,
        [c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int64, POINTER(c_int64), POINTER(c_void_p), c_void_p],
    ),
    "nomul_decode": (c_int, [POINTER(_Layout), c_void_p, c_int64, c_int64, c_void_p]),
    "nomul_level": (c_char_p, []),
    "nomul_levels": (c_char_p, []),
    "nomul_set_level": (c_int, [c_char_p]),
    "nomul_error": (c_char_p, []),
    "nomul_version": (c_int32, []),
}


@cache
def load(path: Path | None = None) -> Library:
    """Load the library at `path`, or the one that was built for this machine.

    Raises UnsupportedError for a file that is no such library, is of another version, or cannot be built.
    """
    where = built_library() if path is None else path
    try:
        handle = ctypes.CDLL(str(where))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UnsupportedError("the kernel library cannot be loaded", where=str(where), why=str(error)) from error
    if (version := handle.nomul_version()) != VERSION:
        raise UnsupportedError(
            "the kernel library is of another version",
            where=str(where),
            why=f"it reads weight layout {version}, this is {VERSION}",
            fix="build it again from this release",
        )
    return Library(handle)


class Library:
    """The kernels of one loaded library."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle

    @property
    def level(self) -> str:
        """The instruction set in use; raises UnsupportedError when one is forced that this CPU lacks."""
        name: bytes = self._handle.nomul_level()
        if not name:
            raise UnsupportedError("NOMUL_LEVEL names no level of this CPU", why=f"it runs {', '.join(self.levels)}")
        return name.decode()

    @property
    def levels(self) -> tuple[str, ...]:
        """The instruction sets that this CPU runs, from the slowest to the fastest."""
        names: bytes = self._handle.nomul_levels()
        return tuple(names.decode().split(","))

    def use(self, level: str) -> None:
        """Choose an instruction set for all that follows; raises UnsupportedError for one that this CPU lacks."""
        self._done(self._handle.nomul_set_level(level.encode()))

    def weight_bytes(self, layout: Layout) -> int:
        """Return the bytes of a weight in tile order; raises UnsupportedError for a layout that cannot be."""
        found: int = self._handle.nomul_weight_bytes(byref(_struct(layout)))
        if found < 0:
            self._done(1)
        return found

    def linear(
        self, x: Tensor, weight: Packed, bias: Tensor | None = None, mode: str = DEFAULT_MODE, threads: int = 1
    ) -> Tensor:
        """Return x W^T + bias, float32 [..., N], for float32 x [..., K] and bias [N]; mode: one of `MODES`.

        Raises UsageError for shapes, dtypes and modes that do not fit.
        """
        layout = weight.layout
        _check(x, bias, layout, mode)
        flat = x.reshape(-1, layout.inputs).contiguous()
        out = torch.empty(flat.shape[0], layout.rows)
        self._done(
            self._handle.nomul_linear(
                byref(_struct(layout)),
                MODES[mode],
                weight.data.data_ptr(),
                weight.data.numel(),
                None if bias is None else bias.contiguous().data_ptr(),
                flat.data_ptr(),
                flat.shape[0],
                out.data_ptr(),
                threads,
            )
        )
        return out.reshape(*x.shape[:-1], layout.rows)

    def decode(self, weight: Packed) -> Tensor:
        """Return the weight as float32 [N, K]."""
        layout = weight.layout
        out = torch.empty(layout.rows, layout.inputs)
        if weight.data.numel() != self.weight_bytes(layout):
            raise UsageError("the weight does not have the bytes of its layout", why=f"{weight.data.numel()}")
        self._done(
            self._handle.nomul_decode(byref(_struct(layout)), weight.data.data_ptr(), 0, layout.rows, out.data_ptr())
        )
        return out

    def hadamard(self, x: Tensor, signs: Tensor, columns: Sequence[Tensor], transposed: bool = False) -> Tensor:
        """Return H D x, or D H^T x, for float32 x [..., K], signs [K] and the factors of H by columns."""
        flat = x.reshape(-1, signs.numel()).contiguous()
        out = torch.empty_like(flat)
        sizes = (c_int64 * len(columns))(*(c.shape[0] for c in columns))
        pointers = (c_void_p * len(columns))(*(c.data_ptr() for c in columns))
        self._done(
            self._handle.nomul_hadamard(
                *(flat.data_ptr(), flat.shape[0], flat.shape[1], signs.data_ptr(), int(transposed)),
                *(len(columns), sizes, pointers, out.data_ptr()),
            )
        )
        return out.reshape(x.shape)

    def stream(self, data: Tensor, times: int = 1, threads: int = 1, in_order: bool = False) -> int:
        """Read a tensor's memory, a part a thread, `times` times over, and return a number that depends on all of it.

        in_order: byte after byte; else eight pages at once, which is as fast as memory gives.
        """
        found: int = self._handle.nomul_stream(data.data_ptr(), data.nbytes, times, threads, int(in_order))
        return found

    def linear_call(self, x: Tensor, weight: Packed, out: Tensor, mode: str, threads: int) -> Callable[[], int]:
        """Return a call of `linear` with its arguments bound, for timing: out [..., N] takes the result.

        x, weight and out must outlive it.
        """
        layout, data = weight.layout, weight.data
        _check(x, None, layout, mode)
        pointers = data.data_ptr(), data.numel(), None, x.data_ptr(), x.numel() // layout.inputs, out.data_ptr()
        return partial(self._handle.nomul_linear, byref(_struct(layout)), MODES[mode], *pointers, threads)

    def prepare_call(self, x: Tensor, layout: Layout, mode: str) -> Callable[[], object]:
        """Return a call that makes the tables of activations x [..., K], for timing; x must outlive it."""
        _check(x, None, layout, mode)
        struct, tokens = _struct(layout), x.numel() // layout.inputs
        room = torch.empty(self._handle.nomul_scratch_bytes(byref(struct), tokens, MODES[mode]) + 64, dtype=torch.uint8)
        # The kernels want it at a multiple of 64 bytes, and a view keeps the memory alive.
        scratch = room[-room.data_ptr() % 64 :]
        call = partial(self._handle.nomul_prepare, byref(struct), MODES[mode], x.data_ptr(), tokens)
        return lambda: call(scratch.data_ptr())

    def _done(self, code: int) -> None:
        if code:
            reason: bytes = self._handle.nomul_error()
            raise UnsupportedError("the kernel library refuses", why=reason.decode())


def _struct(layout: Layout) -> _Layout:
    return _Layout(**layout.attributes())


def _check(x: Tensor, bias: Tensor | None, layout: Layout, mode: str) -> None:
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode}", where="mode", fix=f"use one of {', '.join(MODES)}")
    if x.dtype != torch.float32 or x.ndim < 1 or x.shape[-1] != layout.inputs:
        raise UsageError(
            "the activations do not fit the weight",
            why=f"they are {x.dtype} {list(x.shape)}, float32 [..., {layout.inputs}] is needed",
        )
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (layout.rows,)):
        raise UsageError(
            "the bias does not fit the weight",
            why=f"it is {bias.dtype} {list(bias.shape)}, float32 [{layout.rows}] is needed",
        )
