"""Every family of operators in ONNX Runtime equals torch, with dynamic dims and with nothing in the cache."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.onnxruntime.lowering import emit_program, node_counts
from ir.errors import UnsupportedError
from ir.program import Program
from ir.types import TensorType
from tests.onnx_runs import SIZES, function_program, onnx_outputs, sample, session_outputs

aten, nomul = torch.ops.aten, torch.ops.nomul
F32, I64, I32, BOOL = torch.float32, torch.int64, torch.int32, torch.bool
X = TensorType(F32, ("batch", "seq", 8))
H = TensorType(F32, ("batch", 4, "seq", 8))
IDS = TensorType(I64, ("batch", "seq"))
MASK = TensorType(BOOL, ("batch", 1, "seq", "past+seq"))
PAST = TensorType(F32, ("batch", 2, "past", 8))
NEW = TensorType(F32, ("batch", 2, "seq", 8))

Case = tuple[Callable[..., Any], dict[str, TensorType]]


def size(x: Any, dim: int) -> Any:
    return aten.sym_size.int(x, dim)


def attend_to_cache(q: Any, p: Any, x: Any, m: Any) -> Any:
    keys = aten.cat.default([p, x], 2)
    return [aten.scaled_dot_product_attention.default(q, keys, keys, m, enable_gqa=True), keys]


ARITHMETIC: dict[str, Case] = {
    "add a number to integers": (lambda x: aten.add.Tensor(x, 2), {"x": IDS}),
    "add scaled": (lambda x, y: aten.add.Tensor(x, y, alpha=0.5), {"x": X, "y": X}),
    "add integers to floats": (lambda x, y: aten.add.Tensor(x, aten.unsqueeze.default(y, 2)), {"x": X, "y": IDS}),
    "subtract from a number": (lambda x: aten.rsub.Scalar(x, 1.5), {"x": X}),
    "multiply a bool": (lambda x, y: aten.mul.Tensor(x, aten.unsqueeze.default(y, 2)), {"x": X, "y": IDS}),
    "multiply by one": (lambda x: aten.mul.Tensor(x, 1.0), {"x": X}),
    "divide integers": (lambda x: aten.div.Tensor(x, 4), {"x": IDS}),
    "divide and round down": (
        lambda x: aten.div.Tensor_mode(aten.sub.Tensor(x, 2), 3, rounding_mode="floor"),
        {"x": IDS},
    ),
    "divide and cut": (lambda x: aten.div.Tensor_mode(x, 0.3, rounding_mode="trunc"), {"x": X}),
    "floor divide": (lambda x: aten.floor_divide.default(aten.sub.Tensor(x, 2), 2), {"x": IDS}),
    "remainder": (lambda x: aten.remainder.Scalar(aten.sub.Tensor(x, 2), 3), {"x": IDS}),
    "remainder of floats": (lambda x: aten.remainder.Scalar(x, 0.7), {"x": X}),
    "square": (lambda x: aten.pow.Tensor_Scalar(x, 2), {"x": X}),
    "a number to powers": (lambda x: aten.pow.Scalar(2.0, x), {"x": X}),
    "reciprocal root": (lambda x: aten.rsqrt.default(aten.add.Tensor(aten.abs.default(x), 1.0)), {"x": X}),
    "clamp": (lambda x: aten.clamp.default(x, -0.5, 0.25), {"x": X}),
    "clamp above": (lambda x: aten.clamp.default(x, None, 0.25), {"x": X}),
    "smaller of two": (aten.minimum.default, {"x": X, "y": X}),
    "cast to bool": (lambda x: aten.to.dtype(x, BOOL), {"x": IDS}),
    "cast to int": (lambda x: aten._to_copy.default(x, dtype=I32), {"x": X}),
    "compare with a float": (lambda x: aten.gt.Scalar(x, 1.5), {"x": IDS}),
    "not equal": (lambda x: aten.ne.Scalar(x, 1), {"x": IDS}),
    "and": (aten.__and__.Tensor, {"x": MASK, "y": MASK}),
    "and with true": (
        lambda x: aten.__and__.Tensor(aten.new_ones.default(x, [], dtype=BOOL), x),
        {"x": MASK},
    ),
    "bits": (lambda x: aten.bitwise_and.Scalar(x, 2), {"x": IDS}),
    "not": (aten.logical_not.default, {"x": IDS}),
    "where with a number": (lambda m, x: aten.where.ScalarOther(m, x, -3.0), {"m": TensorType(BOOL, X.dims), "x": X}),
    "masked fill": (lambda m, x: aten.masked_fill.Scalar(x, m, 9.0), {"m": TensorType(BOOL, X.dims), "x": X}),
    "silu": (aten.silu.default, {"x": X}),
    "gelu": (aten.gelu.default, {"x": X}),
    "gelu by tanh": (lambda x: aten.gelu.default(x, approximate="tanh"), {"x": X}),
    "leaky relu": (lambda x: aten.leaky_relu.default(x, 0.2), {"x": X}),
    "softplus": (aten.softplus.default, {"x": X}),
    **{
        op.__name__: (op.default, {"x": X})
        for op in (
            aten.neg,
            aten.exp,
            aten.sin,
            aten.cos,
            aten.tanh,
            aten.sigmoid,
            aten.relu,
            aten.abs,
            aten.floor,
            aten.ceil,
            aten.round,
            aten.erf,
            aten.sign,
        )
    },
}
SHAPES: dict[str, Case] = {
    "merge and split dims": (
        lambda x: aten.reshape.default(aten.reshape.default(x, [-1, 8]), [size(x, 0), size(x, 1), 2, 4]),
        {"x": X},
    ),
    "two dims that only sizes tell": (
        lambda x: aten.reshape.default(aten.reshape.default(x, [-1, 8]), [size(x, 0), size(x, 1), -1]),
        {"x": X},
    ),
    "transpose": (lambda x: aten.transpose.int(x, 1, -1), {"x": H}),
    "permute": (lambda x: aten.permute.default(x, [0, 2, -1, 1]), {"x": H}),
    "squeeze": (lambda x: aten.squeeze.dim(aten.unsqueeze.default(x, -1), -1), {"x": X}),
    "expand": (
        lambda x: aten.expand.default(aten.unsqueeze.default(x, 2), [size(x, 0), 2, 3, size(x, 2), 8]),
        {"x": PAST},
    ),
    "expand with -1": (lambda x: aten.expand.default(aten.unsqueeze.default(x, 0), [5, -1, -1, -1]), {"x": X}),
    "slice": (lambda x: aten.slice.Tensor(x, 2, 1, 9223372036854775807, 2), {"x": X}),
    "slice from the end": (lambda x: aten.slice.Tensor(x, -1, 0, -2), {"x": X}),
    "slice from a size": (
        lambda p, x: aten.slice.Tensor(aten.cat.default([p, x], 2), 2, size(p, 2)),
        {"p": PAST, "x": NEW},
    ),
    "select": (lambda x: aten.select.int(x, 1, -1), {"x": H}),
    "split": (lambda x: [operator.getitem(aten.split.Tensor(x, 3, -1), i) for i in (0, 2)], {"x": X}),
    "chunk": (lambda x: operator.getitem(aten.chunk.default(x, 2, 2), 1), {"x": X}),
    "unbind": (lambda x: operator.getitem(aten.unbind.int(x, 1), 2), {"x": H}),
    "append to a cache": (lambda p, x: aten.cat.default([p, x], -2), {"p": PAST, "x": NEW}),
    "append nothing": (lambda x: aten.cat.default([x, aten.slice.Tensor(x, 2, 8)], -1), {"x": X}),
    "stack": (lambda x: aten.stack.default([x, aten.neg.default(x)], -1), {"x": X}),
    "repeat": (lambda x: aten.repeat.default(x, [2, 1, 1, 3]), {"x": X}),
    "repeat each": (lambda x: aten.repeat_interleave.self_int(x, 2, 3), {"x": H}),
    "count up": (lambda x, y: aten.arange.default(operator.add(size(x, 2), size(y, 1))), {"x": PAST, "y": X}),
    "count in floats": (lambda x: aten.arange.start_step(1, size(x, 1), 2, dtype=F32), {"x": X}),
    "zeros of a size": (lambda x: aten.zeros.default([size(x, 0), 3]), {"x": X}),
    "full like": (lambda x: aten.full_like.default(x, 0.5), {"x": X}),
    "lower triangle": (aten.tril.default, {"x": TensorType(BOOL, ("seq", "past+seq"))}),
    "pad": (lambda x: aten.constant_pad_nd.default(x, [1, 2, 0, 1], 7.0), {"x": X}),
    "arithmetic on sizes": (
        lambda x: aten.reshape.default(x, [operator.mul(size(x, 0), 2), operator.floordiv(8, 4), -1]),
        {"x": TensorType(F32, ("batch", 4, 8))},
    ),
}
LOOKUPS: dict[str, Case] = {
    "one index": (
        lambda x, i: aten.index.Tensor(aten.reshape.default(x, [-1, 8]), [i]),
        {"x": X, "i": TensorType(I64, (0,))},
    ),
    "first dims": (
        lambda x, i, j: aten.index.Tensor(x, [i, j]),
        {"x": TensorType(F32, (4, 4, 3)), "i": TensorType(I64, ("batch", 1)), "j": TensorType(I64, (1, "seq"))},
    ),
    "the padding mask": (
        lambda m: aten.index.Tensor(
            m,
            [
                aten.reshape.default(aten.arange.default(size(m, 0)), [-1, 1, 1, 1]),
                aten.unsqueeze.default(aten.unsqueeze.default(aten.arange.default(size(m, 1)), 0), 0),
            ],
        ),
        {"m": TensorType(BOOL, ("batch", "past+seq"))},
    ),
    "embedding": (aten.embedding.default, {"w": TensorType(F32, (4, 8)), "i": IDS}),
    "gather": (lambda x, i: aten.gather.default(x, 1, i), {"x": TensorType(F32, ("batch", 5)), "i": IDS}),
    "put": (
        lambda x, i: aten.index_put.default(aten.zeros_like.default(x), [i], aten.add.Tensor(x, 1)),
        {"x": TensorType(I64, (4,)), "i": TensorType(I64, (4,))},
    ),
    "largest": (lambda x: [operator.getitem(aten.topk.default(x, 3), i) for i in (0, 1)], {"x": X}),
    "sort with ties": (
        lambda x: [operator.getitem(aten.sort.stable(x, stable=True, dim=1, descending=False), i) for i in (0, 1)],
        {"x": IDS},
    ),
    "running sum": (lambda x: aten.cumsum.default(x, -1), {"x": IDS}),
    "running sum in int32": (lambda x: aten.cumsum.default(x, 1, dtype=I32), {"x": X}),
    "counts": (
        lambda x: aten.histc.default(aten.to.dtype(aten.reshape.default(x, [-1]), F32), 4, 0, 3),
        {"x": IDS},
    ),
    "place of the largest": (lambda x: aten.argmax.default(x, -1), {"x": X}),
}
REDUCTIONS: dict[str, Case] = {
    "sum": (lambda x: aten.sum.dim_IntList(x, [1, 2], True), {"x": X}),
    "sum of all": (aten.sum.default, {"x": IDS}),
    "mean": (lambda x: aten.mean.dim(x, [-1], True), {"x": X}),
    "largest value": (lambda x: aten.amax.default(x, [1]), {"x": X}),
    "any": (lambda x: aten.any.dim(x, -1), {"x": MASK}),
    "all": (aten.all.default, {"x": MASK}),
    "softmax": (lambda x: aten.softmax.int(x, 1), {"x": X}),
    "log softmax": (lambda x: aten.log_softmax.int(x, -1), {"x": X}),
    "log sum exp": (lambda x: aten.logsumexp.default(x, [-1]), {"x": X}),
    "rms norm": (lambda x, w: aten.rms_norm.default(x, [8], w, 1e-5), {"x": X, "w": TensorType(F32, (8,))}),
    "rms norm without gain": (lambda x: aten.rms_norm.default(x, [8]), {"x": H}),
    "layer norm": (lambda x, w: aten.layer_norm.default(x, [8], w, w, 1e-5), {"x": X, "w": TensorType(F32, (8,))}),
    "layer norm alone": (lambda x: aten.layer_norm.default(x, [8]), {"x": X}),
}
W = TensorType(F32, (5, 8))
PRODUCTS: dict[str, Case] = {
    "linear": (aten.linear.default, {"x": X, "w": W}),
    "linear with bias": (aten.linear.default, {"x": X, "w": W, "b": TensorType(F32, (5,))}),
    "linear of rows": (
        lambda x, w, b: aten.linear.default(aten.reshape.default(x, [-1, 8]), w, b),
        {"x": X, "w": W, "b": TensorType(F32, (5,))},
    ),
    "scores": (lambda q, k: aten.matmul.default(q, aten.transpose.int(k, 2, 3)), {"q": NEW, "k": PAST}),
    "sum and product": (
        lambda c, x, y: aten.baddbmm.default(c, x, aten.transpose.int(y, 1, 2), beta=2, alpha=0.25),
        {"c": TensorType(F32, ("batch", 1, 1)), "x": X, "y": X},
    ),
    "einsum": (lambda x, y: aten.einsum.default("bsi,bti->bst", [x, y]), {"x": X, "y": X}),
    "experts": (
        nomul.grouped_linear.default,
        {"x": TensorType(F32, ("past+seq", 8)), "w": TensorType(F32, (3, 5, 8)), "n": TensorType(I32, (3,))},
    ),
    "computed experts": (
        lambda x, w, n: nomul.grouped_linear.default(x, aten.exp.default(w), n),
        {"x": TensorType(F32, ("past+seq", 8)), "w": TensorType(F32, (3, 5, 8)), "n": TensorType(I32, (3,))},
    ),
}
ANGLE = TensorType(F32, ("batch", 1, "seq", 6))
ATTENTION: dict[str, Case] = {
    "rope in halves": (lambda x, c, s: nomul.rope.default(x, c, s, False), {"x": H, "c": ANGLE, "s": ANGLE}),
    "rope of neighbours": (lambda x, c, s: nomul.rope.default(x, c, s, True), {"x": H, "c": ANGLE, "s": ANGLE}),
    "masked": (
        lambda q, k, v, m: aten.scaled_dot_product_attention.default(
            q, k, v, m, 0.0, False, scale=0.3, enable_gqa=True
        ),
        {
            "q": H,
            "k": TensorType(F32, ("batch", 2, "past+seq", 8)),
            "v": TensorType(F32, ("batch", 2, "past+seq", 6)),
            "m": MASK,
        },
    ),
    "with a cache": (attend_to_cache, {"q": H, "p": PAST, "x": NEW, "m": TensorType(F32, MASK.dims)}),
    "causal": (
        lambda q, k: aten.scaled_dot_product_attention.default(q, k, k, is_causal=True),
        {"q": NEW, "k": NEW},
    ),
}
FAMILIES = {
    "arithmetic": ARITHMETIC, "shapes": SHAPES, "lookups": LOOKUPS, "reductions": REDUCTIONS, "products": PRODUCTS,
    "attention": ATTENTION,
}  # fmt: skip
CASES = [pytest.param(case, id=f"{f}: {n}") for f, cases in FAMILIES.items() for n, case in cases.items()]


def program_of(case: Case) -> Program:
    """The function as a program; arguments called w, b and g are parameters."""
    function, kinds = case
    params = {n: sample(k, 7) for n, k in kinds.items() if n in "wbg"}
    return function_program(function, kinds, params)


def expected(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.as_tensor(v) for v in program.module()(*inputs)]


def values(program: Program, sizes: tuple[int, int, int]) -> list[Tensor]:
    kinds = [node.meta["type"] for node in program.inputs]
    found = [sample(kind, seed, sizes) for seed, kind in enumerate(kinds)]
    # Spans of experts are sorted, and within what there is.
    return [
        v.sort().values.clamp(max=sizes[1] + sizes[2]) if k.dtype == I32 else v
        for v, k in zip(found, kinds, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_operator(case: Case, tmp_path: Path) -> None:
    program = program_of(case)
    for index, sizes in enumerate(SIZES):
        inputs = values(program, sizes)
        found = session_outputs(program, inputs, tmp_path) if index else onnx_outputs(program, inputs, tmp_path)
        for ours, theirs in zip(found, expected(program, inputs), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("case", [ARITHMETIC["silu"], REDUCTIONS["rms norm"], PRODUCTS["linear"], *ATTENTION.values()])
def test_plain_forms_equal_torch_in_every_opset(case: Case, opset: int, tmp_path: Path) -> None:
    program = program_of(case)
    inputs = values(program, (2, 3, 4))
    found = onnx_outputs(program, inputs, tmp_path, opset, fuse=False)
    for ours, theirs in zip(found, expected(program, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


def test_constants_are_computed_while_emitting() -> None:
    program = function_program(
        lambda x, w: aten.mul.Tensor(x, aten.add.Tensor(w, 1.0)), {"x": X}, {"w": torch.arange(8.0)}
    )
    assert node_counts(emit_program(program)) == {"Mul": 1}


def test_equal_nodes_are_made_once() -> None:
    program = function_program(
        lambda x: aten.add.Tensor(aten.exp.default(aten.neg.default(x)), aten.exp.default(aten.neg.default(x))),
        {"x": X},
    )
    assert node_counts(emit_program(program)) == {"Neg": 1, "Exp": 1, "Add": 1}


@pytest.mark.parametrize(
    ("function", "kinds", "reason"),
    [
        (lambda x: aten.index.Tensor(x, [aten.gt.Scalar(x, 0.0)]), {"x": TensorType(F32, (4,))}, "mask as index"),
        (lambda x: aten.softplus.default(x, 2), {"x": X}, "beta 2"),
        (lambda x: aten.histc.default(x, 5, 0, 3), {"x": TensorType(F32, (4,))}, "whole number"),
        (aten.linalg_vector_norm.default, {"x": X}, "no entry"),
    ],
)
def test_a_call_without_a_form_is_refused_with_its_reason(
    function: Callable[..., Any], kinds: dict[str, TensorType], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        emit_program(function_program(function, kinds))
    assert "aten." in str(caught.value) and "--target reference" in str(caught.value)


def test_all_calls_without_a_form_are_named_but_not_what_reads_them() -> None:
    def function(x: Any) -> Any:
        first, second = aten.softplus.default(x, 2), aten.softplus.default(x, 3)
        return aten.add.Tensor(aten.neg.default(first), second)

    with pytest.raises(UnsupportedError) as caught:
        emit_program(function_program(function, {"x": X}))
    assert "beta 2" in str(caught.value) and "beta 3" in str(caught.value) and "neg" not in str(caught.value)
