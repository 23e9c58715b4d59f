"""Calibration from arrays: a .npz file with one array for every input of a model, its samples along the first axis."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import UsageError
from tools.calibration import BATCH_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from ir.execute import Batch
    from ir.program import Program

SUFFIX = ".npz"
_HELD_OUT = 64
# Values of an image that are taken for one token, as of patches of 16 by 16.
_PATCH = 256


@dataclass(frozen=True)
class ArrayData:
    """calibration, held_out: batches of arrays by input name, the latter from the file's last tenth; digest: sha256."""

    calibration: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    digest: str
    counted: None = None


def is_array_file(spec: str) -> bool:
    """Return whether calibration data is named that are arrays, not text."""
    return spec.lower().endswith(SUFFIX)


def load_arrays(spec: str) -> dict[str, Tensor]:
    """Return the arrays of a .npz file by name, all with the same number of samples.

    Raises UsageError for a file that is missing, damaged or empty, and for arrays of objects or text, without samples,
    of unequal numbers of samples, or with numbers that are not finite.
    """
    found = {name: _tensor(spec, name, array) for name, array in _read(spec).items()}
    counts = {name: len(tensor) for name, tensor in found.items()}
    if not counts:
        raise UsageError("the file holds no arrays", where=spec, fix="give one array for every input, under its name")
    if len(set(counts.values())) > 1:
        raise UsageError(
            "the arrays hold different numbers of samples",
            where=spec,
            why=", ".join(f"{name}: {count}" for name, count in counts.items()),
            fix="let the first axis of every array count the same samples",
        )
    return found


def _read(spec: str) -> dict[str, Any]:
    import numpy

    path = Path(spec).expanduser()
    try:
        with numpy.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
    raise UsageError(
        "the arrays cannot be read", where=spec, why=why, fix="write them with numpy.savez, numbers only, no objects"
    )


def _tensor(spec: str, name: str, array: Any) -> Tensor:
    import torch

    where = f"{spec}: {name}"
    try:
        tensor = torch.from_numpy(array)
    except TypeError:
        why = f"it is of type {array.dtype}"
        raise UsageError("an array holds no numbers that a model takes", where=where, why=why) from None
    if not tensor.ndim:
        raise UsageError("an array has no samples", where=where, why="it is a single number", fix="stack samples")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UsageError("an array holds numbers that are not finite", where=where, fix="check how it was made")
    return tensor


def array_data(program: Program, spec: str, arrays: Mapping[str, Tensor], samples: int, seed: int) -> ArrayData:
    """Draw samples from the first nine tenths of arrays by a local generator, and hold up to 64 of the rest out.

    A model whose batch is fixed gets whole batches of that. Raises UsageError where arrays do not fit the inputs and
    where there are fewer samples than asked for, with how many there are.
    """
    import torch

    from ir.execute import check_arrays

    unit = _fixed_rows(program)
    check_arrays(program, {name: tensor[: unit or 1] for name, tensor in arrays.items()})
    _check_rows(program, spec, arrays)
    count = len(next(iter(arrays.values())))
    whole = unit or 1
    wanted, pool = -(-samples // whole) * whole, count * 9 // 10
    held = min(_HELD_OUT, count - pool) // whole * whole or whole
    if wanted > pool or held > count - pool:
        most = pool // whole * whole
        raise UsageError(
            f"there are too few samples for --samples {samples}",
            where=spec,
            why=f"the first nine tenths of its {count} samples are {pool}" + (f", a batch is {unit}" if unit else ""),
            fix=f"give more samples, or --samples {most}" if most and held <= count - pool else "give more samples",
        )
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(seed))[:wanted]
    chosen = {name: tensor[order] for name, tensor in sorted(arrays.items())}
    # Copies: what was not chosen of a large file need not stay in memory.
    rest = {name: tensor[pool : pool + held].clone() for name, tensor in arrays.items()}
    rows = unit or max(1, BATCH_TOKENS // max(_tokens(tensor) for tensor in arrays.values()))
    return ArrayData(_parts(chosen, rows), _parts(rest, rows), _digest(chosen))


def _fixed_rows(program: Program) -> int | None:
    """Return how many samples a program takes at once, None for any number."""
    from ir.program import tensor_type_of

    sizes = [kind.dims[0] for node in program.inputs if (kind := tensor_type_of(node)).dims]
    return next((size for size in sizes if isinstance(size, int)), None)


def _check_rows(program: Program, spec: str, arrays: Mapping[str, Tensor]) -> None:
    """Raise UsageError for numbers of rows that a model's tables do not have."""
    from ir.lookups import looked_up

    for name, rows in looked_up(program).items():
        low, high = int(arrays[name].min()), int(arrays[name].max())
        if not 0 <= low <= high < rows:
            raise UsageError(
                f"the array {name} does not belong to the model",
                where=f"{spec}: {name}",
                why=f"its numbers run from {low} to {high}, the model's table from 0 to {rows - 1}",
                fix="make the arrays with the tokenizer or the labels of this model",
            )


def _tokens(tensor: Tensor) -> int:
    """Return about how many tokens a sample has: its second dim, or of an image its patches."""
    if tensor.ndim > 3:
        return max(1, math.prod(tensor.shape[1:]) // _PATCH)
    return max(1, int(tensor.shape[1])) if tensor.ndim > 1 else 1


def _parts(arrays: Mapping[str, Tensor], rows: int) -> tuple[Batch, ...]:
    from ir.execute import split_batch

    return tuple(split_batch(arrays, rows))


def _digest(arrays: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(arrays.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
