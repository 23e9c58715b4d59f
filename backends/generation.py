"""Writing on after a prompt: prefill, then one token a step with the cache, greedy or sampled."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ir.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from backends.base import Runtime

# Enough tokens of the prompt that the first new token is decoded as it would be within the text.
_CONTEXT = 8
_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises UsageError for settings out of range.

    temperature: 0 is greedy; top_k: most tokens to choose from, 0 for no limit; top_p: least probability mass to
    choose from; seed: of the generator that draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            (0 <= self.temperature < float("inf"), "temperature", "it must be 0 or more"),
            (self.top_k >= 0, "top_k", "it must be 0 (no limit) or more"),
            (0 < self.top_p <= 1, "top_p", "it must be above 0 and at most 1"),
        )
        for fine, name, why in rules:
            if not fine:
                raise UsageError(f"{name} cannot be {getattr(self, name)}", where=name, why=why)


@dataclass(frozen=True)
class Generation:
    """What a model wrote: `text` and `ids` after the prompt, whether it ended by `end` or `length`, and how fast.

    text: empty when the prompt was given as ids without a listener; the ids include the end token. Seconds cover the
    model alone, prefill with the first token, decode with all later ones.
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    stopped: str
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, 0 when nothing was decoded after the first token."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


class TextStream:
    """Turns token ids into pieces of text that add up to the whole, however characters are split over tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(prompt_ids[-_CONTEXT:])
        self._shown = self._decode()
        self.text = ""

    def add(self, token: int) -> str:
        """Return the text that a token completes, empty while it ends within a character."""
        self._ids.append(token)
        text = self._decode()
        return "" if text.endswith(_BROKEN) else self._take(text)

    def rest(self) -> str:
        """Return what is left at the end, an incomplete character as its replacement sign."""
        return self._take(self._decode())

    def _take(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], text
        self.text += piece
        return piece

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token for logits [vocab]; raises UsageError when they are not numbers."""
    if not torch.isfinite(logits.max()):
        raise UsageError("the model gave no finite logits", fix="check the artifact with python -m tools.evaluate")
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled, order = (logits.double() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        scaled, order = scaled[: sampling.top_k], order[: sampling.top_k]
    shares = scaled.softmax(-1)
    # A token stays when the tokens before it have not yet reached the mass, so the first always does.
    shares = torch.where(shares.cumsum(-1) - shares < sampling.top_p, shares, 0.0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def generate(
    runtime: Runtime,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    on_text: Callable[[str], None] | None,
) -> Generation:
    """Return what a runtime writes after a prompt; arguments and errors as for `Runtime.generate`."""
    prompt_ids = _prompt_ids(runtime, prompt)
    if max_new_tokens < 1:
        raise UsageError("nothing is to be generated", where="max_new_tokens", why=f"it is {max_new_tokens}")
    wants_text = isinstance(prompt, str) or on_text is not None
    stream = TextStream(runtime.tokenizer, prompt_ids) if wants_text else None
    steps = _Steps(runtime, prompt_ids, sampling)
    stopped = "length"
    for _ in range(max_new_tokens):
        token = steps.next()
        if token in runtime.end_tokens:
            stopped = "end"
            break
        _tell(stream.add(token) if stream else "", on_text)
    _tell(stream.rest() if stream else "", on_text)
    text = stream.text if stream else ""
    return Generation(text, tuple(steps.new), prompt_ids, stopped, steps.prefill, steps.decode)


class _Steps:
    """The state of one generation: the tokens so far, the cache, and the time spent."""

    def __init__(self, runtime: Runtime, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        self._runtime, self._sampling, self._prompt = runtime, sampling, list(prompt_ids)
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._past: list[Tensor] | None = None
        self.new: list[int] = []
        self.prefill = self.decode = 0.0

    def next(self) -> int:
        """Run the tokens the cache lacks and return the next one."""
        start = time.perf_counter()
        fresh = self.new[-1:] if self._past else [*self._prompt, *self.new]
        logits, past = self._runtime.forward(torch.tensor([fresh]), None, self._past)
        self._past = past if self._runtime.interface.cached else None
        token = choose(logits[0, -1], self._sampling, self._generator)
        seconds = time.perf_counter() - start
        if self.new:
            self.decode += seconds
        else:
            self.prefill = seconds
        self.new.append(token)
        return token


def _prompt_ids(runtime: Runtime, prompt: str | Sequence[int]) -> tuple[int, ...]:
    ids = runtime.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    if not len(ids):
        raise UsageError("the prompt is empty", why="a model needs at least one token to go on from")
    return tuple(int(i) for i in ids)


def _tell(piece: str, on_text: Callable[[str], None] | None) -> None:
    if piece and on_text is not None:
        on_text(piece)
