"""The ONNX Runtime runtime: torch tensors bound in and out without copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backends.base import Runtime
from backends.onnxruntime.dtypes import numpy_name
from backends.onnxruntime.names import dim_name, input_name, output_name
from backends.onnxruntime.session import SessionOptions, first_line, open_session
from ir.errors import UnsupportedError, UsageError
from ir.program import Program, tensor_type_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OnnxRuntime(Runtime):
    """Runs the `model.onnx` of an artifact folder; raises UnsupportedError when it cannot be opened.

    options: threads, and the library of custom operators that the file calls, if it calls any.
    """

    def __init__(
        self,
        program: Program,
        folder: Path,
        tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
        options: SessionOptions | None = None,
    ) -> None:
        super().__init__(program, folder, tokenizer)
        self.options = options or SessionOptions()
        self._session = open_session(folder, self.options)
        self._inputs = tuple(input_name(program, i) for i in range(len(program.inputs)))
        self._kinds = tuple(tensor_type_of(n) for n in program.outputs)
        self._alike = {k: [i for i, other in enumerate(self._kinds) if other == k] for k in dict.fromkeys(self._kinds)}
        self._names = tuple(output_name(program, i) for i in range(len(self._kinds)))
        self._places = _places(program)
        self._read = {i.name for i in self._session.get_inputs()}
        self._check_names()

    @property
    def session(self) -> Any:
        """The `onnxruntime.InferenceSession`."""
        return self._session

    def execute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the program on tensors for its inputs, in order, and return its outputs.

        Raises UsageError when the runtime refuses the inputs.
        """
        binding = self._session.io_binding()
        held = [t if t.is_contiguous() else t.contiguous() for t in inputs]
        for name, tensor in zip(self._inputs, held, strict=True):
            if name in self._read:
                _bind(binding.bind_input, name, tensor)
        outputs = self._outputs({dim: held[index].shape[axis] for dim, (index, axis) in self._places.items()})
        for name, room in zip(self._names, outputs, strict=True):
            if room is None:
                binding.bind_output(name)
            else:
                _bind(binding.bind_output, name, room)
        self._run(binding)
        if all(room is not None for room in outputs):
            return tuple(room for room in outputs if room is not None)
        found = binding.get_outputs()
        return tuple(torch.from_numpy(found[i].numpy()) if r is None else r for i, r in enumerate(outputs))

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding)
        # The runtime's exceptions have no common base of their own.
        except Exception as error:
            raise UsageError(
                "ONNX Runtime could not run the program",
                where=str(self.folder),
                why=first_line(error),
                fix="check the inputs, or run with --target reference",
            ) from error

    def _outputs(self, sizes: dict[str, int]) -> list[Tensor | None]:
        """Return memory for every output, None where its size follows from no input.

        Outputs of one type, such as all keys and values, lie in one piece, which is made in one call. The allocator
        hands the memory of earlier steps out again; a pool of our own took as long.
        """
        known = {"total": sizes.get("past", 0) + sizes.get("seq", 0), **sizes}
        made: list[Tensor | None] = [None] * len(self._kinds)
        for kind, places in self._alike.items():
            dims = [d if isinstance(d, int) else known.get(dim_name(d), -1) for d in kind.dims]
            if -1 not in dims:
                rooms = torch.empty([len(places), *dims], dtype=kind.dtype).unbind()
                for place, room in zip(places, rooms, strict=True):
                    made[place] = room
        return made

    def _check_names(self) -> None:
        found = [o.name for o in self._session.get_outputs()]
        if found != list(self._names) or not self._read <= set(self._inputs):
            raise UnsupportedError(
                "the model file is not of this program",
                where=str(self.folder),
                why=f"its inputs are {sorted(self._read)[:3]}..., its outputs {found[:3]}...",
                fix="compile the artifact again",
            )


def _places(program: Program) -> dict[str, tuple[int, int]]:
    """Return symbolic dim -> the first input that has it, and which of its dims it is."""
    found: dict[str, tuple[int, int]] = {}
    for index, node in enumerate(program.inputs):
        for axis, dim in enumerate(tensor_type_of(node).dims):
            if isinstance(dim, str):
                found.setdefault(dim_name(dim), (index, axis))
    return found


def _bind(function: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor's memory; an empty tensor has none, so that any address will do."""
    address = tensor.data_ptr() or torch.empty(1).data_ptr()
    function(name, "cpu", 0, _element(tensor.dtype), tuple(tensor.shape), address)


@cache
def _element(dtype: torch.dtype) -> Any:
    import numpy

    return numpy.dtype(numpy_name(dtype)).type
