"""Checkpoints: what lies in a folder reaches the program under the right name, or is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from frontend.open import open_model
from frontend.weights import Float32Source, JoinedSource, bind_weights, open_checkpoint
from ir.errors import InvariantError, UnsupportedError
from ir.execute import empty_inputs
from ir.params import MemorySource, SafetensorsSource
from ir.program import Program
from ir.verify import check_finite, verify
from tests.architectures import ids_for, randomise, tiny, traced

TWO = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: Any, body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


Lie = Callable[[dict[str, Any]], None]


def row(name: str, **fields: Any) -> Lie:
    return lambda header: header[name].update(fields)


LIES: dict[str, tuple[Lie, str]] = {
    "past the end": (row("a", data_offsets=[8, 8000]), "offsets span"),
    "outside": (row("b", data_offsets=[100, 108]), "truncated"),
    "backwards": (row("a", data_offsets=[24, 0]), "offsets span"),
    "negative": (row("a", data_offsets=[-24, 0]), "negative"),
    "fractional": (row("a", data_offsets=[0, 24.0]), "non-integer"),
    "three offsets": (row("a", data_offsets=[0, 1, 24]), "lacks"),
    "too large": (row("a", shape=[200, 3]), "needs 2400 bytes"),
    "negative size": (row("a", shape=[-2, -3]), "negative"),
    "text size": (row("a", shape="23"), "non-integer"),
    "no size": (lambda h: h["a"].pop("shape"), "lacks"),
    "other dtype": (row("a", dtype="F64"), "needs 48 bytes"),
    "unknown dtype": (row("a", dtype="F7"), "dtype F7"),
    "not a row": (lambda h: h.update(a=[1, 2]), "lacks"),
    "null row": (lambda h: h.update(a=None), "lacks"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TWO, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(file: Path, lie: str) -> None:
    header, body = header_of(file)
    change, why = LIES[lie]
    change(header)
    write_raw(file, header, body)
    with pytest.raises(UnsupportedError, match=why) as caught:
        SafetensorsSource(file)
    assert caught.value.where == str(file)


@pytest.mark.parametrize("span", [[0, 8], [12, 20], [16, 24]])
def test_overlapping_tensors_are_refused(file: Path, span: list[int]) -> None:
    header, body = header_of(file)
    header["b"]["data_offsets"] = span
    write_raw(file, header, body)
    with pytest.raises(UnsupportedError):
        SafetensorsSource(file)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "fewer than the 8"),
        (b"\x01\x00\x00", "fewer than the 8"),
        ((2**63).to_bytes(8, "little"), "header claims"),
        ((100).to_bytes(8, "little") + b"{}", "header claims"),
        ((0).to_bytes(8, "little"), "not JSON"),
        ((4).to_bytes(8, "little") + b"\xff\xfe{}", "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((4).to_bytes(8, "little") + b"true", "not a JSON object"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match=why):
        SafetensorsSource(path)


@given(cut=st.integers(0, 10**9))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    save_file(TWO, path)
    data = path.read_bytes()
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(UnsupportedError):
        SafetensorsSource(path)


def test_unaligned_tensors_are_read(file: Path) -> None:
    header, body = header_of(file)
    text = json.dumps(header).encode()
    write_raw(file, text + b" " * (7 - len(text) % 8), body)
    source = SafetensorsSource(file)
    assert all(torch.equal(source.load(n), t) for n, t in TWO.items())


def state(seed: int = 0, layers: int = 1, **changes: Any) -> tuple[Any, nn.Module]:
    """A tiny llama's configuration and model with seeded weights."""
    from transformers import AutoModelForCausalLM

    config = tiny("llama", layers)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed)
    return config, model


@pytest.fixture(scope="module", autouse=True)
def _cache_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Traces made here are kept for this module, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A saved tiny llama with one layer."""
    _, model = state()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def logits(program: Program, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return program.module()(*[empty_inputs(program, ids)[n.name] for n in program.inputs])[0]


def assert_same_logits(program: Program, model: nn.Module) -> None:
    ids = ids_for(2, 7)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits(program, ids), wanted, rtol=0, atol=2e-4)


def resave(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite a folder's weights, changed."""
    path = folder / "model.safetensors"
    tensors = {n: t.contiguous() for n, t in change(load_file(path)).items()}
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def test_folder_opens_with_every_weight(folder: tuple[Path, nn.Module]) -> None:
    opened = open_model(str(folder[0]))
    assert (opened.kind, opened.path) == ("hf", folder[0])
    stored = load_file(folder[0] / "model.safetensors")
    assert "lm_head.weight" not in stored
    for name, tensor in stored.items():
        assert torch.equal(opened.program.params.get(name), tensor), name
    verify(opened.program, full=True)
    assert_same_logits(opened.program, folder[1])


def test_a_tied_head_that_is_stored_too_is_one_parameter(folder: tuple[Path, nn.Module]) -> None:
    resave(folder[0], lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    program = open_model(str(folder[0])).program
    assert program.params.aliases() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert_same_logits(program, folder[1])


def test_a_tied_embedding_stored_under_the_heads_name(folder: tuple[Path, nn.Module]) -> None:
    resave(folder[0], lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()})
    assert_same_logits(open_model(str(folder[0])).program, folder[1])


def test_an_untied_head_must_be_there(folder: tuple[Path, nn.Module]) -> None:
    config = json.loads((folder[0] / "config.json").read_text())
    (folder[0] / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight"):
        open_model(str(folder[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_checkpoints_are_widened(folder: tuple[Path, nn.Module], dtype: torch.dtype) -> None:
    resave(folder[0], lambda t: {n: v.to(dtype) for n, v in t.items()})
    program = open_model(str(folder[0])).program
    for name, tensor in load_file(folder[0] / "model.safetensors").items():
        read = program.params.get(name)
        assert read.dtype is torch.float32 and torch.equal(read, tensor.float())
    narrow = state()[1]
    for parameter in narrow.parameters():
        parameter.data = parameter.data.to(dtype).float()
    assert_same_logits(program, narrow)


def test_a_bare_backbone_needs_no_prefix(folder: tuple[Path, nn.Module]) -> None:
    (folder[0] / "model.safetensors").unlink()
    folder[1].model.save_pretrained(folder[0])
    assert "layers.0.mlp.up_proj.weight" in load_file(folder[0] / "model.safetensors")
    assert_same_logits(open_model(str(folder[0])).program, folder[1])


def test_missing_weights_are_named(folder: tuple[Path, nn.Module]) -> None:
    gone = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight")
    resave(folder[0], lambda t: {n: v for n, v in t.items() if n not in gone})
    with pytest.raises(UnsupportedError) as caught:
        open_model(str(folder[0]))
    assert all(name in caught.value.why for name in gone) and caught.value.exit_code == 3


def test_weights_nothing_reads_are_left_alone(folder: tuple[Path, nn.Module]) -> None:
    resave(folder[0], lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    assert_same_logits(open_model(str(folder[0])).program, folder[1])


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_wrong_shapes_are_refused(folder: tuple[Path, nn.Module], name: str) -> None:
    resave(folder[0], lambda t: {**t, name: torch.cat([t[name], t[name]])})
    with pytest.raises(UnsupportedError, match="does not fit the configuration") as caught:
        open_model(str(folder[0]))
    assert caught.value.where == name and "f32[" in caught.value.why


def test_a_transposed_matrix_is_refused(folder: tuple[Path, nn.Module]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    resave(folder[0], lambda t: {**t, name: t[name].T})
    with pytest.raises(UnsupportedError, match=r"f32\[64,128\]"):
        open_model(str(folder[0]))


def test_integer_weights_are_refused(folder: tuple[Path, nn.Module]) -> None:
    resave(folder[0], lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to(torch.int8)})
    with pytest.raises(UnsupportedError, match="i8"):
        open_model(str(folder[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_reported(folder: tuple[Path, nn.Module], value: float) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][3, 5] = value
        return tensors

    resave(folder[0], spoil)
    program = open_model(str(folder[0])).program
    (found,) = check_finite(program)
    assert f"@{name}" in found.rule and "the model's file" in found.rule
    with pytest.raises(InvariantError, match="NaN and"):
        verify(program, full=True)


def shard(folder: Path) -> dict[str, Any]:
    """Split a folder's weights into two shards; return the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_read_as_one(folder: tuple[Path, nn.Module]) -> None:
    shard(folder[0])
    assert_same_logits(open_model(str(folder[0])).program, folder[1])


def test_a_missing_shard_is_named(folder: tuple[Path, nn.Module]) -> None:
    shard(folder[0])
    (folder[0] / "two.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"two\.safetensors"):
        open_model(str(folder[0]))


def test_a_damaged_shard_is_named(folder: tuple[Path, nn.Module]) -> None:
    shard(folder[0])
    (folder[0] / "two.safetensors").write_bytes((folder[0] / "two.safetensors").read_bytes()[:-1])
    with pytest.raises(UnsupportedError, match=r"two\.safetensors"):
        open_model(str(folder[0]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": "/etc/hostname"}}',
        '{"weight_map": {"a": ["one.safetensors"]}}',
    ],
)
def test_a_damaged_index_is_refused(folder: tuple[Path, nn.Module], text: str) -> None:
    shard(folder[0])
    save_file(TWO, folder[0].parent / "b.safetensors")
    (folder[0] / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnsupportedError, match="index is damaged"):
        open_checkpoint(folder[0])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_never_loaded(folder: tuple[Path, nn.Module], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(folder[1].state_dict(), folder[0] / name)
    (folder[0] / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UnsupportedError, match="is a pickle") as caught:
        open_model(str(folder[0]))
    assert name in caught.value.why and caught.value.exit_code == 3


def test_a_folder_without_weights_is_refused(folder: tuple[Path, nn.Module]) -> None:
    (folder[0] / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"no \*\.safetensors file is there"):
        open_model(str(folder[0]))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no such model"}', '{"model_type": 3}'])
def test_a_damaged_configuration_is_refused(folder: tuple[Path, nn.Module], text: str) -> None:
    (folder[0] / "config.json").write_text(text)
    with pytest.raises(UnsupportedError, match="configuration cannot be read"):
        open_model(str(folder[0]))


def test_gpt2_weights_are_turned() -> None:
    program, model = traced("gpt2")
    weights = dict(model.named_parameters())
    assert bind_weights(program, MemorySource(weights), ("transformer.",)) == []
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(program.params.get(f"{name}_t"), weights[name].T)
    bare = {n.removeprefix("transformer."): t for n, t in weights.items()}
    assert bind_weights(program, MemorySource(bare), ("transformer.",)) == []
    ids = ids_for(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(logits(program, ids), model(input_ids=ids).logits, rtol=0, atol=2e-4)


def test_experts_under_their_old_names_are_merged(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny("mixtral", 1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(".experts.3." in name for name in stored), "transformers stores one matrix an expert"
    said: list[str] = []
    opened = open_model(str(tmp_path), said.append)
    assert any("conversion" in line for line in said)
    assert_same_logits(opened.program, model)
    resave(tmp_path, lambda t: {n: v for n, v in t.items() if ".experts.3." not in n})
    with pytest.raises(UnsupportedError):
        open_model(str(tmp_path))


def test_fingerprints_tell_models_apart(folder: tuple[Path, nn.Module]) -> None:
    first = open_model(str(folder[0])).fingerprint
    assert open_model(str(folder[0])).fingerprint == first
    resave(folder[0], lambda t: {**t, "model.norm.weight": t["model.norm.weight"] + 1})
    assert open_model(str(folder[0])).fingerprint != first


def test_joined_and_widened_sources() -> None:
    left, right = MemorySource({"a": torch.ones(2).half()}), MemorySource({"b": torch.ones(3, dtype=torch.int8)})
    both = Float32Source(JoinedSource([left, right], {"b": "c"}))
    assert both.names() == ("a", "c")
    assert (str(both.type_of("a")), str(both.type_of("c"))) == ("f32[2]", "i8[3]")
    assert both.load("a").dtype is torch.float32 and both.load("c").dtype is torch.int8
    assert (both.stored_bytes("a"), both.stored_bytes("c")) == (4, 3)
