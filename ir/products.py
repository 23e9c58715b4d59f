"""The precision in which float32 matrix products are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Take float32 matrix products in `precision` meanwhile: bfloat16 rounds their inputs and adds in float32."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    kept, setting.fp32_precision = setting.fp32_precision, "bf16" if precision == "bfloat16" else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = kept
