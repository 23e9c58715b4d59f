"""An artifact folder: what is read is what was written, bit for bit; damage is named and nothing is half-read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from ir.artifact import (
    FORMAT,
    MANIFEST_FILE,
    PROGRAM_FILE,
    file_hash,
    read_manifest,
    read_program,
    write_program,
    write_safetensors,
)
from ir.errors import NomulError, UnsupportedError, UsageError
from ir.params import SafetensorsSource
from ir.program import Program
from ir.text import dump
from ir.types import tensor_type
from tests.architectures import ids_for, prefill_and_decode, traced
from tests.programs import compressed_program, odd_program, tiny_mlp_program

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike to the bit, NaNs and signs of zero included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    # A tensor without elements has no bytes to compare, and torch refuses to view it as some.
    return not a.numel() or torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("weights-*.safetensors"))


@pytest.mark.parametrize("build", [tiny_mlp_program, odd_program, compressed_program])
def test_round_trip(build: type[Program], tmp_path: Path) -> None:
    program = build()
    write_program(program, tmp_path)
    again = read_program(tmp_path)
    assert dump(again) == dump(program)
    assert set(again.params) == set(program.params) and again.params.aliases() == program.params.aliases()
    for name in program.params:
        assert same_bits(again.params.get(name), program.params.get(name)), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_an_untouched_model_keeps_every_bit(name: str, tmp_path: Path) -> None:
    program, model = traced(name)
    write_program(program, tmp_path)
    again = read_program(tmp_path)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    for key in again.params:
        given_ = weights.get(key, program.params.get(key))
        given_ = weights[key.removesuffix("_t")].T if key.endswith("_t") else given_
        assert same_bits(again.params.get(key), given_), key
    assert {k.removesuffix("_t") for k in again.params} >= set(weights)
    for a, b in zip(prefill_and_decode(program, ids_for()), prefill_and_decode(again, ids_for()), strict=True):
        assert torch.equal(a, b)


def test_same_program_gives_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        hashes.append(write_program(tiny_mlp_program(), tmp_path / name))
    assert hashes[0] == hashes[1]
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(hashes[0]) == [PROGRAM_FILE, "weights-00001.safetensors"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        assert file_hash(tmp_path / "one" / file) == hashes[0][file]
    assert write_program(tiny_mlp_program(seed=1), tmp_path / "one") != hashes[0]


@pytest.mark.parametrize("limit", [1, 2048, 2560, 4096, 1 << 20])
def test_shards_hold_every_tensor_once(limit: int, tmp_path: Path) -> None:
    program = tiny_mlp_program()
    steps: list[None] = []
    written = write_program(program, tmp_path, limit, lambda: steps.append(None))
    assert len(steps) == len(program.params)
    held: list[str] = []
    for path in shards(tmp_path):
        tensors = load_file(path)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= limit or len(tensors) == 1, "only a tensor larger than the limit stands alone"
        held += tensors
    assert sorted(held) == sorted(program.params) and len(shards(tmp_path)) == len(written) - 1
    assert len(shards(tmp_path)) >= program.params.total_bytes() / max(limit, 2560)
    again = read_program(tmp_path)
    assert all(same_bits(again.params.get(n), program.params.get(n)) for n in program.params)


def test_tied_names_are_stored_once(tmp_path: Path) -> None:
    write_program(tiny_mlp_program(), tmp_path)
    assert "lm_head.weight" not in load_file(shards(tmp_path)[0])
    again = read_program(tmp_path)
    assert again.params.resolve("lm_head.weight") == "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_program(tiny_mlp_program(), tmp_path, 4096)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"format": FORMAT, "seed": 7}))
    return tmp_path


def test_missing_text_is_refused(folder: Path) -> None:
    (folder / PROGRAM_FILE).unlink()
    with pytest.raises(UnsupportedError, match="not a nomul artifact"):
        read_program(folder)


def test_missing_shard_is_refused_and_names_its_weights(folder: Path) -> None:
    lost = load_file(shards(folder)[-1])
    shards(folder)[-1].unlink()
    with pytest.raises(UnsupportedError) as caught:
        read_program(folder)
    assert any(name in str(caught.value) for name in lost) and "absent" in str(caught.value)


def test_every_truncated_shard_is_refused(folder: Path) -> None:
    path = shards(folder)[0]
    data = path.read_bytes()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        with pytest.raises(UnsupportedError):
            read_program(folder)


def test_swapped_weights_are_refused(folder: Path) -> None:
    path = shards(folder)[0]
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.dim() == 2 and t.shape[0] != t.shape[1])
    save_file({**tensors, name: tensors[name].T.contiguous()}, path)
    with pytest.raises(UnsupportedError, match="do not fit the program text"):
        read_program(folder)


def test_every_damaged_text_is_a_plain_error(folder: Path) -> None:
    path = folder / PROGRAM_FILE
    text = path.read_text()
    for size in range(0, len(text) - 1, 61):
        path.write_text(text[:size])
        with pytest.raises(NomulError):
            read_program(folder)
    path.write_text(text.replace("aten.silu", "aten.no_such_op", 1))
    with pytest.raises(UsageError, match="no op"):
        read_program(folder)


def test_text_that_is_not_utf8_is_a_plain_error(folder: Path) -> None:
    (folder / PROGRAM_FILE).write_bytes(b"program \xff\xfe")
    with pytest.raises(UnsupportedError, match="damaged"):
        read_program(folder)


def test_manifest(folder: Path) -> None:
    assert read_manifest(folder) == {"format": FORMAT, "seed": 7}


@pytest.mark.parametrize("text", ["", "{", "\x00", "[]", "3", "{}", '{"format": "1"}', f'{{"format": {FORMAT + 1}}}'])
def test_damaged_manifests_are_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(UnsupportedError) as caught:
        read_manifest(folder)
    assert caught.value.where.endswith(MANIFEST_FILE) and caught.value.fix


def test_missing_manifest_is_refused(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(UnsupportedError):
        read_manifest(folder)


names = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any dtype and shape, empty ones included, of random bits and thus with NaNs."""
    tensors = {}
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
        count = torch.Size(shape).numel() * dtype.itemsize
        high = 2 if dtype is torch.bool else 256
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
        tensors[name] = data.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    return tensors


@given(tensors=tensor_sets())
def test_writer_against_the_library(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    digest = write_safetensors(path, {n: tensor_type(t) for n, t in tensors.items()}, tensors.__getitem__)
    assert digest == file_hash(path)
    theirs, ours = load(path.read_bytes()), SafetensorsSource(path)
    assert set(theirs) == set(ours.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(theirs[name], tensor) and same_bits(ours.load(name), tensor)
        assert ours.type_of(name) == tensor_type(tensor)
        assert ours.stored_bytes(name) == tensor.numel() * tensor.element_size()


@given(tensors=tensor_sets())
def test_reader_against_the_library(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "theirs.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "by": "a test"})
    source = SafetensorsSource(path)
    assert set(source.names()) == set(tensors)
    assert all(same_bits(source.load(n), t) for n, t in tensors.items())


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    turned = torch.arange(12.0).view(3, 4).T
    write_safetensors(tmp_path / "f", {"a": tensor_type(turned)}, lambda _: turned)
    assert torch.equal(SafetensorsSource(tmp_path / "f").load("a"), turned)


def test_a_tensor_that_is_not_of_its_promised_type_is_refused(tmp_path: Path) -> None:
    kinds = {"a": tensor_type(torch.zeros(3))}
    with pytest.raises(NomulError, match="promised"):
        write_safetensors(tmp_path / "f", kinds, lambda _: torch.zeros(4))
