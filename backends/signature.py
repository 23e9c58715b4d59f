"""What goes into a program and comes out of it, by name: for programs of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ir.analysis import result_names
from ir.errors import UsageError
from ir.execute import check_arrays
from ir.program import Program, tensor_type_of
from ir.types import TensorType, tensor_type


@dataclass(frozen=True)
class Signature:
    """Names and types of a program's inputs and results, in order."""

    program: Program
    inputs: Mapping[str, TensorType]
    results: Mapping[str, TensorType]

    def __repr__(self) -> str:
        """Return a line for each input and result."""
        pairs = [("input", self.inputs), ("result", self.results)]
        return "\n".join(f"{what:6} {name}: {kind}" for what, kinds in pairs for name, kind in kinds.items())

    def bind(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Return a tensor for every input, in order; raises UsageError where one is missing, too many or unfit."""
        check_arrays(self.program, feeds)
        sizes: dict[str, int] = {}
        for name, kind in self.inputs.items():
            tensor = feeds[name]
            for dim, size in zip(kind.dims, tensor.shape, strict=True):
                same = not isinstance(dim, str) or not dim.isidentifier() or sizes.setdefault(dim, size) == size
                if not same:
                    raise _unfit(name, tensor, f"{dim} is {sizes[str(dim)]} in another input")
            if tensor.dtype != kind.dtype:
                raise _unfit(name, tensor, f"it must be {kind}")
        return [feeds[name] for name in self.inputs]


def signature_of(program: Program) -> Signature:
    """Return the signature of a program."""
    inputs = {node.name: tensor_type_of(node) for node in program.inputs}
    results = zip(result_names(program), program.outputs, strict=True)
    return Signature(program, inputs, {name: tensor_type_of(node) for name, node in results})


def _unfit(name: str, tensor: Tensor, why: str) -> UsageError:
    return UsageError(f"{name} does not fit the program", where=name, why=f"{why}, not {tensor_type(tensor)}")
