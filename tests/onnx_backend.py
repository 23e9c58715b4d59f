"""ONNX's own conformance suite through the importer: an adapter as `onnx.backend.base` has it, and its node tests."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx.backend.base import Backend, BackendRep

from frontend.onnx.call import Unknown
from frontend.onnx.trace import trace
from ir.errors import NomulError, UnsupportedError
from ir.program import Program


class Imported(BackendRep):
    """A model that becomes a program when inputs come, since sizes among them must be known then."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        model = onnx_ir.serde.deserialize_model(self.model)
        given = {str(v.name): _tensor(x) for v, x in zip(model.graph.inputs, inputs, strict=True)}
        # A program's inputs are tensors; how long a sequence is, and whether an option is there, is fixed.
        known = {n: t for n, t in given.items() if not isinstance(t, torch.Tensor)}
        try:
            program = trace(model, "model", known)
        except Unknown:
            # Numbers of few entries are shapes, axes and the like, which a deployed model has as constants.
            known |= {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.ndim <= 1 and t.numel() <= 64}
            program = trace(model, "model", known)
        rest = [t for n, t in given.items() if n not in known]
        flat = [_array(t) for t in run(program, rest)]
        lengths = program.attributes.get("sequences", {})
        found = list[Any]()
        for name in program.attributes["outputs"]:
            found.append([flat.pop(0) for _ in range(lengths[name])] if name in lengths else flat.pop(0))
        return tuple(found)


def run(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return a program's outputs."""
    with torch.no_grad():
        found = program.module()(*inputs)
    return found if isinstance(found, tuple) else (found,)


def _tensor(x: Any) -> Any:
    if x is None:
        return None
    if isinstance(x, list):
        return [_tensor(v) for v in x]
    array = np.asarray(plain(x))
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise UnsupportedError("an input is of a type that no tensor here has", why=str(array.dtype)) from error


def plain(x: Any) -> Any:
    """Return the suite's own tensors as numpy's, anything else as it is."""
    return onnx.numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


def _array(t: Any) -> Any:
    if isinstance(t, (list, tuple)):
        return [_array(v) for v in t]
    return t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy()


class NomulBackend(Backend):
    """The importer as ONNX's suite asks for it."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> Imported:
        return Imported(model)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device == "CPU"


@cache
def node_cases() -> dict[str, Any]:
    """Return the node tests for inference, by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    return {c.name: c for c in cases if not any("training" in o.domain for o in c.model.opset_import)}


def outcome(name: str) -> str:
    """Run a node test; return nothing where it passes, otherwise how it fails: `refused: ...` or `WRONG: ...`."""
    case = node_cases()[name]
    for inputs, expected in case.data_sets:
        try:
            found = NomulBackend.prepare(case.model).run(inputs)
        except NomulError as error:
            return f"refused: {error.what} ({error.why})"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure to be told
            return f"WRONG: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        wrong = _difference(found, expected, case)
        if wrong:
            return f"WRONG: {wrong}"
    return ""


def _difference(found: Sequence[Any], expected: Sequence[Any], case: Any) -> str:
    if len(found) != len(expected):
        return f"{len(found)} outputs instead of {len(expected)}"
    wrong = (_unlike(a, b, case) for a, b in zip(found, expected, strict=True))
    return next((why for why in wrong if why), "")


def _unlike(found: Any, expected: Any, case: Any) -> str:
    if isinstance(expected, list):
        return _difference(found, expected, case) if isinstance(found, list) else "no sequence"
    a, b = (np.asarray(plain(x)) for x in (found, expected))
    # Sums of values of 16 bits depend on their order by more than the suite's tolerance: two units in the last place.
    rtol = max(case.rtol, {"bfloat16": 2.0**-6, "float16": 2.0**-9}.get(b.dtype.name, 0.0))
    # What is zero but for the order of a sum comes out as much as 2e-7 away from it.
    atol = max(case.atol, 1e-6 if rtol == case.rtol else rtol / 100)
    if b.dtype.name == "bfloat16":
        b = b.astype(np.float32)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
    try:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    except AssertionError as error:
        return " ".join(str(error).split())[:160]
    return ""


if __name__ == "__main__":
    import sys

    wanted = sys.argv[1:]
    names = [n for n in node_cases() if not wanted or any(w in n for w in wanted)]
    results = {n: outcome(n) for n in names}
    for n, why in results.items():
        if why:
            print(n, "|", why)
    print(f"{sum(not w for w in results.values())} of {len(results)} pass")
