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

BATCH_TOKENS = 4096
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


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and behind a text, such as [CLS] and [SEP]; empty for none."""
    plain, whole = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


@dataclass(frozen=True)
class Windows:
    """How windows of a text look: of `length` tokens, judged on those of `held_out`, between special tokens or not.

    rows: windows a batch, None for as many as have about 4096 tokens.
    """

    length: int
    held_out: int
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    rows: int | None = None

    @property
    def special(self) -> int:
        """How many of a window's tokens are special ones."""
        return len(self.before) + len(self.after)

    def wrapped(self, inner: torch.Tensor) -> torch.Tensor:
        """Return windows [n, length - special] with the special tokens around them."""
        import torch

        if not self.special:
            return inner
        ends = (torch.tensor(tokens, dtype=inner.dtype).expand(len(inner), -1) for tokens in (self.before, self.after))
        before, after = ends
        return torch.cat([before, inner, after], 1)


def token_data(tokenizer: Any, spec: str, samples: int, seqlen: int | Windows, seed: int) -> TokenData:
    """Draw `samples` distinct windows of `seqlen` tokens from the first nine tenths of a text, by a local generator.

    Texts follow each other without padding. Raises UsageError when the text holds fewer windows than asked for, with
    how many there are.
    """
    import torch

    form = Windows(seqlen, min(HELD_OUT_LENGTH, seqlen)) if isinstance(seqlen, int) else seqlen
    inner, length = form.length - form.special, form.held_out - form.special
    if min(inner, length) < 1:
        why = f"{form.special} of its tokens are special ones"
        raise UsageError(f"--seqlen {form.length} leaves no room for text", why=why, fix="give a larger --seqlen")
    tokens, flags = encode_pieces(tokenizer, load_pieces(spec))
    ids, counted = torch.tensor(tokens, dtype=torch.long), torch.tensor(flags, dtype=torch.bool)
    split = len(ids) * 9 // 10
    windows, marks = (x[: split // inner * inner].view(-1, inner) for x in (ids, counted))
    rest = ids[split:]
    if len(windows) < samples or len(rest) < length:
        raise UsageError(
            f"the calibration text is too short for {samples} samples of {form.length} tokens",
            where=spec,
            why=f"its first nine tenths hold {len(windows)} such windows ({len(ids)} tokens in all)",
            fix=f"give more text, or --samples {max(1, len(windows))} or a smaller --seqlen",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    chosen, known = form.wrapped(windows[order]), marks[order]
    held_out = form.wrapped(rest[: min(HELD_OUT_WINDOWS, len(rest) // length) * length].view(-1, length))
    apart = not form.special and not bool(counted.all())
    digest = hashlib.sha256(chosen.numpy().tobytes() + (known.numpy().tobytes() if apart else b"")).hexdigest()
    return TokenData(in_batches(chosen, form.rows), held_out, digest, in_batches(known, form.rows) if apart else None)


def in_batches(windows: torch.Tensor, rows: int | None = None) -> tuple[torch.Tensor, ...]:
    """Return windows [samples, seqlen] in batches of `rows`, or of about as many tokens."""
    return tuple(windows.split(rows or max(1, BATCH_TOKENS // windows.shape[1])))
