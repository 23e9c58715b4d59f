"""What each operator demands of the types around it: one row an operator, checked wherever dims are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ir.overloads import bound_args
from ir.program import TYPE
from ir.types import Dim, TensorType, type_text

Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class Site:
    """One call: its node, its arguments by schema name (defaults filled in) and its recorded type."""

    node: fx.Node
    args: dict[str, Any]

    @property
    def out(self) -> TensorType | None:
        """The recorded type of the result, if it is one tensor."""
        return tensor_of(self.node)

    def tensor(self, name: str) -> TensorType | None:
        """Return the type of a tensor argument; None when it is absent, not a tensor or untyped."""
        return tensor_of(self.args.get(name))

    def dims(self, name: str) -> Dims | None:
        """Return the dims of a tensor argument, or None."""
        kind = self.tensor(name)
        return None if kind is None else kind.dims


# A check yields one sentence for each rule that is broken.
Check = Callable[[Site], Iterator[str]]


def site_of(node: fx.Node) -> Site | None:
    """Return the call with its arguments by name, or None when they do not fit the operator's schema."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return Site(node, dict(enumerate(node.args)))  # type: ignore[arg-type]
    values = bound_args(target, node.args, node.kwargs)
    if values is None:
        return None
    return Site(node, {a.name: v for a, v in zip(target._schema.arguments, values, strict=True)})


def tensor_of(value: Any) -> TensorType | None:
    """Return the tensor type recorded on a node; None for anything else."""
    kind = value.meta.get(TYPE) if isinstance(value, fx.Node) else None
    return kind if isinstance(kind, TensorType) else None


def differ(a: Dim, b: Dim) -> bool:
    """Return whether two dims are certainly different; symbols may turn out equal to anything."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def same_dims(what: str, got: Dims | None, expected: Dims | None) -> Iterator[str]:
    """Yield a sentence when dims that are known differ from the dims expected."""
    if got is None or expected is None:
        return
    if len(got) != len(expected) or any(map(differ, got, expected)):
        yield f"{what} must be [{_text(expected)}], but it is [{_text(got)}]"


def _text(dims: Sequence[Dim]) -> str:
    return ",".join(map(str, dims))


def _out_is(site: Site, expected: Dims | None) -> Iterator[str]:
    yield from same_dims("the result's dims", site.out.dims if site.out else None, expected)


def linear(site: Site) -> Iterator[str]:
    """x [..., K], weight [N, K], bias [N] -> [..., N], all of one dtype."""
    x, weight, bias = site.tensor("input"), site.tensor("weight"), site.tensor("bias")
    if x is None or weight is None:
        return
    if len(weight.dims) != 2:
        yield f"the weight must have two dims, but it is {weight}"
        return
    if not x.dims or differ(x.dims[-1], weight.dims[1]):
        yield f"the input's last dim must be the weight's {weight.dims[1]}, but the input is {x}"
    kinds = {k.dtype for k in (x, weight, bias, site.out) if k is not None}
    if len(kinds) > 1:
        yield f"input, weight, bias and result must have one dtype, but they have {sorted(map(str, kinds))}"
    yield from same_dims("the bias's dims", bias.dims if bias else None, weight.dims[:1])
    yield from _out_is(site, (*x.dims[:-1], weight.dims[0]))


def norm(site: Site) -> Iterator[str]:
    """x [..., *shape] normalised over its last dims; weight and bias have exactly that shape."""
    x, shape = site.dims("input"), site.args["normalized_shape"]
    shape = tuple(d if isinstance(d, int) else "?" for d in shape)
    if x is not None:
        yield from same_dims("the normalised shape", shape, x[len(x) - len(shape) :] if len(shape) <= len(x) else x)
    yield from same_dims("the weight's dims", site.dims("weight"), shape)
    yield from same_dims("the bias's dims", site.dims("bias"), shape)
    yield from _out_is(site, x)


def embedding(site: Site) -> Iterator[str]:
    """weight [V, D], indices integer [...] -> [..., D] in the weight's dtype."""
    weight, indices = site.tensor("weight"), site.tensor("indices")
    if weight is None or indices is None:
        return
    if len(weight.dims) != 2:
        yield f"the weight must have two dims, but it is {weight}"
        return
    if indices.dtype not in (torch.int64, torch.int32):
        yield f"indices must be i64 or i32, but they are {indices}"
    if site.out is not None and site.out.dtype != weight.dtype:
        yield f"the result must have the weight's dtype, but it is {site.out} and the weight {weight}"
    yield from _out_is(site, (*indices.dims, weight.dims[1]))


def cat(site: Site) -> Iterator[str]:
    """Tensors equal but for one dim, along which the result has the sum."""
    kinds = [tensor_of(t) for t in site.args["tensors"]]
    # ATen lets an empty one-dim tensor stand in a list of any rank.
    known = [k.dims for k in kinds if k is not None and k.dims != (0,)]
    if not known or len(known) < len(kinds):
        return
    rank, dim = len(known[0]), site.args["dim"]
    if not isinstance(dim, int) or not -rank <= dim < rank:
        yield f"dim must lie within {rank} dims, but it is {dim}"
        return
    dim %= rank
    for dims in known[1:]:
        yield from same_dims("every piece's dims", dims, (*known[0][:dim], *dims[dim : dim + 1], *known[0][dim + 1 :]))
    sizes = [dims[dim] for dims in known if len(dims) == rank]
    total: Dim = sum(s for s in sizes if isinstance(s, int)) if all(isinstance(s, int) for s in sizes) else "?"
    yield from _out_is(site, (*known[0][:dim], total, *known[0][dim + 1 :]))


def matmul(site: Site) -> Iterator[str]:
    """a [..., M, K] by b [..., K, N]: the inner dims agree and end up as [..., M, N]."""
    a, b = site.dims("self"), site.dims("other") or site.dims("mat2")
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return
    if differ(a[-1], b[-2]):
        yield f"the inner dims must agree, but they are {a[-1]} of [{_text(a)}] and {b[-2]} of [{_text(b)}]"
    if site.out is not None:
        yield from same_dims("the result's last two dims", site.out.dims[-2:], (a[-2], b[-1]))


def attention(site: Site) -> Iterator[str]:
    """query [..., L, D], key [..., S, D], value [..., S, E] -> [..., L, E], without dropout."""
    query, key, value = site.dims("query"), site.dims("key"), site.dims("value")
    if site.args.get("dropout_p", 0) != 0:
        yield f"dropout_p must be 0, but it is {site.args['dropout_p']}"
    if query is None or key is None or value is None:
        return
    if min(len(query), len(key), len(value)) < 2:
        yield "query, key and value need at least two dims"
        return
    if differ(query[-1], key[-1]):
        yield f"query and key must have one head width, but they have {query[-1]} and {key[-1]}"
    if differ(key[-2], value[-2]):
        yield f"key and value must have one length, but they have {key[-2]} and {value[-2]}"
    yield from _out_is(site, (*query[:-1], value[-1]))


def same_as_input(site: Site) -> Iterator[str]:
    """The result has the dims of the first argument."""
    yield from _out_is(site, site.dims("input") or site.dims("self"))


def cast(site: Site) -> Iterator[str]:
    """The result has the dims of the first argument and the dtype asked for."""
    yield from _out_is(site, site.dims("self"))
    wanted = site.args.get("dtype")
    if isinstance(wanted, torch.dtype) and site.out is not None and site.out.dtype != wanted:
        yield f"the result must be {wanted}, but it is {site.out}"


def transpose(site: Site) -> Iterator[str]:
    """Two dims change places."""
    dims = list(site.dims("self") or ())
    first, second = site.args["dim0"], site.args["dim1"]
    if dims:
        if not all(isinstance(d, int) and -len(dims) <= d < len(dims) for d in (first, second)):
            yield f"dims {first} and {second} must lie within [{_text(dims)}]"
            return
        dims[first], dims[second] = dims[second], dims[first]
        yield from _out_is(site, tuple(dims))


def permute(site: Site) -> Iterator[str]:
    """The dims are the input's in another order."""
    dims, order = site.dims("self"), site.args["dims"]
    if dims is None or not all(isinstance(d, int) for d in order):
        return
    if sorted(d % max(len(dims), 1) for d in order) != list(range(len(dims))):
        yield f"dims must be an order of the {len(dims)} dims of the input, but they are {list(order)}"
        return
    yield from _out_is(site, tuple(dims[d] for d in order))


def reshape(site: Site) -> Iterator[str]:
    """The number of elements stays."""
    source, out = site.tensor("self"), site.out
    if source and out and source.static and out.static:
        before, after = math.prod(map(int, source.dims)), math.prod(map(int, out.dims))
        if before != after:
            yield f"the result must have {before} elements, but {out} has {after}"


def pointwise(site: Site) -> Iterator[str]:
    """The result's dims are the operands' broadcast together."""
    operands = [k.dims for k in map(tensor_of, site.node.all_input_nodes) if k is not None]
    if not operands or site.out is None:
        return
    result: list[Dim] = [1] * max(map(len, operands))
    for dims in operands:
        for place in range(1, len(dims) + 1):
            have, next_ = result[-place], dims[-place]
            if have != 1 and next_ != 1 and differ(have, next_):
                yield f"operands must broadcast, but dim {-place} is {have} in one and {next_} in another"
                return
            # A number beside a symbol decides the size: the symbol must equal it or be 1.
            if have == 1 or (next_ != 1 and isinstance(next_, int)):
                result[-place] = next_
    yield from _out_is(site, tuple(result))


def getitem(site: Site) -> Iterator[str]:
    """The index lies within the tuple, and the type is that element's."""
    if len(site.node.args) != 2:
        yield f"a source and an index are needed, but there are {len(site.node.args)} arguments"
        return
    source, index = site.node.args
    kind = source.meta.get(TYPE) if isinstance(source, fx.Node) else None
    if not isinstance(kind, tuple):
        yield f"only tuples have items, but the source is {type_text(kind)}"
    elif not isinstance(index, int) or not -len(kind) <= index < len(kind):
        yield f"the index must lie within the {len(kind)} values of the source, but it is {index}"
    elif TYPE in site.node.meta and kind[index] != site.node.meta[TYPE]:
        yield f"value {index} of the source is {type_text(kind[index])}, not {type_text(site.node.meta[TYPE])}"


OP_CHECKS: dict[str, Check] = {
    "operator.getitem": getitem,
    "aten.linear": linear,
    "aten.rms_norm": norm,
    "aten.layer_norm": norm,
    "aten.embedding": embedding,
    "aten.cat": cat,
    "aten.matmul": matmul,
    "aten.mm": matmul,
    "aten.bmm": matmul,
    "aten.scaled_dot_product_attention": attention,
    "aten.softmax": same_as_input,
    "aten._softmax": same_as_input,
    "aten.log_softmax": same_as_input,
    "aten.cumsum": same_as_input,
    "aten.contiguous": same_as_input,
    "aten.type_as": same_as_input,
    "aten.to": cast,
    "aten._to_copy": cast,
    "aten.transpose": transpose,
    "aten.permute": permute,
    "aten.view": reshape,
    "aten.reshape": reshape,
    "aten._unsafe_view": reshape,
    "aten.flatten": reshape,
}
