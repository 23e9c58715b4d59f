"""What a call of each operator costs, one small function a family, from the types of its arguments and result.

Conventions: a division, root, exponential, sine, tanh or erf is one multiply, as an evaluator in hardware counts it; a
comparison is one add; logic, choices, casts and copies move bytes only; views move none. Every call reads its operands
and writes its result, nothing is fused, and attention computes masked scores too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ir.ops.cost import Cost, linear_cost
from ir.ops.hadamard import hadamard_cost
from ir.ops.nested import NestedCodes, nested_cost
from ir.ops.quant import QuantCodes, quant_cost
from ir.ops.shiftadd import shiftadd_cost
from ir.ops.shiftcode import ShiftCodes
from ir.ops.sparse import sparse_cost, sparse_parts, sparse_shift_parts
from ir.ops.tokens import decode_cost, encode_cost
from ir.text import FUNCTIONS
from ir.types import TensorType


class Uncounted(Exception):
    """Why a call's cost cannot be told, for the reader of a table."""


@dataclass(frozen=True)
class Call:
    """One call with numbers for dims. args: by schema name, tensors as their types; out: the result's type."""

    args: dict[str, Any]
    out: Any

    def kind(self, *names: str) -> TensorType | None:
        """Return the type of the first of these arguments that is a tensor, or None."""
        found = (self.args.get(name) for name in names)
        return next((kind for kind in found if isinstance(kind, TensorType)), None)

    def need(self, *names: str) -> TensorType:
        """Return the type of the first of these arguments that is a tensor; raises Uncounted when none is."""
        kind = self.kind(*names)
        if kind is None:
            raise Uncounted(f"it has no tensor {' or '.join(names)}")
        return kind

    @property
    def results(self) -> int:
        """How many values the call returns, over all tensors of its result."""
        return sum(map(count, _tensors(self.out)))

    @property
    def moved(self) -> int:
        """Bytes of all tensor arguments and results."""
        return self.written + sum(kind.nbytes for kind in _tensors(list(self.args.values())))

    @property
    def written(self) -> int:
        """Bytes of the results."""
        return sum(kind.nbytes for kind in _tensors(self.out))


Rule = Callable[[Call], Cost]


def count(kind: TensorType) -> int:
    """Return the number of values of a tensor type with static dims."""
    return math.prod(int(d) for d in kind.dims)


def _tensors(value: Any) -> Iterator[TensorType]:
    if isinstance(value, TensorType):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _last(kind: TensorType) -> int:
    return int(kind.dims[-1]) if kind.dims else 1


def _free(call: Call) -> Cost:
    return Cost()


def _copied(call: Call) -> Cost:
    return Cost(call.moved)


def _made(call: Call) -> Cost:
    return Cost(call.written)


def _cast(call: Call) -> Cost:
    source = call.need("self")
    return Cost() if source.dtype == call.out.dtype else Cost(call.moved)


def _each(multiplies: int, adds: int) -> Rule:
    """Return the rule of an operator that does this much for every value of its result."""

    def rule(call: Call) -> Cost:
        n = call.results
        scaled = n if call.args.get("alpha", 1) not in (1, None) and adds else 0
        return Cost(call.moved, multiplies * n + scaled, adds * n)

    return rule


def _gelu(call: Call) -> Cost:
    # erf: scale, erf, halve, product; tanh: cube, two scales, tanh, halve, product, and two sums.
    return _each(7, 2)(call) if call.args.get("approximate") == "tanh" else _each(4, 1)(call)


def _product(name: str) -> Rule:
    """Return the rule of a matrix product whose left factor is the argument `name`; a summand adds once a result."""

    def rule(call: Call) -> Cost:
        inner, n = _last(call.need(name)), call.results
        # `self` beside another left factor is the summand of addmm and baddbmm.
        summand = n if name != "self" and call.kind("self") is not None else 0
        scales = sum(call.args.get(key, 1) != 1 for key in ("beta", "alpha")) * n if summand else 0
        return Cost(call.moved, n * inner + scales, n * (inner - 1) + summand)

    return rule


def _outer(call: Call) -> Cost:
    return Cost(call.moved, call.results)


def _convolution(call: Call) -> Cost:
    window = math.prod(int(d) for d in call.need("weight").dims[1:])
    bias = call.results if call.kind("bias") else 0
    return Cost(call.moved, call.results * window, call.results * (window - 1) + bias)


def _tokens(x: TensorType) -> int:
    return count(x) // max(1, _last(x))


def _bias(call: Call) -> Cost:
    bias = call.kind("bias")
    return Cost() if bias is None else Cost(bias.nbytes, 0, call.results)


def _linear(call: Call) -> Cost:
    x, weight = call.need("input"), call.need("weight")
    rows, inputs = (int(d) for d in weight.dims)
    return linear_cost(_tokens(x), rows, inputs, weight.nbytes, x.dtype.itemsize) + _bias(call)


def _grouped_linear(call: Call) -> Cost:
    """A row meets one expert, so at most as many experts' weights are read as there are rows."""
    x, weight = call.need("x"), call.need("weight")
    experts, rows, inputs = (int(d) for d in weight.dims)
    read = weight.nbytes // max(1, experts) * min(experts, _tokens(x))
    cost = linear_cost(_tokens(x), rows, inputs, read, x.dtype.itemsize)
    return cost + Cost(call.need("ends").nbytes)


def _stand_in(kind: TensorType | None) -> Any:
    """Return a tensor without storage: the cost functions look at shapes alone."""
    return None if kind is None else torch.empty([int(d) for d in kind.dims], dtype=kind.dtype, device="meta")


def _quant_linear(call: Call) -> Cost:
    x = call.need("x")
    codes, scales, zeros = (_stand_in(call.kind(name)) for name in ("codes", "scales", "zeros"))
    stored = QuantCodes(codes, scales, zeros, call.args["bits"], call.args["group"], _last(x))
    return quant_cost(stored, _tokens(x), x.dtype.itemsize) + _bias(call)


def _shiftadd_linear(call: Call) -> Cost:
    x, layout = call.need("x"), call.args
    tensors = (_stand_in(call.kind(name)) for name in ("signs", "scales", "exponents", "offsets"))
    signs, scales, exponents, offsets = tensors
    stored = (signs, scales, exponents, offsets, layout["group"], layout["terms"], _last(x))
    codes = ShiftCodes(*stored, layout["row_group"], layout["code"])
    return shiftadd_cost(codes, _tokens(x), x.dtype.itemsize) + _bias(call)


def _nested_linear(call: Call) -> Cost:
    x, layout = call.need("x"), call.args
    scales, exponents, offsets = (
        tuple(map(_stand_in, _tensors(layout[name]))) for name in ("scales", "exponents", "offsets")
    )
    stored = (_stand_in(call.need("signs")), scales, exponents, offsets, layout["group"], layout["terms"], _last(x))
    codes = NestedCodes(*stored, layout["row_group"], tuple(layout["precisions"]))
    return nested_cost(codes, layout["precision"], _tokens(x), x.dtype.itemsize) + _bias(call)


def _sparse_linear(call: Call) -> Cost:
    x, a = call.need("x"), call.args
    values, mask, scales = (_stand_in(call.kind(name)) for name in ("values", "mask", "scales"))
    codes = sparse_parts(values, mask, scales, a["n"], a["m"], a["bits"], a["group"], _last(x))
    return sparse_cost(codes, _tokens(x), x.dtype.itemsize) + _bias(call)


def _sparse_shiftadd_linear(call: Call) -> Cost:
    x, a = call.need("x"), call.args
    tensors = (_stand_in(call.kind(name)) for name in ("signs", "scales", "exponents", "offsets", "mask"))
    signs, scales, exponents, offsets, mask = tensors
    layout = (a["n"], a["m"], a["group"], a["terms"], a["row_group"], a["code"])
    codes = sparse_shift_parts(signs, scales, exponents, offsets, mask, *layout, _last(x))
    return sparse_cost(codes, _tokens(x), x.dtype.itemsize) + _bias(call)


def _hadamard(call: Call) -> Cost:
    x = call.need("x")
    return hadamard_cost(_last(x), call.args["order"], _tokens(x), x.dtype.itemsize)


def _encode_tokens(call: Call) -> Cost:
    x = call.need("x")
    return encode_cost(_last(x), call.args["bits"], _tokens(x), x.dtype.itemsize)


def _decode_tokens(call: Call) -> Cost:
    return decode_cost(call.args["width"], call.args["bits"], _tokens(call.need("rows")), call.args["dtype"].itemsize)


def _softmax_of(n: int, rows: int) -> Cost:
    """Largest value, differences, exponentials, sums, quotients."""
    return Cost(0, 2 * n, 3 * n - 2 * rows)


def _softmax(call: Call) -> Cost:
    n, dim = call.results, call.args["dim"]
    return Cost(call.moved) + _softmax_of(n, n // max(1, int(call.need("self").dims[dim])))


def _attention(call: Call) -> Cost:
    """softmax(scale Q K^T + mask) V; keys and values hold the cache, each read once."""
    query, key, value = (call.need(name) for name in ("query", "key", "value"))
    seen, width = int(key.dims[-2]), _last(query)
    rows = count(query) // width
    scores, results = rows * seen, rows * _last(value)
    mask = call.kind("attn_mask")
    masked = scores if mask is not None and mask.dtype.is_floating_point else 0
    products = Cost(call.moved, scores * width + results * seen, scores * (width - 1) + results * (seen - 1))
    return products + Cost(0, count(query), masked) + _softmax_of(scores, rows)


def _norm(centred: bool) -> Rule:
    """Return the rule of a norm over the last dims; `centred` ones take the mean away first.

    Squares, their mean, one root a row, the product with it, gain and bias.
    """

    def rule(call: Call) -> Cost:
        n = call.results if isinstance(call.out, TensorType) else count(call.out[0])
        shape = call.args.get("normalized_shape")
        width = math.prod(shape) if shape else n
        rows = n // max(1, width)
        gain, bias = (n if call.kind(name) else 0 for name in ("weight", "bias"))
        middle = Cost(0, rows, 2 * n - rows) if centred else Cost()
        return Cost(call.moved, 2 * n + 2 * rows + gain, n + bias) + middle

    return rule


def _rope(call: Call) -> Cost:
    x = call.need("x")
    turned = count(x) // max(1, _last(x)) * _last(call.need("cos"))
    return Cost(call.moved, 2 * turned, turned)


def _gathered(call: Call) -> Cost:
    """Rows are read as often as they are asked for, the rest of the table not at all."""
    asked = _tensors([call.args.get("indices"), call.args.get("index")])
    return Cost(2 * call.written + sum(kind.nbytes for kind in asked))


def _reduced(multiplies: int, adds: int, per_result: int = 0) -> Rule:
    """Return the rule of a reduction: so much a value read, and `per_result` multiplies for each one written.

    A sum or product of n values takes n - 1 steps, hence the results that come off.
    """

    def rule(call: Call) -> Cost:
        if call.kind("other") is not None:  # max and min of two tensors
            return _each(0, 1)(call)
        n, out = count(call.need("self")), call.results if isinstance(call.out, TensorType) else count(call.out[0])
        steps = (multiplies * n - (out if multiplies and not adds else 0), adds * n - (out if adds else 0))
        return Cost(call.moved, max(0, steps[0]) + per_result * out, max(0, steps[1]))

    return rule


def _running(multiplies: int, adds: int) -> Rule:
    return lambda call: Cost(call.moved, multiplies * count(call.need("self")), adds * count(call.need("self")))


def _sorted(call: Call) -> Cost:
    """n log2 n comparisons along the sorted dim, also where only the largest are kept."""
    source = call.need("self")
    width = int(source.dims[call.args.get("dim", -1)]) if source.dims else 1
    return Cost(call.moved, 0, count(source) * max(0, width - 1).bit_length())


def _accumulated(call: Call) -> Cost:
    adds = call.kind("source", "src", "self") if call.args.get("accumulate", True) else None
    return Cost(call.moved, 0, 0 if adds is None else count(adds))


def _put(call: Call) -> Cost:
    values = call.kind("values", "src", "source")
    adding = bool(call.args.get("accumulate", False))
    return Cost(call.moved, 0, count(values) if adding and values is not None else 0)


def _aten(names: str, rule: Rule) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


_VIEWS = """view reshape _unsafe_view flatten unflatten view_as reshape_as transpose t permute swapaxes movedim mT
    expand expand_as unsqueeze squeeze slice select narrow split split_with_sizes chunk unbind tensor_split alias detach
    lift_fresh_copy contiguous unfold diagonal sym_size sym_numel sym_stride item _local_scalar_dense size numel
    positive"""
_COPIES = """clone cat concat stack hstack vstack repeat repeat_interleave tile pad constant_pad_nd roll flip rot90 triu
    tril where masked_fill index_copy index_fill slice_scatter select_scatter masked_scatter masked_select nonzero
    one_hot meshgrid nan_to_num logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ isfinite isinf isnan
    any all abs neg sign sgn round floor ceil trunc scatter"""
_MADE = """arange full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full empty_like eye linspace
    scalar_tensor"""
_ONE_ADD = """add sub rsub eq ne lt le gt ge maximum minimum fmax fmin clamp_min clamp_max relu frac threshold
    searchsorted bucketize"""
_ONE_MULTIPLY = """mul div true_divide floor_divide pow square sqrt rsqrt reciprocal exp exp2 log log2 log10 sin cos tan
    atan atan2 erf tanh float_power"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(FUNCTIONS, _free),
    **_aten(_VIEWS, _free),
    **_aten(_COPIES, _copied),
    **_aten(_MADE, _made),
    **_aten("to _to_copy type_as", _cast),
    **_aten(_ONE_ADD, _each(0, 1)),
    **_aten(_ONE_MULTIPLY, _each(1, 0)),
    **_aten("expm1 log1p addcmul remainder fmod", _each(1, 1)),
    **_aten("lerp", _each(1, 2)),
    **_aten("addcdiv leaky_relu", _each(2, 1)),
    **_aten("clamp clip hardtanh relu6", _each(0, 2)),
    **_aten("sigmoid silu log_sigmoid softplus", _each(2, 1)),
    **_aten("mish glu", _each(4, 1)),
    **_aten("elu celu selu", _each(2, 2)),
    **_aten("hardsigmoid", _each(1, 3)),
    **_aten("hardswish", _each(2, 3)),
    **_aten("gelu", _gelu),
    **_aten("softmax _softmax log_softmax _log_softmax", _softmax),
    **_aten("linear", _linear),
    **_aten("matmul mm bmm dot mv", _product("self")),
    **_aten("addmm", _product("mat1")),
    **_aten("baddbmm", _product("batch1")),
    **_aten("outer", _outer),
    **_aten("conv1d convolution", _convolution),
    **_aten("scaled_dot_product_attention", _attention),
    **_aten("rms_norm", _norm(centred=False)),
    **_aten("layer_norm native_layer_norm", _norm(centred=True)),
    **_aten("embedding index index_select gather take_along_dim take", _gathered),
    **_aten("sum amax amin max min argmax argmin count_nonzero", _reduced(0, 1)),
    **_aten("mean", _reduced(0, 1, per_result=1)),
    **_aten("prod", _reduced(1, 0)),
    **_aten("logsumexp", _reduced(1, 3, per_result=1)),
    **_aten("norm linalg_vector_norm", _reduced(1, 1, per_result=1)),
    **_aten("var std var_mean", _reduced(1, 3, per_result=2)),
    **_aten("cumsum", _running(0, 1)),
    **_aten("cumprod", _running(1, 0)),
    **_aten("logcumsumexp", _running(2, 1)),
    **_aten("sort argsort topk unique_consecutive", _sorted),
    **_aten("histc bincount index_add scatter_add scatter_reduce", _accumulated),
    **_aten("index_put", _put),
    "nomul.rope": _rope,
    "nomul.grouped_linear": _grouped_linear,
    "nomul.quant_linear": _quant_linear,
    "nomul.sparse_linear": _sparse_linear,
    "nomul.sparse_shiftadd_linear": _sparse_shiftadd_linear,
    "nomul.shiftadd_linear": _shiftadd_linear,
    "nomul.nested_linear": _nested_linear,
    "nomul.hadamard": _hadamard,
    "nomul.encode_tokens": _encode_tokens,
    "nomul.decode_tokens": _decode_tokens,
}
