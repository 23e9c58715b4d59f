"""Finished blocks on disk, so that an interrupted pass goes on where it stopped and ends with the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ir.artifact import write_safetensors
from ir.params import SafetensorsSource
from ir.types import tensor_type
from passes.base import Event, Log


def save_block(work: Path | None, index: int, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    """Keep a block's results: tensors by name, and small JSON-able facts; the facts' file marks the block as done."""
    if work is None:
        return
    work.mkdir(parents=True, exist_ok=True)
    stem = work / f"block-{index:04d}"
    types = {name: tensor_type(t) for name, t in tensors.items()}
    write_safetensors(stem.with_suffix(".part"), types, tensors.__getitem__)
    os.replace(stem.with_suffix(".part"), stem.with_suffix(".safetensors"))
    stem.with_suffix(".tmp").write_text(json.dumps(facts), encoding="utf-8")
    os.replace(stem.with_suffix(".tmp"), stem.with_suffix(".json"))


def has_block(work: Path | None, index: int) -> bool:
    """Return whether a block was finished in an earlier run."""
    return work is not None and (work / f"block-{index:04d}.json").is_file()


def last_block(work: Path) -> int:
    """Return the number of the last finished block, -1 where there is none."""
    return max((int(path.stem.removeprefix("block-")) for path in work.glob("block-*.json")), default=-1)


def drop_block(work: Path, index: int) -> None:
    """Let go of a block's results, if there are any."""
    for ending in (".json", ".safetensors"):
        (work / f"block-{index:04d}{ending}").unlink(missing_ok=True)


def load_block(work: Path | None, index: int) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """Return a finished block's tensors and facts, or None when it was not finished."""
    if work is None or not has_block(work, index):
        return None
    stem = work / f"block-{index:04d}"
    source = SafetensorsSource(stem.with_suffix(".safetensors"))
    facts: dict[str, object] = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    return {name: source.load(name) for name in source.names()}, facts


def as_json(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return what a log recorded in a form that JSON holds."""
    return [{"kind": type(event).__name__, **asdict(event)} for event in events]


def replay(log: Log, events: Any) -> None:
    """Record again what `as_json` kept."""
    for event in events:
        if event["kind"] == "SiteReport":
            log.report(site=event["site"], **event["figures"])
        elif event["kind"] == "Diagnostic":
            log.skip(event["site"], event["reason"], event["asked"])
        else:
            log.note(event["text"])
