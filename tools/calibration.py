"""Token batches for calibration, and others, never seen by a pass, for judging what came out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ir.errors import UsageError
from tools.text import load_text

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = 4096
_HELD_OUT_WINDOWS, _HELD_OUT_LENGTH = 8, 256


@dataclass(frozen=True)
class TokenData:
    """calibration: i64[batch, seqlen] tensors; held_out: i64[windows, length] from the text's last tenth; digest."""

    calibration: tuple[torch.Tensor, ...]
    held_out: torch.Tensor
    digest: str


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a whole text without special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return list(backend.encode(text, add_special_tokens=False).ids)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def token_data(tokenizer: Any, spec: str, samples: int, seqlen: int, seed: int) -> TokenData:
    """Draw `samples` distinct windows of `seqlen` tokens from the first nine tenths of a text, by a local generator.

    Raises UsageError when the text holds fewer windows than asked for, with how many there are.
    """
    import torch

    ids = torch.tensor(encode(tokenizer, load_text(spec)), dtype=torch.long)
    split = len(ids) * 9 // 10
    windows = ids[: split // seqlen * seqlen].view(-1, seqlen)
    rest = ids[split:]
    length = min(_HELD_OUT_LENGTH, seqlen)
    if len(windows) < samples or len(rest) < length:
        raise UsageError(
            f"the calibration text is too short for {samples} samples of {seqlen} tokens",
            where=spec,
            why=f"its first nine tenths hold {len(windows)} such windows ({len(ids)} tokens in all)",
            fix=f"give more text, or --samples {max(1, len(windows))} or a smaller --seqlen",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    chosen = windows[order]
    held_out = rest[: min(_HELD_OUT_WINDOWS, len(rest) // length) * length].view(-1, length)
    digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    return TokenData(tuple(chosen.split(max(1, _BATCH_TOKENS // seqlen))), held_out, digest)
