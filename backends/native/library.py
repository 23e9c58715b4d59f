"""The kernel library in Python: loaded once, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from backends.native.build import built_library, require_whole
from backends.native.layout import VERSION, Layout, Packed
from ir.errors import UnsupportedError, UsageError

MODES = {"exact": 0, "14bit": 1, "8bit": 2}
DEFAULT_MODE = "14bit"


class _Layout(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("version", "planes", "group", "terms", "tied", "offset")),
        *((name, c_int64) for name in ("rows", "inputs")),
    )


class _Dense(ctypes.Structure):
    _fields_ = (("kind", c_int32), ("rows", c_int64), ("inputs", c_int64), ("scales", c_void_p))


_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2}
# Inputs that share a scale of int8.
BLOCK = 32

_SIGNATURES = {
    "nomul_weight_bytes": (c_int64, [POINTER(_Layout)]),
    "nomul_scratch_bytes": (c_int64, [POINTER(_Layout), c_int64, c_int32]),
    "nomul_prepare": (c_int, [POINTER(_Layout), c_int32, c_void_p, c_int64, c_void_p]),
    "nomul_stream": (c_uint64, [c_void_p, c_int64, c_int64, c_int32, c_int32]),
    "nomul_linear": (
        c_int,
        [POINTER(_Layout), c_int32, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int32],
    ),
    "nomul_dense_linear": (
        c_int,
        [POINTER(_Dense), c_int32, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int32],
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

    Raises UnsupportedError for a file that is damaged or none of nomul's, is of another version, or cannot be built.
    """
    where = built_library() if path is None else path
    if path is not None:
        require_whole(path)
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

        Raises UsageError for shapes, dtypes and modes that do not fit. A token with values that are not finite gives
        no finite results; other tokens are not touched by it.
        """
        _check_weight(weight, self.weight_bytes(weight.layout))
        form = _struct(weight.layout), weight.layout.rows, weight.layout.inputs
        return self._product(self._handle.nomul_linear, form, x, weight.data, bias, mode, threads)

    def dense_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        mode: str = DEFAULT_MODE,
        threads: int = 1,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Return x W^T + bias as `linear` does, for a weight [N, K] of bfloat16, float16 or int8.

        scales: of int8 and only of it, float16 [N, ceil(K / 32)].
        """
        if weight.dtype not in _KINDS or weight.ndim != 2:
            raise UsageError(
                "the weight does not fit the kernels of stored weights",
                why=f"it is {_kind(weight)}, bfloat16, float16 or int8 [N, K] is needed",
            )
        rows, inputs = weight.shape
        wanted = (rows, -(-inputs // BLOCK)) if weight.dtype == torch.int8 else None
        if (None if scales is None else tuple(scales.shape)) != wanted or (
            scales is not None and scales.dtype != torch.float16
        ):
            raise UsageError(
                "the scales do not fit the weight",
                why="int8 needs float16 [N, ceil(K / 32)], floats need none",
            )
        held = None if scales is None else scales.contiguous()
        place = None if held is None else held.data_ptr()
        form = _Dense(_KINDS[weight.dtype], rows, inputs, place), rows, inputs
        return self._product(self._handle.nomul_dense_linear, form, x, weight.contiguous(), bias, mode, threads)

    def _product(
        self,
        function: Callable[..., int],
        form: tuple[ctypes.Structure, int, int],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mode: str,
        threads: int,
    ) -> Tensor:
        struct, rows, inputs = form
        _check(x, bias, rows, inputs, mode)
        if threads < 1:
            raise UsageError(f"there cannot be {threads} threads", where="threads", fix="ask for at least one")
        flat = x.reshape(-1, inputs).contiguous()
        # Held until the call is over: a copy may be all that keeps the memory.
        held = None if bias is None else bias.contiguous()
        out = torch.empty(flat.shape[0], rows)
        self._done(
            function(
                *(byref(struct), MODES[mode], weight.data_ptr(), weight.nbytes),
                *(None if held is None else held.data_ptr(), flat.data_ptr(), flat.shape[0], out.data_ptr()),
                min(threads, _MOST),
            )
        )
        return out.reshape(*x.shape[:-1], rows)

    def decode(self, weight: Packed) -> Tensor:
        """Return the weight as float32 [N, K]."""
        layout = weight.layout
        _check_weight(weight, self.weight_bytes(layout))
        out = torch.empty(layout.rows, layout.inputs)
        self._done(
            self._handle.nomul_decode(byref(_struct(layout)), weight.data.data_ptr(), 0, layout.rows, out.data_ptr())
        )
        return out

    def hadamard(self, x: Tensor, signs: Tensor, columns: Sequence[Tensor], transposed: bool = False) -> Tensor:
        """Return H D x, or D H^T x, for float32 x [..., K], signs [K] and the factors of H by columns.

        Raises UsageError for shapes and dtypes that do not fit, UnsupportedError for factors that do not.
        """
        _check_rotation(x, signs, columns)
        flat = x.reshape(-1, signs.numel()).contiguous()
        signs, columns = signs.contiguous(), [c.contiguous() for c in columns]
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
        _check(x, None, layout.rows, layout.inputs, mode)
        pointers = data.data_ptr(), data.numel(), None, x.data_ptr(), x.numel() // layout.inputs, out.data_ptr()
        return partial(self._handle.nomul_linear, byref(_struct(layout)), MODES[mode], *pointers, threads)

    def prepare_call(self, x: Tensor, layout: Layout, mode: str) -> Callable[[], object]:
        """Return a call that makes the tables of activations x [..., K], for timing; x must outlive it."""
        _check(x, None, layout.rows, layout.inputs, mode)
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


# ctypes takes the low bits of larger numbers.
_MOST = 2**31 - 1


def _struct(layout: Layout) -> _Layout:
    values = layout.attributes()
    large = [name for name, value in values.items() if not -_MOST <= value <= _MOST]
    if large:
        raise UsageError(f"a layout cannot have {large[0]} = {values[large[0]]}", where="layout")
    return _Layout(**values)


def _check(x: Tensor, bias: Tensor | None, rows: int, inputs: int, mode: str) -> None:
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode}", where="mode", fix=f"use one of {', '.join(MODES)}")
    if not _is_float(x) or x.ndim < 1 or x.shape[-1] != inputs:
        raise UsageError(
            "the activations do not fit the weight",
            why=f"they are {_kind(x)}, float32 [..., {inputs}] on the CPU is needed",
        )
    if bias is not None and (not _is_float(bias) or tuple(bias.shape) != (rows,)):
        raise UsageError(
            "the bias does not fit the weight",
            why=f"it is {_kind(bias)}, float32 [{rows}] on the CPU is needed",
        )


def _check_weight(weight: Packed, wanted: int) -> None:
    data = weight.data
    fits = data.dtype == torch.uint8 and data.device.type == "cpu" and data.is_contiguous()
    if not fits or data.numel() != wanted:
        raise UsageError(
            "the weight does not have the bytes of its layout",
            why=f"it is {_kind(data)}, contiguous uint8 [{wanted}] on the CPU is needed",
        )


def _check_rotation(x: Tensor, signs: Tensor, columns: Sequence[Tensor]) -> None:
    if not _is_float(signs) or signs.ndim != 1 or not signs.numel():
        raise UsageError("the signs do not fit a rotation", why=f"they are {_kind(signs)}, float32 [K] is needed")
    if not _is_float(x) or x.ndim < 1 or x.shape[-1] != signs.numel():
        raise UsageError(
            "the activations do not fit the signs",
            why=f"they are {_kind(x)}, float32 [..., {signs.numel()}] on the CPU is needed",
        )
    for factor in columns:
        if not _is_float(factor) or factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
            raise UsageError("a factor is no square matrix", why=f"it is {_kind(factor)}, float32 [n, n] is needed")


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
