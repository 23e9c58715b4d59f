"""ONNX Runtime's own operators through the importer: a model of one node each, against what the runtime computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from frontend.onnx.call import Refused, Unknown
from frontend.onnx.trace import trace
from ir.ops.quant import QuantCodes
from ir.program import Program
from tests.onnx_backend import run

CONTRIB = "com.microsoft"
_RANDOM = np.random.default_rng(7)
BATCH, TOKENS, PAST, HEADS, WIDTH = 2, 4, 5, 4, 32
HIDDEN = HEADS * WIDTH


@dataclass(frozen=True)
class Fed:
    """An input of the model with its dims as declared, where words are symbols; other arrays are initializers."""

    value: np.ndarray
    dims: str


@dataclass(frozen=True)
class Node:
    """A model of one node: its inputs, None for one left out, how many results it has, `-` for those without a name."""

    op: str
    inputs: tuple[Fed | np.ndarray | None, ...]
    results: str = "y"
    domain: str = CONTRIB
    attributes: tuple[tuple[str, Any], ...] = ()

    def fed(self) -> dict[str, Fed]:
        """Return the model's inputs by name."""
        return {f"x{i}": v for i, v in enumerate(self.inputs) if isinstance(v, Fed)}

    def model(self) -> onnx.ModelProto:
        """Return the model."""
        names = ["" if v is None else f"x{i}" for i, v in enumerate(self.inputs)]
        outputs = ["" if name == "-" else name for name in self.results.split()]
        stored = [numpy_helper.from_array(v, n) for v, n in zip(self.inputs, names, strict=True) if _is_array(v)]
        declared = [_declared(name, given) for name, given in self.fed().items()]
        node = helper.make_node(self.op, names, outputs, domain=self.domain, **dict(self.attributes))
        # The runtime infers the type of what is not float.
        found = [onnx.ValueInfoProto(name=name) for name in outputs if name]
        graph = helper.make_graph([node], "graph", declared, found, stored)
        versions = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _declared(name: str, given: Fed) -> onnx.ValueInfoProto:
    dims = [int(d) if d.isdigit() else d for d in given.dims.split()]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(given.value.dtype), dims)


def node(op: str, *inputs: Any, results: str = "y", domain: str = CONTRIB, **attributes: Any) -> Node:
    return Node(op, inputs, results, domain, tuple(attributes.items()))


def traced(case: Node) -> Program:
    return trace(onnx_ir.serde.deserialize_model(case.model()), "model")


def imported(case: Node) -> list[np.ndarray]:
    """Return the results of the program."""
    return [t.numpy() for t in run(traced(case), [torch.from_numpy(v.value) for v in case.fed().values()])]


def expected(case: Node) -> list[np.ndarray]:
    """Return the results of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        case.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: v.value for name, v in case.fed().items()})


def compare(found: list[np.ndarray], wanted: list[np.ndarray], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def floats(*shape: int) -> np.ndarray:
    return _RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


def random_mask(*shape: int) -> np.ndarray:
    return (_RANDOM.random(shape) > 0.4).astype(np.int32)


def tokens(width: int, count: int = TOKENS, batch: int = BATCH, name: str = "s") -> Fed:
    return Fed(floats(batch, count, width), f"b {name} {width}")


def cache(heads: int = HEADS, past: int = PAST, batch: int = BATCH) -> Fed:
    return Fed(floats(batch, heads, past, WIDTH), f"b {heads} p {WIDTH}")


X = tokens(HIDDEN)
SKIP, GAIN, SHIFT, BIAS = tokens(HIDDEN), floats(HIDDEN), floats(HIDDEN), floats(HIDDEN)

PLAIN = {
    "gelu": node("Gelu", X),
    "bias_gelu": node("BiasGelu", X, BIAS),
    "fast_gelu": node("FastGelu", X),
    "fast_gelu_bias": node("FastGelu", X, BIAS),
    "quick_gelu": node("QuickGelu", X),
    "quick_gelu_silu": node("QuickGelu", X, alpha=1.0),
    "rms": node("SimplifiedLayerNormalization", X, GAIN, domain="", epsilon=1e-6),
    "rms_default": node("SimplifiedLayerNormalization", X, GAIN, domain="", results="y inverse", stash_type=1),
    "rms_two_axes": node(
        "SimplifiedLayerNormalization",
        Fed(floats(2, 3, 8), "b 3 8"),
        floats(3, 8),
        domain="",
        axis=1,
        results="y inverse",
    ),
    "rms_scale_of_fewer_axes": node(
        "SimplifiedLayerNormalization", Fed(floats(2, 3, 8), "b 3 8"), floats(8), domain="", axis=-2
    ),
    "skip_rms": node("SkipSimplifiedLayerNormalization", X, SKIP, GAIN, results="y - - sum", epsilon=1e-6),
    "skip_rms_bias": node("SkipSimplifiedLayerNormalization", X, SKIP, GAIN, BIAS, results="y - inverse sum"),
    "skip_rms_alone": node("SkipSimplifiedLayerNormalization", X, SKIP, GAIN),
    "skip_rms_rows": node(
        "SkipSimplifiedLayerNormalization", Fed(floats(5, 16), "n 16"), Fed(floats(5, 16), "n 16"), floats(16)
    ),
    "skip_layer": node("SkipLayerNormalization", X, SKIP, GAIN, SHIFT, BIAS, results="y mean inverse sum"),
    "skip_layer_plain": node("SkipLayerNormalization", X, SKIP, GAIN, results="y - - sum", epsilon=1e-5),
    "skip_layer_shared": node("SkipLayerNormalization", X, Fed(floats(TOKENS, HIDDEN), f"s {HIDDEN}"), GAIN, SHIFT),
    "skip_layer_one": node("SkipLayerNormalization", X, Fed(floats(1, TOKENS, HIDDEN), f"1 s {HIDDEN}"), GAIN, SHIFT),
}

IDS, KINDS = ints([1, 2, 3, 0], [4, 0, 1, 5]), ints([0, 1, 1, 0], [0, 0, 1, 1])
TABLES = (floats(6, 16), floats(7, 16), floats(2, 16))
SEQUENCE, NORM = "b s", (floats(16), floats(16))
EMBEDDINGS = {
    "embed": node(
        "EmbedLayerNormalization",
        *(Fed(IDS, SEQUENCE), Fed(KINDS, SEQUENCE), *TABLES, *NORM, Fed(random_mask(BATCH, TOKENS), SEQUENCE)),
        results="y ones sum",
    ),
    "embed_plain": node(
        "EmbedLayerNormalization", Fed(IDS, SEQUENCE), None, *TABLES[:2], None, *NORM, results="y ones", epsilon=1e-5
    ),
    "embed_positions": node(
        "EmbedLayerNormalization",
        *(Fed(IDS, SEQUENCE), Fed(KINDS, SEQUENCE), *TABLES, *NORM, None, Fed(ints([6, 1, 2, 0]), "1 s")),
        results="y ones",
    ),
}

PRODUCTS = {
    "matmul": node("FusedMatMul", X, floats(HIDDEN, 5), alpha=0.5),
    "matmul_turned": node("FusedMatMul", Fed(floats(3, 4, 5), "b 4 s"), floats(6, 4), transA=1, transB=1),
    "matmul_batch": node("FusedMatMul", Fed(floats(4, 2, 3, 5), "s 2 3 5"), floats(2, 3, 5, 6), transBatchA=1),
    "matmul_batch_turned": node(
        "FusedMatMul", floats(2, 3, 4, 5), Fed(floats(6, 2, 3, 5), "s 2 3 5"), transBatchB=1, transB=1, alpha=2.0
    ),
    "matmul_old": node("TransposeMatMul", Fed(floats(2, 3), "b 3"), floats(4, 3), transB=1),
    **{
        f"gemm_{name}": node(
            "FusedGemm",
            *(Fed(floats(3, 4), "b 4"), floats(4, 5), floats(5)),
            activation=name,
            activation_alpha=0.3,
            activation_beta=0.2,
        )
        for name in (
            *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid"),
            *("Softplus", "Softsign", "ThresholdedRelu"),
        )
    },
    "gemm_scaled": node(
        "FusedGemm",
        *(Fed(floats(4, 3), "4 b"), floats(5, 4), floats(1, 5)),
        activation="Relu",
        alpha=0.5,
        beta=2.0,
        transA=1,
        transB=1,
    ),
    "gemm_without_bias": node("FusedGemm", Fed(floats(3, 4), "b 4"), floats(4, 5), activation="Tanh"),
}

BYTES = _RANDOM.integers(0, 256, (2, 3, 4)).astype(np.uint8)
DEQUANTISED = {
    "dequantise": node("DequantizeLinear", Fed(BYTES, "b 3 4"), np.array(0.5, np.float32), np.array(3, np.uint8)),
    "dequantise_no_zero": node(
        "DequantizeLinear", Fed(BYTES.astype(np.int8), "b 3 4"), np.array(0.25, dtype=np.float32)
    ),
    "dequantise_axis": node(
        "DequantizeLinear", Fed(BYTES, "b 3 4"), floats(4), ints(1, 2, 3, 200, dtype=np.uint8), axis=-1
    ),
    "dequantise_default_axis": node("DequantizeLinear", Fed(BYTES, "b 3 4"), floats(3), ints(1, 2, 99, dtype=np.uint8)),
    "dequantise_wide": node(
        "DequantizeLinear", Fed(BYTES.astype(np.int32) * 7919, "b 3 4"), np.array(0.01, dtype=np.float32)
    ),
}

COS, SIN = floats(32, WIDTH // 2), floats(32, WIDTH // 2)
SOME_COS, SOME_SIN = floats(32, 8), floats(32, 8)
POSITIONS = Fed(ints([3, 1, 4, 9], [2, 6, 5, 3], dtype=np.int64), "b s")
FIRST = Fed(ints(7, dtype=np.int64), "1")
FOUR = Fed(floats(BATCH, HEADS, TOKENS, WIDTH), f"b {HEADS} s {WIDTH}")
ROTARY = {
    "rotary": node("RotaryEmbedding", X, POSITIONS, COS, SIN),
    "rotary_first": node("RotaryEmbedding", X, FIRST, COS, SIN),
    "rotary_constant": node("RotaryEmbedding", X, ints(0, dtype=np.int64), COS, SIN),
    "rotary_pairs": node("RotaryEmbedding", X, POSITIONS, COS, SIN, interleaved=1),
    "rotary_heads": node("RotaryEmbedding", X, POSITIONS, COS, SIN, num_heads=HEADS),
    "rotary_four": node("RotaryEmbedding", FOUR, POSITIONS, COS, SIN),
    "rotary_four_pairs": node("RotaryEmbedding", FOUR, FIRST, COS, SIN, interleaved=1),
    "rotary_partial": node(
        "RotaryEmbedding", X, POSITIONS, SOME_COS, SOME_SIN, num_heads=HEADS, rotary_embedding_dim=16
    ),
    "rotary_partial_pairs": node(
        "RotaryEmbedding", X, POSITIONS, SOME_COS, SOME_SIN, num_heads=HEADS, rotary_embedding_dim=16, interleaved=1
    ),
    "rotary_partial_four": node(
        "RotaryEmbedding", FOUR, FIRST, SOME_COS, SOME_SIN, num_heads=HEADS, rotary_embedding_dim=16
    ),
}

SHARED = 2


def grouped(past: bool, *more: Any, packed: bool = False, **attributes: Any) -> Node:
    """A GroupQueryAttention; with a cache one row, since the runtime takes several only for one new token."""
    batch, length = (1, PAST + TOKENS) if past else (BATCH, TOKENS)
    widths = (HIDDEN, SHARED * WIDTH, SHARED * WIDTH)
    qkv = [tokens(w, batch=batch) for w in widths] if not packed else [tokens(sum(widths), batch=batch), None, None]
    state = [cache(SHARED, batch=1), cache(SHARED, batch=1)] if past else [None, None]
    sizes = [Fed(np.full(batch, length - 1, np.int32), "b"), Fed(np.array(length, dtype=np.int32), "")]
    settings = {"num_heads": HEADS, "kv_num_heads": SHARED, **attributes}
    return node("GroupQueryAttention", *qkv, *state, *sizes, *more, results="y key value", **settings)


def one_token(*more: Any, **attributes: Any) -> Node:
    """A GroupQueryAttention of one new token for each of several rows with a cache."""
    found = grouped(True, *more, **attributes)
    new = [Fed(floats(BATCH, 1, v.value.shape[2]), v.dims) for v in found.inputs[:3] if isinstance(v, Fed)]
    sizes = [Fed(np.full(BATCH, PAST, np.int32), "b"), Fed(np.array(PAST + 1, dtype=np.int32), "")]
    return replace(found, inputs=(*new, cache(SHARED), cache(SHARED), *sizes, *more))


ROW = Fed(ints([3, 1, 4, 9], dtype=np.int64), "b s")
SCORES = f"b {HEADS} s"
GROUPED = {
    **{
        f"{name}_{'past' if past else 'prompt'}": grouped(past, *more, **attributes)
        for past in (False, True)
        for name, more, attributes in (
            ("grouped", (), {}),
            ("grouped_packed", (), {"packed": True}),
            ("grouped_scale", (), {"scale": 0.3}),
            ("grouped_window", (), {"local_window_size": 3}),
            ("grouped_cap", (), {"softcap": 1.5}),
            ("grouped_cap_window", (), {"softcap": 1.5, "local_window_size": 2, "scale": 0.4}),
            ("grouped_rotary", (COS, SIN), {"do_rotary": 1}),
            ("grouped_rotary_packed", (COS, SIN), {"do_rotary": 1, "packed": True}),
            ("grouped_rotary_pairs", (COS, SIN), {"do_rotary": 1, "rotary_interleaved": 1}),
            ("grouped_rotary_partial", (SOME_COS, SOME_SIN), {"do_rotary": 1, "local_window_size": 4}),
            ("grouped_rotary_at", (COS, SIN, ROW if past else POSITIONS), {"do_rotary": 1}),
            ("grouped_sink", (None, None, None, None, floats(HEADS)), {}),
            ("grouped_smooth", (), {"smooth_softmax": 1, "softcap": 2.0}),
        )
    },
    "grouped_bidirectional": grouped(False, causal=0),
    "grouped_bias_prompt": grouped(
        False, None, None, None, Fed(floats(1, HEADS, TOKENS, TOKENS), f"1 {HEADS} s s"), softcap=1.5
    ),
    "grouped_bias_past": grouped(
        True, None, None, None, Fed(floats(1, 1, TOKENS, PAST + TOKENS), "1 1 s p+s"), local_window_size=3
    ),
    "grouped_bias_sink": grouped(
        *(True, None, None, None, Fed(floats(1, HEADS, TOKENS, PAST + TOKENS), f"1 {HEADS} s p+s"), floats(HEADS))
    ),
    "grouped_one": one_token(),
    "grouped_one_rotary": one_token(COS, SIN, do_rotary=1, local_window_size=3),
    "grouped_one_rotary_at": one_token(COS, SIN, Fed(ints([7], [2], dtype=np.int64), "b s"), do_rotary=1),
}

Q, K, V = tokens(HIDDEN), tokens(HIDDEN, 6, name="l"), tokens(HEADS * 6, 6, name="l")
NEW = [tokens(HIDDEN), tokens(HIDDEN)]
BIASES, MORE_BIASES = floats(3 * HIDDEN), floats(2 * HIDDEN + HEADS * 6)
WHOLE = [Fed(floats(BATCH, HEADS, 6, WIDTH), f"b {HEADS} l {WIDTH}") for _ in range(2)]
LENGTHS = Fed(ints(3, 6), "b")
OVER_ALL, OVER_PAST = Fed(random_mask(BATCH, 6), "b l"), Fed(random_mask(BATCH, PAST + TOKENS), "b p+s")
STATE = (cache(), cache())


def several(*inputs: Any, results: str = "y", **attributes: Any) -> Node:
    return node("MultiHeadAttention", *inputs, results=results, num_heads=HEADS, **attributes)


SEVERAL = {
    "several": several(Q, K, V),
    "several_scale": several(Q, K, V, scale=0.2),
    "several_bias": several(Q, K, V, MORE_BIASES, results="y key value"),
    "several_causal": several(Q, *NEW, unidirectional=1),
    "several_mask": several(Q, K, V, None, OVER_ALL),
    "several_mask_least": several(Q, K, V, None, OVER_ALL, mask_filter_value=-3.0),
    "several_mask_of_nothing": several(Q, K, V, None, Fed(np.zeros((BATCH, 6), np.int32), "b l")),
    "several_mask_tokens": several(Q, K, V, None, Fed(random_mask(BATCH, TOKENS, 6), "b s l")),
    "several_mask_lengths": several(Q, K, V, None, LENGTHS),
    "several_mask_causal": several(Q, *NEW, None, Fed(random_mask(BATCH, TOKENS), "b s"), unidirectional=1),
    "several_added": several(Q, K, V, None, None, Fed(floats(1, HEADS, TOKENS, 6), f"1 {HEADS} s l")),
    "several_added_mask": several(Q, K, V, None, OVER_ALL, Fed(floats(BATCH, 1, TOKENS, 6), "b 1 s l")),
    "several_past": several(Q, *NEW, None, None, None, *STATE, results="y key value"),
    "several_past_causal": several(
        Q, *NEW, BIASES, OVER_PAST, None, *STATE, results="y key value", unidirectional=1, scale=0.3
    ),
    "several_past_added": several(
        *(Q, *NEW, None, None, Fed(floats(1, 1, TOKENS, PAST + TOKENS), "1 1 s p+s"), *STATE), results="y key value"
    ),
    "several_whole_cache": several(Q, *WHOLE, results="y key value"),
    "several_whole_cache_bias": several(Q, *WHOLE, BIASES, OVER_ALL),
}

INNER = tokens(10)
PROJECTION, PROJECTION_BIAS = floats(10, 3 * HIDDEN), floats(3 * HIDDEN)
BOTH = Fed(floats(2, BATCH, HEADS, PAST, WIDTH), f"2 b {HEADS} p {WIDTH}")


def whole(*inputs: Any, results: str = "y", **attributes: Any) -> Node:
    return node("Attention", INNER, *inputs, results=results, num_heads=HEADS, **attributes)


WITH_PROJECTION = {
    "whole": whole(PROJECTION, PROJECTION_BIAS),
    "whole_without_bias": whole(PROJECTION, scale=0.2),
    "whole_causal": whole(PROJECTION, PROJECTION_BIAS, unidirectional=1, results="y present"),
    "whole_mask": whole(PROJECTION, PROJECTION_BIAS, Fed(random_mask(BATCH, TOKENS), "b s")),
    "whole_mask_causal": whole(
        PROJECTION, PROJECTION_BIAS, Fed(random_mask(BATCH, TOKENS), "b s"), unidirectional=1, mask_filter_value=-5.0
    ),
    "whole_mask_tokens": whole(PROJECTION, PROJECTION_BIAS, Fed(random_mask(BATCH, TOKENS, TOKENS), "b s s")),
    "whole_mask_lengths": whole(PROJECTION, PROJECTION_BIAS, Fed(ints(2, 4), "b")),
    "whole_added": whole(
        PROJECTION, PROJECTION_BIAS, None, None, Fed(floats(BATCH, HEADS, TOKENS, TOKENS), f"{SCORES} s")
    ),
    "whole_past": whole(PROJECTION, PROJECTION_BIAS, None, BOTH, results="y present"),
    "whole_past_causal": whole(PROJECTION, PROJECTION_BIAS, OVER_PAST, BOTH, results="y present", unidirectional=1),
    "whole_widths": whole(
        floats(10, 2 * HIDDEN + HEADS * 6), floats(2 * HIDDEN + HEADS * 6), qkv_hidden_sizes=[HIDDEN, HIDDEN, HEADS * 6]
    ),
}


def packed_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    per = 8 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    parts = padded.reshape(*codes.shape[:-1], -1, per).astype(np.uint32) << (np.arange(per) * bits)
    return parts.sum(-1).astype(np.uint8)


def coded(
    bits: int,
    zeros: str = "",
    *,
    width: int = 40,
    block: int = 16,
    bias: bool = False,
    flat: bool = False,
    fine: bool = False,
) -> Node:
    """A MatMulNBits; zeros: its zero points are packed, floats, or floats that are codes; fine: scales need 24 bits."""
    rows, groups = 6, -(-width // block)
    codes = _RANDOM.integers(0, 2**bits, (rows, groups, block)).astype(np.uint8)
    points = _RANDOM.integers(0, 2**bits, (rows, groups)).astype(np.uint8)
    given = {
        "": None,
        "packed": packed_codes(points, bits),
        "float": points + np.float32(0.25),
        "whole": points.astype(np.float32),
    }[zeros]
    scales = floats(rows, groups) / 2**bits
    scales = scales if fine else scales.astype(np.float16).astype(np.float32)
    if flat:
        scales, given = scales.reshape(-1), None if given is None else given.reshape(-1)
    settings = {"bits": bits, "block_size": block, "K": width, "N": rows}
    inputs = [tokens(width), packed_codes(codes, bits), scales, given, None, floats(rows) if bias else None]
    while inputs[-1] is None:
        inputs.pop()
    return node("MatMulNBits", *inputs, **settings)


CODED = {
    **{
        f"codes_{bits}_{zeros or 'middle'}": coded(bits, zeros, bias=bits == 4, fine=bits == 8)
        for bits in (2, 4, 8)
        for zeros in ("", "packed")
    },
    "codes_4_float": coded(4, "float"),
    "codes_2_float": coded(2, "float", fine=True),
    "codes_4_whole": coded(4, "whole", bias=True),
    "codes_flat": coded(4, "packed", flat=True, fine=True),
    "codes_few": coded(4, width=16, flat=True),
    "codes_wide_block": coded(4, width=8, block=32),
    "codes_odd": coded(4, "packed", width=33, block=32),
}

NODES = {
    **PLAIN,
    **EMBEDDINGS,
    **PRODUCTS,
    **DEQUANTISED,
    **ROTARY,
    **GROUPED,
    **SEVERAL,
    **WITH_PROJECTION,
    **CODED,
}


@pytest.mark.parametrize("name", NODES)
def test_as_the_runtime(name: str) -> None:
    compare(imported(NODES[name]), expected(NODES[name]))


@pytest.mark.parametrize(
    ("bits", "zeros", "bias"), [(4, "", False), (4, "packed", True), (2, "whole", True), (8, "", False)]
)
def test_codes_stay_codes(bits: int, zeros: str, bias: bool) -> None:
    case = coded(bits, zeros, width=16, bias=bias)
    program = traced(case)
    calls = list(program.calls(torch.ops.nomul.quant_linear))
    assert len(calls) == 1
    _, codes, scales, points, _, got, group = calls[0].args
    assert (got, group) == (bits, 16)
    read = lambda n: None if n is None else program.params.get(n.target)  # noqa: E731
    weight = QuantCodes(read(codes), read(scales), read(points), bits, group, 16).dequantize()
    unit = replace(case, inputs=(Fed(np.eye(16, dtype=np.float32)[None], "b s 16"), *case.inputs[1:4]))
    np.testing.assert_allclose(weight.T.numpy()[None], expected(unit)[0], rtol=1e-6, atol=1e-6)


def test_half_scales_stay_codes() -> None:
    """Scales that the file holds as float16 need no look at their values, however many they are."""
    case = coded(4, "packed", width=200)
    x, blocks, scales, zeros = case.inputs
    half = replace(case, inputs=(Fed(x.value.astype(np.float16), x.dims), blocks, scales.astype(np.float16), zeros))
    assert len(list(traced(half).calls(torch.ops.nomul.quant_linear))) == 1
    compare(imported(half), expected(half), 2e-2)


@pytest.mark.parametrize("packed", [2, 3])
def test_queries_side_by_side(packed: int) -> None:
    """Layouts that the runtime takes on other processors are those that it takes here, taken apart."""
    sides = [floats(BATCH, 5, HEADS, WIDTH) for _ in range(3)]
    apart = several(*(Fed(x.reshape(BATCH, 5, HIDDEN), f"b s {HIDDEN}") for x in sides), results="y key value")
    together = Fed(np.stack(sides[-packed:], 3), f"b s {HEADS} {packed} {WIDTH}")
    case = replace(apart, inputs=(together,) if packed == 3 else (apart.inputs[0], together))
    compare(imported(case), expected(apart))


@pytest.mark.parametrize("past", [False, True])
def test_heads_normed_before_rotation(past: bool) -> None:
    """The runtime norms queries and keys on other processors; here that is done before it is asked."""
    gains = [floats(WIDTH) for _ in range(2)]
    case = grouped(past, COS, SIN, None, None, None, None, None, *gains, do_rotary=1, qk_norm_epsilon=1e-5)
    normed = [
        Fed(normalised(given.value, gain, 1e-5), given.dims)
        for given, gain in zip(case.inputs[:2], gains, strict=True)
        if isinstance(given, Fed)
    ]
    plain = tuple(a for a in case.attributes if a[0] != "qk_norm_epsilon")
    compare(imported(case), expected(replace(case, inputs=(*normed, *case.inputs[2:9]), attributes=plain)))


def normalised(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    parts = x.reshape(*x.shape[:2], -1, gain.shape[0])
    found = parts / np.sqrt(np.square(parts).mean(-1, keepdims=True) + epsilon) * gain
    return found.reshape(x.shape).astype(np.float32)


def test_a_growing_cache() -> None:
    """One program serves any number of tokens and any length of cache, none included."""
    program, case = traced(grouped(True, COS, SIN, do_rotary=1)), grouped(True, COS, SIN, do_rotary=1)
    for count, past in ((6, 0), (1, 9), (3, 1)):
        new = [Fed(floats(1, count, v.value.shape[2]), v.dims) for v in case.inputs[:3]]
        state = [cache(SHARED, past, 1), cache(SHARED, past, 1)]
        sizes = [Fed(ints(past + count - 1), "b"), Fed(np.array(past + count, dtype=np.int32), "")]
        whole_case = replace(case, inputs=(*new, *state, *sizes, COS, SIN))
        found = run(program, [torch.from_numpy(v.value) for v in whole_case.fed().values()])
        compare([t.numpy() for t in found], expected(whole_case))


def test_rows_that_fill_their_cache_to_different_lengths() -> None:
    """The runtime writes a new token where a row ends, and what lies behind it in the cache is anything."""
    case = one_token(COS, SIN, do_rotary=1)
    lengths = ints(PAST, PAST - 3)
    inputs = (*case.inputs[:5], Fed(lengths, "b"), *case.inputs[6:])
    case = replace(case, inputs=inputs)
    (y, *caches), (wanted, *kept) = imported(case), expected(case)
    compare([y], [wanted])
    for ours, theirs in zip(caches, kept, strict=True):
        for row, length in enumerate(lengths):
            compare([ours[row, :, : length + 1]], [theirs[row, :, : length + 1]])


def _with(case: Node, place: int, value: Any) -> Node:
    inputs = [*case.inputs, *[None] * (place + 1 - len(case.inputs))]
    inputs[place] = value
    return replace(case, inputs=tuple(inputs))


FULL = cache(SHARED, batch=1)
FIXED = replace(FULL, dims=f"b {SHARED} {PAST} {WIDTH}")
REFUSED = {
    "skip_mean": (node("SkipSimplifiedLayerNormalization", X, SKIP, GAIN, results="y mean"), "mean"),
    "rotary_scale": (node("RotaryEmbedding", X, POSITIONS, COS, SIN, scale=2.0), "scale"),
    "rotary_packed": (node("RotaryEmbedding", X, POSITIONS, COS, SIN, is_packed_batching=1), "packed"),
    "gemm_activation": (node("FusedGemm", X, GAIN, activation="Swish"), "Swish"),
    "window_cache": (grouped(True, sliding_window_cache=1, local_window_size=3), "drops"),
    "no_window": (grouped(False, local_window_size=0), "window"),
    "coded_cache": (grouped(True, k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR"), "codes"),
    "scores": (replace(grouped(False, qk_output=1), results="y key value scores"), "scores"),
    "rows_of_chunks": (_with(grouped(True), 16, Fed(ints(TOKENS), "b")), "differ in length"),
    "cache_of_fixed_length": (_with(_with(grouped(True), 3, FIXED), 4, FIXED), "room"),
    "causal_across": (several(Q, K, V, unidirectional=1), "causal"),
    "mask_of_starts": (several(Q, K, V, None, Fed(ints(3, 6, 0, 1), "n")), "mask"),
    "shared_buffer": (whole(PROJECTION, PROJECTION_BIAS, past_present_share_buffer=1), "not full"),
    "rotary_inside": (whole(PROJECTION, PROJECTION_BIAS, do_rotary=1), "angles"),
    "order_of_inputs": (_with(coded(4), 4, np.arange(48, dtype=np.int32)), "g_idx"),
    "three_bits": (replace(coded(4), attributes=(*coded(4).attributes, ("bits", 3))), "3 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    case, why = REFUSED[name]
    with pytest.raises(Refused) as caught:
        traced(case)
    assert case.op in str(caught.value) and why in str(caught.value)


def test_weights_from_data_are_unknown() -> None:
    case = coded(4)
    with pytest.raises(Unknown):
        traced(_with(case, 1, Fed(case.inputs[1], "6 3 8")))
