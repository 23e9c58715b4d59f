"""One ONNX node while it is run: its operator and version, its attributes by type, and how to refuse it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from frontend.onnx.dtypes import torch_dtype
from ir.errors import UnsupportedError


class Refused(UnsupportedError):
    """A node that cannot become a program, by its name."""


class Unknown(Refused):
    """A node that needs, while a model is imported, a value that only running it would tell."""


@dataclass(frozen=True, eq=False)
class Call:
    """A node as the rules of `frontend.onnx.operators` see it.

    op: its operator with the domain before it unless that is ONNX's own, such as `com.microsoft.Gelu`; version: of the
    operator set that the model asks for; outputs: how many of its results have a name, with gaps counted; wanted: which
    of them have one.
    """

    op: str
    version: int
    name: str
    attributes: Mapping[str, Any]
    wanted: tuple[bool, ...]

    @property
    def outputs(self) -> int:
        """How many results are asked for, unnamed ones between named ones included."""
        return len(self.wanted)

    def has(self, name: str) -> bool:
        """Return whether an attribute is given."""
        return name in self.attributes

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value as onnx_ir has it: int, float, str, a sequence of these, a tensor or a graph."""
        found = self.attributes.get(name)
        return default if found is None else found.value

    def integer(self, name: str, default: int) -> int:
        """Return a whole number."""
        return int(self.get(name, default))

    def real(self, name: str, default: float) -> float:
        """Return a number."""
        return float(self.get(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        """Return whether a number is not 0."""
        return bool(self.get(name, int(default)))

    def text(self, name: str, default: str) -> str:
        """Return a string."""
        found = self.get(name, default)
        return found.decode() if isinstance(found, bytes) else str(found)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """Return whole numbers, None where the attribute is absent and has no default."""
        found = self.get(name, default)
        return None if found is None else [int(v) for v in found]

    def dtype(self, name: str, default: torch.dtype | None = None) -> torch.dtype:
        """Return the torch dtype that an attribute names by its number; raises Refused for none torch has."""
        found = self.get(name)
        if found is None and default is not None:
            return default
        dtype = None if found is None else torch_dtype(int(found))
        if dtype is None:
            raise self.refuse(f"its attribute {name} names the type {found}, which no tensor here has")
        return dtype

    def refuse(self, why: str) -> Refused:
        """Return the error that says why this node cannot be taken."""
        return Refused(f"operator {self.op} cannot be imported", where=self.where, why=why)

    def unknown(self, what: str) -> Unknown:
        """Return the error that says which value must be known when the model is imported."""
        why = f"{what} comes from data, and must be known when the model is imported"
        return Unknown(f"operator {self.op} cannot be imported", where=self.where, why=why)

    @property
    def where(self) -> str:
        """The node's name, for messages."""
        return f"node {self.name or '(without a name)'}"
