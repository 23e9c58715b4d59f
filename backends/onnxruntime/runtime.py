"""The ONNX Runtime runtime: torch tensors bound in and out without copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ir.types import TensorType

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
        binding, held = self._session.io_binding(), []
        sizes: dict[str, int] = {}
        for name, node, tensor in zip(self._inputs, self.program.inputs, inputs, strict=True):
            given = tensor.detach().contiguous()
            held.append(given)
            self._learn(sizes, tensor_type_of(node), given)
            if name in self._read:
                _bind(binding.bind_input, name, given)
        outputs = self._outputs(sizes)
        for index, room in enumerate(outputs):
            if room is None:
                binding.bind_output(output_name(index))
            else:
                _bind(binding.bind_output, output_name(index), room)
        self._run(binding)
        found = binding.get_outputs() if any(room is None for room in outputs) else ()
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

    def _learn(self, sizes: dict[str, int], kind: TensorType, given: Tensor) -> None:
        """Note what the symbolic dims of an input are in this run; raises UsageError where two disagree."""
        for dim, size in zip(kind.dims, given.shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim_name(dim), size) != size:
                raise UsageError(
                    "the inputs do not fit each other", where=dim, why=f"it is {sizes[dim_name(dim)]} and {size}"
                )

    def _outputs(self, sizes: dict[str, int]) -> list[Tensor | None]:
        """Return memory for every output, None where its size follows from no input.

        The allocator hands the memory of the last step's cache out again; a pool of blocks of our own took as long.
        """
        known = {"total": sizes.get("past", 0) + sizes.get("seq", 0), **sizes}
        shapes = [_dims(kind, known) for kind in self._kinds]
        pairs = zip(self._kinds, shapes, strict=True)
        return [None if dims is None else torch.empty(dims, dtype=kind.dtype) for kind, dims in pairs]

    def _check_names(self) -> None:
        found = [o.name for o in self._session.get_outputs()]
        wanted = [output_name(i) for i in range(len(self._kinds))]
        if found != wanted or not self._read <= set(self._inputs):
            raise UnsupportedError(
                "the model file is not of this program",
                where=str(self.folder),
                why=f"its inputs are {sorted(self._read)[:3]}..., its outputs {found[:3]}...",
                fix="compile the artifact again",
            )


def _dims(kind: TensorType, known: dict[str, int]) -> list[int] | None:
    """Return the dims of an output in this run, None where one of them is unknown."""
    dims = [d if isinstance(d, int) else known.get(dim_name(d), -1) for d in kind.dims]
    return None if -1 in dims else dims


def _bind(function: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor's memory; an empty tensor has none, so that any address will do."""
    address = tensor.data_ptr() or torch.empty(1).data_ptr()
    function(name, "cpu", 0, _element(tensor.dtype), tuple(tensor.shape), address)


def _element(dtype: torch.dtype) -> Any:
    import numpy

    return numpy.dtype(numpy_name(dtype)).type
