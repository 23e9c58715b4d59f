"""Levels: which operators a program may call at each stage of a compilation, and what is checked there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ir.checks import CHECKS, Diagnostic, Row, about
from ir.errors import NomulError, UsageError
from ir.program import Program
from ir.text import FUNCTIONS, op_name

_ATEN = {
    "matrix products": "linear matmul mm bmm addmm baddbmm dot mv einsum outer conv1d convolution",
    "attention, norms": "scaled_dot_product_attention rms_norm layer_norm native_layer_norm group_norm",
    "activations": """silu gelu relu relu6 sigmoid tanh leaky_relu elu celu selu mish hardtanh hardsigmoid hardswish
        softplus threshold glu softmax _softmax log_softmax _log_softmax log_sigmoid""",
    "arithmetic": """add sub rsub mul div true_divide floor_divide remainder fmod pow square sqrt rsqrt reciprocal exp
        exp2 expm1 log log2 log10 log1p sin cos tan atan atan2 erf abs neg positive sign sgn round floor ceil trunc frac
        clamp clamp_min clamp_max clip maximum minimum fmax fmin lerp addcmul addcdiv nan_to_num ldexp float_power""",
    "logic": """eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
        bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ isfinite isinf
        isnan where masked_fill any all""",
    "reductions": """sum mean amax amin max min prod var std var_mean norm linalg_vector_norm argmax argmin cumsum
        cumprod logsumexp logcumsumexp count_nonzero""",
    "views": """view reshape _unsafe_view flatten unflatten view_as reshape_as transpose t permute swapaxes movedim mT
        expand expand_as unsqueeze squeeze slice select narrow split split_with_sizes chunk unbind tensor_split alias
        detach lift_fresh_copy contiguous clone unfold diagonal""",
    "joining": "cat concat stack hstack vstack repeat repeat_interleave tile pad constant_pad_nd roll flip rot90",
    "indexing": """embedding index index_select gather take_along_dim take scatter scatter_add scatter_reduce index_put
        index_add index_copy index_fill slice_scatter select_scatter masked_scatter nonzero masked_select topk sort
        argsort one_hot bincount histc searchsorted bucketize unique_consecutive triu tril _grouped_mm""",
    "construction": """arange full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full empty_like
        eye linspace scalar_tensor meshgrid""",
    "casts": "to _to_copy type_as",
    "sizes": "sym_size sym_numel sym_stride item _local_scalar_dense size numel",
}

MODEL_OPS = frozenset(
    [f"aten.{name}" for names in _ATEN.values() for name in names.split()]
    + list(FUNCTIONS)
    + ["nomul.rope", "nomul.grouped_linear", "nomul.hadamard"]
)

# Rounding that keeps floats: training runs it inside a block, and a finished program must hold codes in its place.
TRAINING_OPS = frozenset(["nomul.straight_tokens"])

# These carry the tag of random operators for one argument, which their own check holds to zero.
_RANDOM_BY_ARGUMENT = frozenset(["aten.scaled_dot_product_attention"])


@dataclass(frozen=True)
class Level:
    """A whitelist of operators (`aten.linear`, or any of a namespace) and the checks that hold there."""

    name: str
    ops: frozenset[str]
    namespaces: frozenset[str]
    checks: tuple[Row, ...] = CHECKS

    def allows(self, name: str) -> bool:
        """Return whether an operator, named without overload, may be called."""
        return name in self.ops or name.partition(".")[0] in self.namespaces

    def rows(self) -> tuple[Row, ...]:
        """Return all checks, the whitelist first."""
        return (("ops", self.check_ops), *self.checks)

    def check_ops(self, program: Program) -> list[Diagnostic]:
        """Report calls that are not on the whitelist, that write into arguments or that draw random numbers."""
        calls = (n for n in program.graph.nodes if n.op == "call_function")
        return [d for d in (self._problem(n) for n in calls) if d is not None]

    def _problem(self, node: fx.Node) -> Diagnostic | None:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return about(node, "ops", "higher-order operators are not allowed", "inline the subgraph in the frontend")
        try:
            name = op_name(target)
        except NomulError as error:
            return about(node, "ops", error.what, error.fix)
        if isinstance(target, torch._ops.OpOverload):
            rule, fix = _impurity(target, name)
            if rule:
                return about(node, "ops", rule, fix)
        if name in TRAINING_OPS:
            fix = "encode_tokens and decode_tokens round the same values and keep codes"
            return about(node, "ops", f"{name} only rounds for training and must not be in a program", fix)
        if self.allows(name):
            return None
        fix = "rewrite it into allowed operators (the frontend's canonical form), or lower it in a later pass"
        return about(node, "ops", f"{name} is not allowed at level {self.name}", fix)


def _impurity(target: Any, name: str) -> tuple[str, str]:
    if target._schema.is_mutable:
        return f"{name} writes into its arguments", "call the functional form, without trailing underscore or out="
    if "assert" in name or name.startswith("aten.sym_constrain"):
        return f"{name} is an assertion, which computes nothing", "erase it in the frontend"
    if torch.Tag.nondeterministic_seeded in target.tags and name not in _RANDOM_BY_ARGUMENT:
        return f"{name} draws random numbers", "export the model in eval mode, or erase dropout in the frontend"
    return "", ""


MODEL = Level("model", MODEL_OPS, frozenset())
COMPRESSED = Level("compressed", MODEL_OPS, frozenset(["nomul"]))


def target_level(ops: Iterable[str], namespaces: Iterable[str] = ()) -> Level:
    """Return the level of a backend that runs exactly these operators, and all of these namespaces."""
    return Level("target", frozenset(ops), frozenset(namespaces))


def level_named(name: str) -> Level:
    """Return the level `model` or `compressed`; raises UsageError for others, `target` being each backend's own."""
    for level in (MODEL, COMPRESSED):
        if level.name == name:
            return level
    raise UsageError(
        f"no level named {name} is known without its backend",
        fix="use model or compressed, or pass the backend's level (ir.levels.target_level)",
    )
