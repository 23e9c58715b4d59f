"""Reading an ONNX file: what is damaged, or points outside its folder, is refused before anything is built from it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as onnx

from ir.errors import UnsupportedError, UsageError

# Entries that no tensor of a model has; a declared shape beyond is damage.
_MOST_ENTRIES = 1 << 40


def load(path: Path) -> onnx.Model:
    """Return a model whose weights are still in their files.

    Raises UsageError for a path that is no file, UnsupportedError for a file that is no ONNX model, for data that is
    missing, cut off or outside the model's folder, and for shapes that no tensor has.
    """
    if not path.is_file():
        raise UsageError("there is no such model", where=str(path), fix="check the path")
    try:
        model = onnx.load(path)
    # Damaged files raise whatever protobuf, numpy and onnx_ir happen to trip over.
    except Exception as error:
        raise _damaged(path, error) from error
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is None:
                raise UnsupportedError("an initializer has no value", where=f"{path}: {value.name}")
            _check_tensor(path, value.const_value)
    return model


def _check_tensor(path: Path, tensor: Any) -> None:
    """Raise UnsupportedError for a shape that no tensor has, or for data that is not there."""
    dims = list(tensor.shape)
    where = f"{path}: {tensor.name}"
    if any(not isinstance(d, int) or d < 0 for d in dims) or prod(dims) > _MOST_ENTRIES:
        raise UnsupportedError("a weight has a shape that no tensor has", where=where, why=f"it is {dims}")
    if isinstance(tensor, onnx.ExternalTensor):
        _check_external(path, tensor, where)
        return
    try:
        found, wanted = len(tensor.tobytes()), int(tensor.nbytes)
    except Exception as error:
        raise _damaged(path, error) from error
    if found != wanted:
        raise UnsupportedError("a weight's data does not fit its shape", where=where, why=f"{found} bytes for {wanted}")


def _check_external(path: Path, tensor: onnx.ExternalTensor, where: str) -> None:
    """Raise UnsupportedError unless a tensor's bytes lie in a file beside the model or below."""
    folder, location = path.parent.resolve(), str(tensor.location)
    place = (folder / location).resolve()
    if Path(location).is_absolute() or not place.is_relative_to(folder):
        raise UnsupportedError(
            "a weight's data lies outside the model's folder",
            where=where,
            why=f"its location is {location}",
            fix="put the data file beside the model, and name it without a path",
        )
    start, length = int(tensor.offset or 0), int(tensor.length or tensor.nbytes)
    size = place.stat().st_size if place.is_file() else None
    if size is None:
        raise UnsupportedError("a weight's data file is missing", where=where, why=f"there is no {location} beside it")
    if start < 0 or length != tensor.nbytes or start + length > size:
        why = (
            f"it has {size} bytes, and {length} from {start} on are asked for, of which a tensor takes {tensor.nbytes}"
        )
        raise UnsupportedError("a weight's data file is cut off, or another", where=where, why=why)


def _damaged(path: Path, error: Exception) -> UnsupportedError:
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
    return UnsupportedError(
        "this file is no ONNX model that can be read",
        where=str(path),
        why=f"{type(error).__name__}: {line[:200]}",
        fix="fetch or export the model again",
    )
