"""The tokenizer a GGUF file describes, rebuilt on the tokenizers library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frontend.gguf_header import GgufHeader, damaged, read_header
from ir.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# Vocabularies whose split is GPT-2's after every digit was set apart; transformers' reader takes GPT-2's alone.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
_PLAIN_GPT2 = {"gpt-2", "gpt2"}
# Where llama.cpp and the originals take a whole word that is in the vocabulary before they try merges.
_WHOLE_WORDS_FIRST = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"}


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

    Byte-level text is not normalised, so decoding gives back exactly what was encoded, save for bytes the vocabulary
    has no token for. Raises UnsupportedError when the file is damaged or holds no tokenizer, or one of another kind.
    """
    from transformers import PreTrainedTokenizerFast

    header = read_header(path)
    tokens = _strings(header, "tokenizer.ggml.tokens")
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(header, tokens)
    elif kind == "llama":
        backend = _sentencepiece(header, tokens)
    else:
        raise _unsupported(header, f"its model is {kind!r}, neither 'gpt2' nor 'llama'")
    special = _special(header, tokens)
    _frame(header, backend, tokens, special, sentencepiece=kind == "llama")
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, **special}
    context = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(context, int):
        settings["model_max_length"] = context
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def write_tokenizer(path: Path, out_dir: Path) -> None:
    """Write the tokenizer of a GGUF file as tokenizer.json, tokenizer_config.json and, if it has one, a chat template.

    Raises what `gguf_tokenizer` raises; `out_dir` is made when it is missing.
    """
    tokenizer = gguf_tokenizer(path)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(out_dir))


def _unsupported(header: GgufHeader, why: str) -> UnsupportedError:
    return UnsupportedError(
        "the tokenizer of the GGUF file is not supported",
        where=str(header.path),
        why=why,
        fix="use the tokenizer files of the Hugging Face model the GGUF file was made from",
    )


def _strings(header: GgufHeader, key: str) -> list[str]:
    values = header.metadata.get(key)
    if values is None:
        raise _unsupported(header, f"its metadata has no {key}")
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise damaged(header.path, f"{key} is not a list of strings")
    return values


def _special(header: GgufHeader, tokens: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise damaged(header.path, f"tokenizer.ggml.{key}_token_id is {str(index)[:40]}, not one of {len(tokens)}")
        found[f"{name}_token"] = tokens[index]
    return found


def _byte_level(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    kind = header.metadata.get("tokenizer.ggml.pre", "gpt-2" if header.architecture == "gpt2" else None)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise damaged(header.path, "its vocabulary lists a token twice")
    merges = []
    for line in _strings(header, "tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise damaged(header.path, f"the merge {line[:40]!r} names a token that is not in the vocabulary")
        merges.append((left, right))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=kind in _WHOLE_WORDS_FIRST))
    backend.pre_tokenizer = _split(header, kind)
    backend.decoder = decoders.ByteLevel()
    return backend


def _split(header: GgufHeader, kind: object) -> PreTokenizer:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if kind in _PLAIN_GPT2:
        return ByteLevel(add_prefix_space=False)
    if kind in _DIGITS_APART:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if not isinstance(kind, str) or kind not in GGUF_PRE_TOKENIZER_SPLITS:
        raise _unsupported(header, f"it splits text in a way named {kind!r}, which is not known here")
    pattern = Regex(GGUF_PRE_TOKENIZER_SPLITS[kind])
    return Sequence([Split(pattern, behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    parts: dict[str, Any] = {"tokenizer_type": "llama", "tokens": tokens}
    scores, merges = header.metadata.get("tokenizer.ggml.scores"), header.metadata.get("tokenizer.ggml.merges")
    if merges is not None:
        parts["merges"] = _strings(header, "tokenizer.ggml.merges")
    elif isinstance(scores, np.ndarray) and len(scores) == len(tokens):
        parts["scores"] = scores.tolist()
    else:
        raise damaged(header.path, "it has neither merges nor one score a token")
    backend: Tokenizer = convert_gguf_tokenizer(header.architecture, parts)[0]
    return backend


def _frame(
    header: GgufHeader, backend: Tokenizer, tokens: list[str], special: dict[str, str], *, sentencepiece: bool
) -> None:
    """Enter the control and user-defined tokens, and the bos and eos the file says to put around a text."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    kinds = header.metadata.get("tokenizer.ggml.token_type")
    if isinstance(kinds, np.ndarray):
        rows = list(zip(tokens, kinds.tolist(), strict=False))
        control = [t for t, kind in rows if kind in (_UNKNOWN, _CONTROL)]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
        own = [token for token, kind in rows if kind == _USER_DEFINED]
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    # Without a flag llama.cpp puts bos before SentencePiece text and nothing around byte-level text.
    first = header.metadata.get("tokenizer.ggml.add_bos_token", sentencepiece)
    last = header.metadata.get("tokenizer.ggml.add_eos_token", False)
    around = [special.get("bos_token") if first else None, special.get("eos_token") if last else None]
    ids = [(token, tokens.index(token)) for token in around if token is not None]
    if ids:
        single = [around[0], "$A", around[1]]
        pair = [around[0], "$A", around[1], around[0], "$B:1", around[1]]
        backend.post_processor = TemplateProcessing(
            single=[part for part in single if part is not None],
            pair=[part for part in pair if part is not None],
            special_tokens=ids,
        )
