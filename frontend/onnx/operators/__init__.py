"""The rules for ONNX operators, one module a family; importing this package enters them all into the tables."""

from __future__ import annotations

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
