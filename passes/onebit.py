"""`onebit`: whole weights trained as one plane of signs (OneBit)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from passes.rabit import Rabit


@dataclass(frozen=True)
class Onebit(Rabit):
    """Train weights as their signs with a scale a row, block by block and then end to end.

    Source: OneBit (2402.11295), without the norm that it puts behind every linear, which makes another architecture;
    its column factors are what the pass `svid` leaves for `fold`.
    """

    planes: int = field(default=1, metadata={"help": "planes of signs, 1 to 4"})

    name: ClassVar[str] = "onebit"
