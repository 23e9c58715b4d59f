"""What goes into a program by which name: token ids, attention mask and key/value cache, checked and filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ir.errors import UnsupportedError, UsageError
from ir.program import Program, is_call, tensor_type_of
from ir.types import TensorType, tensor_type

aten = torch.ops.aten
IDS, MASK, PAST = "input_ids", "attention_mask", "past_"
_KNOWN = f"{IDS}, {MASK} and {PAST}key_0, {PAST}value_0, ..."


@dataclass(frozen=True)
class Interface:
    """The inputs of a language model's program.

    names: of all inputs, in order; cache: the types of the past keys and values, in order; vocabulary: logits per
    token, or None where it is not static; counts_padding: positions come from a table and count padding tokens.
    """

    names: tuple[str, ...]
    cache: tuple[TensorType, ...]
    vocabulary: int | None
    counts_padding: bool

    @property
    def cached(self) -> bool:
        """Whether the program takes and returns a key/value cache."""
        return bool(self.cache)

    def bind(self, ids: Tensor, mask: Tensor | None, past: Sequence[Tensor] | None) -> list[Tensor]:
        """Return one tensor for every input; raises UsageError when one does not fit, UnsupportedError for padding
        on the left where positions would count it."""
        self._check_ids(ids)
        past = self.empty_cache(ids.shape[0]) if past is None else list(past)
        length = self._check_past(past, ids.shape[0])
        mask = self._checked_mask(mask, ids, length)
        values = {IDS: ids.long(), MASK: mask}
        pieces = iter(past)
        return [values[name] if name in values else next(pieces) for name in self.names]

    def empty_cache(self, batch: int) -> list[Tensor]:
        """Return the cache before the first token: every past length 0."""
        return [torch.zeros([_size(d, batch, 0) for d in kind.dims], dtype=kind.dtype) for kind in self.cache]

    def _check_ids(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or 0 in ids.shape:
            raise _unfit(IDS, ids, "it must hold integers, [batch, seq], at least one of each")
        if self.vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            why = f"ids run from {int(ids.min())} to {int(ids.max())}, the vocabulary from 0 to {self.vocabulary - 1}"
            raise UsageError("a token id is not in the vocabulary", where=IDS, why=why, fix="use the model's tokenizer")

    def _check_past(self, past: list[Tensor], batch: int) -> int:
        if len(past) != len(self.cache):
            raise UsageError(
                f"the program takes {len(self.cache)} past tensors",
                where=PAST,
                why=f"{len(past)} were given",
                fix="pass on the list that forward returned, or None to start",
            )
        length = next((int(p.shape[2]) for p in past if p.ndim == 4), 0)
        for index, (tensor, kind) in enumerate(zip(past, self.cache, strict=True)):
            dims = tuple(_size(d, batch, length) for d in kind.dims)
            if tuple(tensor.shape) != dims or tensor.dtype != kind.dtype:
                raise _unfit(f"past[{index}]", tensor, f"it must be {TensorType(kind.dtype, dims)}")
        return length

    def _checked_mask(self, mask: Tensor | None, ids: Tensor, past: int) -> Tensor:
        wanted = (ids.shape[0], past + ids.shape[1])
        if mask is None:
            return torch.ones(wanted, dtype=torch.long)
        if tuple(mask.shape) != wanted:
            raise _unfit(MASK, mask, f"it must be [batch, past+seq] = {list(wanted)}")
        if self.counts_padding and not bool(mask[:, 0].all()):
            raise UnsupportedError(
                "the model cannot take padding on the left",
                where=MASK,
                why="it looks positions up in a table, and positions count padding tokens too",
                fix="pad on the right, or run the rows one by one",
            )
        return mask.long()


def interface_of(program: Program) -> Interface:
    """Return the interface of a program; raises UnsupportedError when an input is none of a language model's."""
    names = tuple(n.name for n in program.inputs)
    strange = [n for n in names if n not in (IDS, MASK) and not n.startswith(PAST)]
    if strange or IDS not in names:
        why = f"it has an input {strange[0]}" if strange else f"it has no input {IDS}"
        fix = f"inputs are called {_KNOWN}"
        raise UnsupportedError("the program is no language model", where=program.name, why=why, fix=fix)
    cache = tuple(tensor_type_of(n) for n in program.inputs if n.name.startswith(PAST))
    last = tensor_type_of(program.outputs[0]).dims[-1]
    return Interface(names, cache, last if isinstance(last, int) else None, _counts_padding(program))


def _counts_padding(program: Program) -> bool:
    """Return whether a table is looked up by numbers that depend on sizes alone, as learned absolute positions are."""
    return any(
        isinstance(node.args[1], fx.Node) and not _depends_on_values(node.args[1])
        for node in program.calls(aten.embedding)
    )


def _depends_on_values(node: fx.Node) -> bool:
    seen, stack = {node}, [node]
    while stack:
        found = stack.pop()
        if found.op == "placeholder":
            return True
        for source in () if is_call(found, aten.sym_size) else found.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return False


def _size(dim: int | str, batch: int, past: int) -> int:
    return dim if isinstance(dim, int) else {"batch": batch, "past": past}[dim]


def _unfit(where: str, tensor: Tensor, why: str) -> UsageError:
    return UsageError(f"{where} does not fit the program", where=where, why=f"{why}, not {tensor_type(tensor)}")
