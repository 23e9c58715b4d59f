"""`kv`: the cache of keys and values is kept in integer codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from ir.edit import Editor
from ir.ops.tokens import CODING, row_bytes
from ir.program import Program, is_call, tensor_type_of
from ir.types import TensorType
from passes.base import Context, OptionError, Pass, PlanRow, Stage

aten, nomul = torch.ops.aten, torch.ops.nomul


@dataclass(frozen=True)
class Kv(Pass):
    """Store keys and values as codes, a row with a scale of its own for each token and head.

    The program takes and returns rows of bytes where it took floats, and attention reads what they decode to, those of
    new tokens included. Source: OmniQuant (2308.13137, section 4.1).
    """

    bits: int = field(default=8, metadata={"help": "bits per code, 2 to 8"})
    symmetric: bool = field(default=False, metadata={"help": "a range around zero"})

    name: ClassVar[str] = "kv"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.TUNE
    order_reason: ClassVar[str] = "passes that fit weights must see float activations"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"coded-cache"})
    refuses: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for a width codes cannot have."""
        if not 2 <= self.bits <= 8:
            raise OptionError(self.name, "bits", f"{self.bits} is outside 2..8")

    def inserts(self) -> frozenset[str]:
        """Return the operators that code tokens."""
        return CODING

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the caches that will be coded."""
        return [PlanRow(past.name, self.name, self._figures(past)) for past, _ in caches(program)]

    def run(self, program: Program, ctx: Context) -> None:
        """Change the type of every cache, and encode what is appended to it."""
        found = caches(program)
        kept = {past.name for past, _ in found}
        for node in program.inputs[2:]:
            if node.name not in kept:
                ctx.log.skip(node.name, "it is no float cache that new tokens are only appended to")
        for past, joined in found:
            figures = self._figures(past)
            self._code(program, past, joined)
            ctx.log.report(site=past.name, **figures)

    def _figures(self, past: fx.Node) -> dict[str, float]:
        """Return the bits of the codes, and the bits a value takes with the scale and zero point of its row."""
        width = int(tensor_type_of(past).dims[-1])
        return {"cache_bits": float(self.bits), "stored_bits": 8 * row_bytes(width, self.bits) / width}

    def _code(self, program: Program, past: fx.Node, joined: fx.Node) -> None:
        kind, whole = tensor_type_of(past), tensor_type_of(joined)
        width = int(kind.dims[-1])
        new, dim = joined.args[0][1], joined.args[1]  # type: ignore[index]
        rows = row_bytes(width, self.bits)
        editor = Editor(program, self.name).before(joined)
        editor.set_type(past, TensorType(torch.uint8, (*kind.dims[:-1], rows)))
        coded = TensorType(torch.uint8, (*tensor_type_of(new).dims[:-1], rows))  # type: ignore[arg-type]
        encoded = editor.call(nomul.encode_tokens, new, self.bits, self.symmetric, like=joined, type=coded)
        together = TensorType(torch.uint8, (*whole.dims[:-1], rows))
        cache = editor.call(aten.cat, [past, encoded], dim, like=joined, type=together)
        decoded = editor.call(nomul.decode_tokens, cache, self.bits, width, whole.dtype, like=joined)
        for user in list(joined.users):
            user.replace_input_with(joined, cache if user.op == "output" else decoded)
        editor.replace(joined, cache, keep_name=True)
        editor.erase(joined)


def caches(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Return the inputs that hold a cache of floats, each with the output in which new tokens are appended to it."""
    outputs = set(program.outputs)
    found = []
    for past in program.inputs[2:]:
        kind = past.meta["type"]
        readers = [u for u in past.users if not is_call(u, aten.sym_size)]
        if len(readers) != 1 or not isinstance(kind, TensorType) or not kind.dtype.is_floating_point:
            continue
        (joined,) = readers
        parts = joined.args[0] if is_call(joined, aten.cat) and len(joined.args) > 1 else ()
        appended = isinstance(parts, (list, tuple)) and len(parts) == 2 and parts[0] is past
        dim = joined.args[1] if appended else -1
        along_tokens = isinstance(dim, int) and dim % len(kind.dims) != len(kind.dims) - 1
        if joined in outputs and along_tokens:
            found.append((past, joined))
    return found
