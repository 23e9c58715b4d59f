"""The contract of a backend: which programs it runs, what it writes for them, and the runtime that it loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx

from backends.detours import Detour
from backends.generation import Generation, Sampling, generate
from backends.interface import Interface, interface_of
from backends.signature import Signature, signature_of
from backends.tokenizer import end_tokens, folder_tokenizer
from ir.analysis import predicts_tokens
from ir.errors import UnsupportedError
from ir.levels import Level
from ir.program import Program
from ir.rewrite import No
from ir.text import node_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5


class Runtime(ABC):
    """A loaded program: tensors in and out by name, and of a language model logits, cache and text from prompts.

    program: what is run, never changed by running it; folder: where tokenizer and generation settings lie, or None.
    """

    def __init__(
        self,
        program: Program,
        folder: Path | None = None,
        tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
    ) -> None:
        self.program, self.folder = program, folder
        self._interface = interface_of(program) if predicts_tokens(program) else None
        self._tokenizer = tokenizer

    @cached_property
    def signature(self) -> Signature:
        """The program's inputs and results, by name."""
        return signature_of(self.program)

    @property
    def interface(self) -> Interface:
        """The inputs as a language model's; raises UnsupportedError for a program that is none."""
        if self._interface is None:
            raise UnsupportedError(
                "the program is no language model",
                where=self.program.name,
                why=f"it takes {', '.join(self.signature.inputs)} and gives {', '.join(self.signature.results)}",
                fix="load it from Python and call run with a tensor for every input",
            )
        return self._interface

    @abstractmethod
    def execute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the program on tensors for its inputs, in order, and return its outputs."""

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the results by name for tensors by name of the inputs; raises UsageError for those that do not fit."""
        return dict(zip(self.signature.results, self.execute(self.signature.bind(feeds)), strict=True))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits [batch, seq, vocab] and the new key/value cache.

        input_ids: int64 [batch, seq]; attention_mask: [batch, past+seq], 1 for tokens and 0 for padding (default: no
        padding); past: the cache of the tokens before, as returned. Raises UsageError for inputs that do not fit,
        UnsupportedError for a program that is no language model.
        """
        outputs = self.execute(self.interface.bind(input_ids, attention_mask, past))
        return outputs[0], list(outputs[1:])

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Return what the model writes after a prompt, up to an end token or `max_new_tokens`.

        prompt: text, or token ids (then no tokenizer is needed unless `on_text` is given); temperature: 0 takes the
        most likely token; top_k: 0 is no limit; on_text: is called with each piece of text as it comes. Raises
        UsageError for an empty prompt or settings out of range, UnsupportedError when text needs a tokenizer that is
        not there.
        """
        self.require_language_model()
        sampling = Sampling(temperature, top_k, top_p, seed)
        return generate(self, prompt, max_new_tokens, sampling, on_text)

    def require_language_model(self) -> None:
        """Raise UnsupportedError for a program that is no language model."""
        _ = self.interface

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model, read when it is first asked for; raises UnsupportedError when there is none."""
        if self._tokenizer is not None:
            return self._tokenizer()
        if self.folder is None:
            raise UnsupportedError(
                "the model has no tokenizer",
                where=self.program.name,
                why="it was not read from a folder",
                fix="give token ids instead of text",
            )
        return folder_tokenizer(self.folder)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The ids at which text ends: those of generation_config.json or config.json, and the tokenizer's own."""
        found = set() if self.folder is None else end_tokens(self.folder)
        try:
            own = self.tokenizer.eos_token_id
        except UnsupportedError:
            own = None
        return frozenset(found if own is None else found | {int(own)})


@dataclass(frozen=True)
class Backend(ABC):
    """A way to run programs: an operator table, a packer and a runtime; its fields are its settings.

    name: as written after `--target`; level: the operators that it runs (`ir.levels`).
    """

    name: ClassVar[str]
    level: ClassVar[Level]

    @abstractmethod
    def refuses(self, node: fx.Node) -> No | None:
        """Return why this call cannot be run, or None when it can; asked for calls that `level` allows as well."""

    @abstractmethod
    def lower(self, program: Program, folder: Path) -> tuple[Detour, ...]:
        """Write what the runtime needs beside `program.ir` and weights; raises UnsupportedError as `require` does.

        Returns the sites that are not run as they were to be, with the reasons.
        """

    @abstractmethod
    def load(self, folder: Path) -> Runtime:
        """Return the runtime of an artifact folder; raises UnsupportedError when it holds nothing for this backend."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that an artifact's manifest records, by name."""
        return asdict(self)

    def require_operators(self, names: Iterable[str], where: str) -> None:
        """Raise UnsupportedError unless `level` has all of these operators, before there is a program that calls them.

        where: what will call them.
        """
        lacking = sorted(name for name in names if not self.level.allows(name))
        if lacking:
            raise UnsupportedError(
                f"{self.name} lacks {', '.join(lacking)}",
                where=where,
                why="programs call it, or one of its kind, after that pass",
                fix="choose --target reference, which runs every program",
            )

    def require(self, program: Program) -> None:
        """Raise UnsupportedError that names the first calls this backend cannot run, with the reason for each."""
        calls = (n for n in program.graph.nodes if n.op == "call_function")
        refused = [(node, no) for node in calls if (no := self.refuses(node)) is not None]
        if not refused:
            return
        lines = [f"{node_line(node)}: {no.reason}" for node, no in refused[:_SHOWN]]
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise UnsupportedError(
            f"{self.name} cannot run this program",
            where=program.name,
            why="; ".join(lines) + more,
            fix="choose --target reference, which runs every program",
        )
