"""The packages this backend needs, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from ir.errors import UnsupportedError

EXTRA = "onnx"


def package(name: str) -> Any:
    """Return the package `onnx_ir` or `onnxruntime`; raises UnsupportedError that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"the target onnxruntime needs the package {name}",
            where=name,
            why=str(error),
            fix=f"install it with the extra `{EXTRA}`: pip install 'nomul[{EXTRA}]'",
        ) from error
