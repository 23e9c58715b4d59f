"""Bodies of model-local functions: graphs of standard operators, put together node by node.

A body offers what an emitter offers to table entries, for a graph that belongs to no program. The names of all values
are unique in a function, graphs inside its nodes included, so that nothing hides what it captures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from backends.onnxruntime.dtypes import onnx_dtype
from backends.onnxruntime.packages import package


class Body:
    """The nodes of a function, or of a graph inside one, which `inner` begins."""

    def __init__(self, opset: int, outer: Body | None = None) -> None:
        self._ir, self.opset, self._nodes = package("onnx_ir"), opset, list[Any]()
        self._inputs: list[Any] = []
        self._serial: Iterator[int] = count() if outer is None else outer._serial
        self._constants: dict[Any, Any] = {}

    def inner(self) -> Body:
        """Return the body of a graph inside this one; it may read the values of this one."""
        return Body(self.opset, self)

    def input(self, name: str, dtype: torch.dtype | None = None, shape: Sequence[int | None] | None = None) -> Any:
        """Return a new input; a graph inside a node says its dtype and shape, None for a dim that is not known."""
        value = self._ir.Value(name=name)
        if dtype is not None and shape is not None:
            value = self.typed(self._ir.Value(name=f"{name}{next(self._serial)}"), dtype, shape)
        self._inputs.append(value)
        return value

    def add(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node of a standard operator; inputs, attributes and result are as for `Emitter.add`."""
        given = [self.vector(i) if isinstance(i, (list, tuple)) else i for i in inputs]
        kept = {name: value for name, value in attributes.items() if value is not None}
        node = self._ir.node(op, given, attributes=kept, num_outputs=outputs)
        for value in node.outputs:
            value.name = f"v{next(self._serial)}"
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, tensor: Tensor) -> Any:
        """Return a constant; equal ones of a graph are made once."""
        key = tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes()
        if key not in self._constants:
            self._constants[key] = self.add("Constant", value=self._ir.tensor(tensor.contiguous().numpy()))
        return self._constants[key]

    def vector(self, numbers: Sequence[int]) -> Any:
        """Return a constant int64 vector."""
        return self.constant(torch.tensor(list(numbers), dtype=torch.long))

    def typed(self, value: Any, dtype: torch.dtype, shape: Sequence[int | None]) -> Any:
        """Return a value under a dtype and shape, which the outputs of a graph inside a node must have."""
        value.type, value.shape = self._ir.TensorType(onnx_dtype(dtype)), self._ir.Shape(shape)
        return value

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Return a value cast to a dtype."""
        return self.add("Cast", value, to=int(onnx_dtype(dtype)))

    def cut(self, value: Any, start: int, stop: int, axis: int) -> Any:
        """Return entries start to stop of an axis."""
        return self.add("Slice", value, [start], [stop], [axis])

    def take(self, value: Any, index: int, axis: int) -> Any:
        """Return entry `index` of an axis, which goes."""
        return self.add("Gather", value, self.constant(torch.tensor(index)), axis=axis)

    def look_up(self, table: Tensor, index: Any) -> Any:
        """Return the entries (of the first dim) of a constant table at an int32 index."""
        return self.add("Gather", self.constant(table), index)

    def quotients(self, length: Any, divisor: int) -> Any:
        """Return i // divisor for i from 0 up to `length`, an int or an int64 scalar."""
        stop = self.constant(torch.tensor(length)) if isinstance(length, int) else length
        zero, one = self.constant(torch.tensor(0)), self.constant(torch.tensor(1))
        return self.add("Div", self.add("Range", zero, stop, one), self.constant(torch.tensor(divisor)))

    def graph(self, outputs: Sequence[Any], name: str) -> Any:
        """Return what was added as a graph for an attribute of a node."""
        return self._ir.Graph(self._inputs, outputs, nodes=self._nodes, name=name)

    def function(self, domain: str, name: str, overload: str, outputs: Any, attributes: Iterable[str], doc: str) -> Any:
        """Return what was added as an `onnx_ir.Function` whose nodes may have the attributes of these names.

        outputs: a value, or a tuple of several.
        """
        opsets = {"": self.opset}
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        graph = self._ir.Graph(self._inputs, given, nodes=self._nodes, name=name, opset_imports=opsets)
        graph.doc_string = doc
        undefined = self._ir.AttributeType.UNDEFINED
        declared = [self._ir.Attr(attribute, undefined, None) for attribute in attributes]
        return self._ir.Function(domain, name, overload, graph=graph, attributes=declared)


def rows_of(b: Body, x: Any, inputs: int) -> Any:
    """Return activations [..., inputs] one token a column, [inputs, tokens]."""
    return b.add("Transpose", b.add("Reshape", x, [-1, inputs]), perm=[1, 0])


def result_of(b: Body, columns: Any, x: Any, bias: Any | None, outputs: int) -> Any:
    """Return results [outputs, tokens] plus a bias in the shape of the activations x, [..., outputs]."""
    y = b.add("Transpose", columns, perm=[1, 0])
    if bias is not None:
        y = b.add("Add", y, bias)
    shape = b.add("Concat", b.add("Shape", x, end=-1), b.vector([outputs]), axis=0)
    # A batch without tokens has a dim of 0, which is not to be copied from elsewhere.
    return b.add("Reshape", y, shape, allowzero=1)
