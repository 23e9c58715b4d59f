"""How close the sentence embeddings of a compiled encoder are to those of its original."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ir.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from backends.base import Runtime

IDS, MASK = "input_ids", "attention_mask"
_WORDS = range(6, 31)
_BATCH = 20
# Without code, lists and numbers: what a person would call a sentence.
_SENTENCE = re.compile(r"[A-Z][A-Za-z ,'()-]+[.!?]")


@dataclass(frozen=True)
class Similarity:
    """Cosines between embeddings of the same sentences by two models: their mean, the least, and how many."""

    mean: float
    least: float
    sentences: int


def sentences(text: str, count: int) -> list[str]:
    """Return `count` distinct sentences of 6 to 30 words, evenly spread over a text; raises UsageError for fewer."""
    parts = re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", text))
    found = [s for s in dict.fromkeys(parts) if len(s.split()) in _WORDS and _SENTENCE.fullmatch(s)]
    if count < 1 or len(found) < count:
        raise UsageError(
            f"the text holds fewer than {count} sentences" if count > 0 else "--sentences must be at least 1",
            why=f"it has {len(found)} of {_WORDS.start} to {_WORDS.stop - 1} words",
            fix="give a longer text, or another --sentences",
        )
    return found[:: len(found) // count][:count]


def embeddings(runtime: Runtime, texts: Sequence[str], step: Callable[[str], None]) -> Tensor:
    """Return embeddings [texts, width] of unit length: the mean over tokens of an encoder's first result.

    Raises UnsupportedError for a model that gives no vector for every token.
    """
    import torch

    found = []
    for start in range(0, len(texts), _BATCH):
        part = list(texts[start : start + _BATCH])
        given = runtime.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
        names = [node.name for node in runtime.program.inputs]
        hidden = next(iter(runtime.run({name: given[name] for name in names if name in given}).values()))
        if hidden.shape[:2] != given[IDS].shape:
            raise UnsupportedError(
                "the model gives no vector for every token",
                where=runtime.program.name,
                why=f"of tokens {list(given[IDS].shape)} it makes {list(hidden.shape)}",
                fix="compare its results on arrays with nomul.load(DIR).run(...)",
            )
        mask = given[MASK].unsqueeze(-1).to(hidden.dtype)
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        for _ in part:
            step("")
    return torch.cat(found)


def similarity(ours: Tensor, theirs: Tensor) -> Similarity:
    """Return how close embeddings [sentences, width] of unit length are."""
    cosines = (ours.double() * theirs.double()).sum(-1)
    return Similarity(float(cosines.mean()), float(cosines.min()), len(cosines))


def compare(
    paths: Sequence[str], students: Sequence[Runtime], against: str, teacher: Runtime, text: str, count: int
) -> list[dict[str, object]]:
    """Return a row for each encoder: how close its embeddings of sentences of a text are to those of another."""
    from tools import console
    from tools.storage import storage

    chosen = sentences(text, count)
    with console.progress("sentences", len(chosen) * (len(students) + 1)) as step:
        wanted = embeddings(teacher, chosen, step)
        found = [similarity(embeddings(student, chosen, step), wanted) for student in students]
    return [
        {
            "model": path,
            "against": against,
            "sentences": one.sentences,
            "cosine": one.mean,
            "least_cosine": one.least,
            **storage(student.program).as_json(),
        }
        for path, student, one in zip(paths, students, found, strict=True)
    ]


def shown(rows: Sequence[dict[str, object]], source: str) -> str:
    """Return the rows of `compare` as a person reads them."""
    from tools import console

    cells = [
        [r["model"], f"{r['cosine']:.4f}", f"{r['least_cosine']:.4f}", f"{r['bits_per_weight_compressed'] or 32:.3f}"]
        for r in rows
    ]
    head = f"embeddings of {rows[0]['sentences']} sentences of {source}, against {rows[0]['against']}"
    return f"{head}\n{console.table(('model', 'mean cosine', 'least', 'bits of compressed'), cells)}"
