"""The presets of `omniquant`: what its options take that are not given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ir.analysis import LinearSite
from passes.equiv.groups import Kind

Preset = Literal["none", "w4a16g64", "w3a16g64", "w2a16g64", "w8a8", "w6a6", "w4a4"]

# Bits that stand for values left in float.
FLOAT = 16
FAST_EPOCHS = 4
_WEIGHTS = {"group": 64, "act": FLOAT, "kv": FLOAT}
PRESETS: dict[Preset, dict[str, int]] = {
    "none": {"bits": 4, **_WEIGHTS, "epochs": 10},
    "w4a16g64": {"bits": 4, **_WEIGHTS, "epochs": 10},
    "w3a16g64": {"bits": 3, **_WEIGHTS, "epochs": 20},
    "w2a16g64": {"bits": 2, **_WEIGHTS, "epochs": 40},
    "w8a8": {"bits": 8, "group": 0, "act": 8, "kv": 8, "epochs": 10},
    "w6a6": {"bits": 6, "group": 0, "act": 6, "kv": 6, "epochs": 20},
    "w4a4": {"bits": 4, "group": 0, "act": 4, "kv": 4, "epochs": 20},
}


@dataclass(frozen=True)
class Settled:
    """Options as a preset and the user settle them; a group of 0 stands for whole rows, 16 bits for floats."""

    bits: int
    group: int
    act: int
    kv: int
    epochs: int
    sites: tuple[Kind, ...]

    def group_of(self, site: LinearSite) -> int:
        """Return the inputs of a site that share a scale."""
        return self.group or site.inputs
