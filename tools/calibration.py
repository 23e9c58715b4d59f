"""Token batches for calibration, and others, never seen by a pass, for judging what came out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ir.errors import UsageError
from tools.text import Piece, load_pieces

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = 4096
HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 8, 256


@dataclass(frozen=True)
class TokenData:
    """calibration: i64[batch, seqlen] tensors; held_out: i64[windows, length] from the text's last tenth; digest.

    counted: bool tensors like those of calibration, which tokens training is to predict; None for all.
    """

    calibration: tuple[torch.Tensor, ...]
    held_out: torch.Tensor
    digest: str
    counted: tuple[torch.Tensor, ...] | None = None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a whole text without special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return list(backend.encode(text, add_special_tokens=False).ids)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_pieces(tokenizer: Any, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    """Return the token ids of pieces one after another, and of each whether it is counted.

    Where a text ends, the tokenizer's end token follows, if it has one, and counts as the text does.
    """
    ids, counted = list[int](), list[bool]()
    end = getattr(tokenizer, "eos_token_id", None)
    for piece in pieces:
        found = encode(tokenizer, piece.text) + ([int(end)] if piece.ends and end is not None else [])
        ids += found
        counted += [piece.counted] * len(found)
    return ids, counted


def token_data(tokenizer: Any, spec: str, samples: int, seqlen: int, seed: int) -> TokenData:
    """Draw `samples` distinct windows of `seqlen` tokens from the first nine tenths of a text, by a local generator.

    Texts follow each other without padding. Raises UsageError when the text holds fewer windows than asked for, with
    how many there are.
    """
    import torch

    tokens, flags = encode_pieces(tokenizer, load_pieces(spec))
    ids, counted = torch.tensor(tokens, dtype=torch.long), torch.tensor(flags, dtype=torch.bool)
    split = len(ids) * 9 // 10
    windows, marks = (x[: split // seqlen * seqlen].view(-1, seqlen) for x in (ids, counted))
    rest = ids[split:]
    length = min(HELD_OUT_LENGTH, seqlen)
    if len(windows) < samples or len(rest) < length:
        raise UsageError(
            f"the calibration text is too short for {samples} samples of {seqlen} tokens",
            where=spec,
            why=f"its first nine tenths hold {len(windows)} such windows ({len(ids)} tokens in all)",
            fix=f"give more text, or --samples {max(1, len(windows))} or a smaller --seqlen",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    chosen, known = windows[order], marks[order]
    held_out = rest[: min(HELD_OUT_WINDOWS, len(rest) // length) * length].view(-1, length)
    apart = not bool(counted.all())
    digest = hashlib.sha256(chosen.numpy().tobytes() + (known.numpy().tobytes() if apart else b"")).hexdigest()
    return TokenData(in_batches(chosen), held_out, digest, in_batches(known) if apart else None)


def in_batches(windows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return windows [samples, seqlen] in batches of about as many tokens."""
    return tuple(windows.split(max(1, _BATCH_TOKENS // windows.shape[1])))
