"""A trace is kept once it was made: read back instead of traced, and never trusted when it is damaged or stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import frontend.cache
import frontend.hf
from frontend.cache import cached_program, traced_program
from frontend.hf import skeleton
from frontend.weights import bind_weights
from ir.analysis import blocks
from ir.errors import InvariantError
from ir.execute import empty_inputs
from ir.params import MemorySource
from ir.program import Program
from ir.text import dump
from ir.verify import verify
from tests.architectures import ids_for, randomise, tiny, traced


def one_layer() -> Any:
    """A llama of one layer whose checkpoint is bfloat16, as most are."""
    config = tiny("llama", 1)
    config.dtype = torch.bfloat16
    return config


def test_tracing_leaves_the_configuration_alone() -> None:
    config = one_layer()
    before = frontend.hf.fingerprint(config)
    skeleton(config, "eager")
    frontend.hf.cache_shapes(config, "sdpa")
    assert frontend.hf.fingerprint(config) == before and config.dtype == torch.bfloat16


class Rereading(Exception):
    pass


def refuse_to_trace(*_: Any) -> Program:
    raise Rereading


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache folder with one real trace, and the text of the traced program."""
    folder = tmp_path_factory.mktemp("traces")
    said: list[str] = []
    program = traced_program(one_layer(), "first", said.append, folder)
    assert said == ["tracing llama, once for this configuration"]
    return folder, dump(program)


@pytest.fixture
def cache(kept: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder that may be damaged, where tracing again is an exception."""
    for path in kept[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(frontend.hf, "trace", refuse_to_trace)
    return tmp_path


def test_second_call_reads_the_cache(cache: Path, kept: tuple[Path, str]) -> None:
    said: list[str] = []
    program = traced_program(one_layer(), "second", said.append, cache)
    assert not said and program.name == "second"
    program.name = "first"
    assert dump(program) == kept[1]
    model = skeleton(tiny("llama", 1))
    randomise(model)
    assert bind_weights(program, MemorySource(dict(model.named_parameters()))) == []
    verify(program, full=True)
    ids = ids_for(1, 5)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        found = program.module()(*empty_inputs(program, ids).values())[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


def test_weights_of_a_cached_program_are_unbound(cache: Path) -> None:
    program = traced_program(one_layer(), "again", lambda _: None, cache)
    with pytest.raises(InvariantError, match="read before it was bound"):
        program.params.get("model.norm.weight")
    assert program.params.get("model.rotary_emb.inv_freq").shape == (8,)


@pytest.mark.parametrize("suffix", [".ir", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "one bit", "gone", "other"])
def test_a_damaged_cache_is_traced_anew(cache: Path, suffix: str, damage: str) -> None:
    assert cached_program(one_layer(), "x", cache) is not None
    path = next(cache.glob(f"*{suffix}"))
    data = path.read_bytes()
    middle = len(data) * 9 // 10
    changed = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "last byte": data[:-1],
        "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "other": b"\xff" * 100,
    }
    path.unlink()
    if damage != "gone":
        path.write_bytes(changed[damage])
    assert cached_program(one_layer(), "x", cache) is None
    with pytest.raises(Rereading):
        traced_program(one_layer(), "x", lambda _: None, cache)


def test_a_damaged_cache_is_mended(cache: Path, kept: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(cache.glob("*.ir"))
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(frontend.hf, "trace", lambda *_: traced("llama", 1)[0])
    assert traced_program(one_layer(), "first", lambda _: None, cache).name
    assert cached_program(one_layer(), "first", cache) is not None
    assert sorted(p.suffix for p in cache.iterdir()) == [".ir", ".safetensors"]


@pytest.mark.parametrize("change", ["width", "rope", "code", "fewer layers"])
def test_a_changed_configuration_misses(cache: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_layer()
    assert cached_program(config, "x", cache) is not None
    if change == "width":
        config.intermediate_size += 1
    if change == "rope":
        config.rms_norm_eps *= 2
    if change == "fewer layers":
        config.num_hidden_layers = 2
    if change == "code":
        monkeypatch.setattr(frontend.cache, "code_version", lambda _: "another")
    assert cached_program(config, "x", cache) is None


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend.hf, "trace", lambda *_: traced("llama", 1)[0])
    (tmp_path / "file").write_text("")
    said: list[str] = []
    program = traced_program(one_layer(), "x", said.append, tmp_path / "file" / "traces")
    assert len(blocks(program)) == 1
    assert len(said) == 2 and "could not be kept" in said[1]
