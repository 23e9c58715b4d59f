"""Signals: Fourier transforms, of whole signals and of frames, windows, and the matrix of the mel scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from frontend.onnx.arguments import axis_of, number_of, size_of
from frontend.onnx.call import Call
from frontend.onnx.registry import operator

# The weights of a constant and of cosines of once and twice the window's length.
_WINDOWS = {
    "BlackmanWindow": (0.42, -0.5, 0.08),
    "HammingWindow": (25 / 46, -21 / 46, 0.0),
    "HannWindow": (0.5, -0.5, 0.0),
}


@operator("DFT", raw=True)
def _dft(call: Call, x: Any, length: Any = None, axis: Any = None) -> Tensor:
    """The last axis has the real part, and the imaginary part where there is one.

    With onesided, of a real signal's spectrum, symmetric as it is, only the first half is given or read.
    """
    usual = call.integer("axis", 1) if call.version < 20 else -2
    along = axis_of(usual if axis is None else size_of(call, axis, "its axis"), x.ndim)
    inverse, half = call.flag("inverse"), call.flag("onesided")
    if along == x.ndim - 1 or x.shape[-1] not in (1, 2):
        raise call.refuse(f"its axis is {along} and its input has shape {tuple(x.shape)}")
    if half and (x.shape[-1] == 2) != inverse:
        raise call.refuse("one side of a spectrum belongs to a real signal")
    size = x.shape[along]
    if length is not None:
        size = size_of(call, length, "its length")
    elif half and inverse:
        size = 2 * (size - 1)
    signal = _complex(_wide(x))
    found: Tensor
    if half and inverse:
        found = torch.fft.irfft(signal, size, along)[..., None]
    elif inverse:
        found = torch.view_as_real(torch.fft.ifft(signal, size, along).resolve_conj())
    else:
        found = _spectrum(signal, size, along, half)
    return found.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Return a tensor of a type that has Fourier transforms."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _complex(x: Tensor) -> Tensor:
    """Return a signal without its last axis: real, or complex where that has two entries."""
    return x[..., 0] if x.shape[-1] == 1 else torch.complex(x[..., 0], x[..., 1])


def _spectrum(signal: Tensor, size: Any, axis: int, half: bool) -> Tensor:
    """Return a signal's spectrum, its real and imaginary parts on a new last axis."""
    return torch.view_as_real((torch.fft.rfft if half else torch.fft.fft)(signal, size, axis))


@operator("STFT", raw=True)
def _stft(call: Call, x: Any, step: Any, window: Any = None, length: Any = None) -> Tensor:
    """The result: (batch, frame, frequency, real and imaginary part)."""
    half = call.flag("onesided", True)
    if x.ndim != 3 or (half and x.shape[-1] != 1):
        raise call.refuse(f"its input has shape {tuple(x.shape)}, onesided is {half}")
    size = x.shape[1] if window is None else window.shape[0]
    if length is not None:
        given = size_of(call, length, "the length of its frames")
        if window is not None and given != size:
            raise call.refuse(f"its frames have length {given} and its window {size}")
        size = given
    signal = _complex(_wide(x))
    frames = signal.unfold(1, size, size_of(call, step, "the step between its frames"))
    if window is not None:
        frames = frames * _wide(window)
    return _spectrum(frames, size, 2, half).to(x.dtype)


@operator(*_WINDOWS, raw=True)
def _window(call: Call, size: Any) -> Tensor:
    """A periodic window is one that is longer by one, without its last entry."""
    count = number_of(call, size, "its size")
    if not isinstance(count, int):
        raise call.unknown("its size")
    length = count if call.flag("periodic", True) else count - 1
    if length < 1:
        raise call.refuse(f"its size is {count}")
    constant, once, twice = _WINDOWS[call.op]
    turn = 2 * np.pi * np.arange(count) / length
    found = constant + once * np.cos(turn) + twice * np.cos(2 * turn)
    return torch.from_numpy(found).to(call.dtype("output_datatype", torch.float32))


@operator("MelWeightMatrix", raw=True)
def _mel_weight_matrix(call: Call, bins: Any, length: Any, rate: Any, lowest: Any, highest: Any) -> Tensor:
    """Triangles over a spectrum's frequencies whose corners lie evenly on the mel scale: (frequency, bin).

    The step from corner to corner is that of one more bin than there are, as in ONNX's reference.
    """
    names = ("the number of bins", "the transform's length", "the sample rate", "the lowest edge", "the highest edge")
    known = [number_of(call, v, name) for v, name in zip((bins, length, rate, lowest, highest), names, strict=True)]
    count, size, samples, begin, end = known
    low, high = (2595 * np.log10(1 + edge / 700) for edge in (begin, end))
    mel = low + np.arange(count + 2) * (high - low) / (count + 2)
    corner = ((size + 1) * (700 * (10 ** (mel / 2595) - 1)) // samples).astype(np.int64)
    left, middle, right = corner[:-2], corner[1:-1], corner[2:]
    at = np.arange(size // 2 + 1)[:, None]
    rise = np.where((at >= left) & (at < middle), (at - left) / np.maximum(middle - left, 1), 0)
    fall = np.where((at > middle) & (at < right), (right - at) / np.maximum(right - middle, 1), 0)
    found = rise + fall + (at == middle)
    return torch.from_numpy(found).to(call.dtype("output_datatype", torch.float32))
