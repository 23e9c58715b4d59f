"""GGUF files read back: values, names, rotary order, configurations, and files that are damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from frontend.gguf import GgufSource, gguf_config
from frontend.gguf_header import read_header
from ir.errors import UnsupportedError, UsageError
from ir.params import ParamStore
from ir.types import TensorType
from tests.gguf_files import file_tensors, tiny_model, write_model

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2"]


def rebuilt(path: Path) -> PreTrainedModel:
    source = GgufSource(path)
    model = AutoModelForCausalLM.from_config(gguf_config(path)).eval()
    state = {name: source.load(name) for name in source.names()}
    state |= {alias: state[name] for alias, name in source.ties().items()}
    model.load_state_dict(state, strict=True)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12) % 96).logits


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_model(tmp_path_factory.mktemp("gguf") / "llama.gguf", tiny_model("llama"), "llama")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_float_file_gives_the_model_it_was_made_from(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    again = rebuilt(write_model(tmp_path / "m.gguf", model, arch))
    assert torch.equal(logits(again), logits(model))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_rotary_order_matters_to_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr("tests.gguf_files.interleave", lambda rows, heads: rows)
    again = rebuilt(write_model(tmp_path / "m.gguf", model, "llama"))
    assert not torch.allclose(logits(again), logits(model), atol=1e-2)


def test_quantised_values_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    model = tiny_model("llama")
    kinds = {"attn_q.weight": Kind.Q4_1, "attn_k.weight": Kind.Q4_1, "ffn_up.weight": Kind.Q8_0}
    kinds |= {"ffn_gate.weight": Kind.F16, "ffn_down.weight": Kind.BF16, "token_embd.weight": Kind.Q4_0}
    source = GgufSource(write_model(tmp_path / "m.gguf", model, "llama", kinds))
    arrays = file_tensors(model, "llama")
    for stem, name, heads in (
        ("blk.1.attn_q", "model.layers.1.self_attn.q_proj", 4),
        ("blk.1.attn_k", "model.layers.1.self_attn.k_proj", 2),
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj", 0),
        ("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj", 0),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", 0),
        ("token_embd", "model.embed_tokens", 0),
        ("output_norm", "model.norm", 0),
    ):
        kind = next((kind for end, kind in kinds.items() if f"{stem}.weight".endswith(end)), Kind.F32)
        raw = gguf.quants.quantize(arrays[f"{stem}.weight"], kind)
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind)))
        if heads:
            # Row 2j of a head holds the first of rotary pair j and row 2j+1 the second; halves keep them apart.
            width = expected.shape[0] // heads
            order = [h * width + i for h in range(heads) for i in (*range(0, width, 2), *range(1, width, 2))]
            expected = expected[order]
        loaded = source.load(f"{name}.weight")
        assert torch.equal(loaded, expected), name
        assert source.type_of(f"{name}.weight") == TensorType(torch.float32, tuple(expected.shape))
        assert source.stored_bytes(f"{name}.weight") == raw.nbytes


def test_long_tensors_are_dequantised_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.gguf", tiny_model("llama"), "llama", {"weight": Kind.Q8_0})
    whole = GgufSource(path).load("model.embed_tokens.weight")
    monkeypatch.setattr("frontend.gguf._CHUNK", 64 * 7)
    assert torch.equal(GgufSource(path).load("model.embed_tokens.weight"), whole)


def test_an_absent_head_is_tied_and_a_present_one_is_not(tmp_path: Path) -> None:
    tied = GgufSource(write_model(tmp_path / "t.gguf", tiny_model("llama", tie_word_embeddings=True), "llama"))
    assert tied.ties() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tied.names()
    free = GgufSource(write_model(tmp_path / "f.gguf", tiny_model("llama"), "llama"))
    assert not free.ties()
    assert "lm_head.weight" in free.names()


def test_the_store_takes_a_gguf_source(llama_file: Path) -> None:
    store = ParamStore()
    store.add_source(GgufSource(llama_file))
    assert store.get("model.norm.weight").shape == (64,)
    assert store.total_bytes() == 4 * sum(value.numel() for value in tiny_model("llama").parameters())


def test_metadata_floats_are_the_decimals_that_were_written(llama_file: Path) -> None:
    config = gguf_config(llama_file)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 10000.0)
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (96, 2, 16)
    assert config.architectures == ["LlamaForCausalLM"]


def test_llama3_and_linear_rotary_scaling_are_recovered(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16384)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))[0]
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    path = tmp_path / "m.gguf"
    writer_tensors = {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.gguf_files.file_tensors", lambda m, a: {**file_tensors(m, a), **writer_tensors})
        write_model(path, model, "llama")
    assert gguf_config(path).rope_parameters == rope
    torch.testing.assert_close(logits(rebuilt(path)), logits(model))
    more = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    linear = gguf_config(write_model(tmp_path / "l.gguf", tiny_model("llama"), "llama", **more))
    assert linear.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}, "rope.scaling.type"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"llama__attention__sliding_window": 64}, "sliding_window"),
        ({"llama__attention__value_length": 8}, "value_length"),
        ({"split__count": 2}, "one of 2"),
    ],
)
def test_settings_the_model_would_not_honour_are_refused(tmp_path: Path, more: dict, reason: str) -> None:
    path = write_model(tmp_path / "m.gguf", tiny_model("llama"), "llama", **more)
    with pytest.raises(UnsupportedError, match=reason):
        gguf_config(path)


@pytest.mark.parametrize("key", ["context_length", "layer_norm_rms_epsilon", "head_count"])
def test_absent_settings_are_not_guessed(llama_file: Path, tmp_path: Path, key: str) -> None:
    # The renamed key falls outside the architecture's own, so nothing else objects to it.
    blob = llama_file.read_bytes()
    at = blob.rindex(b"llama.", 0, blob.index(key.encode()))
    (tmp_path / "m.gguf").write_bytes(blob[:at] + b"other" + blob[at + 5 :])
    with pytest.raises(UnsupportedError, match=f"under llama.*{key}"):
        gguf_config(tmp_path / "m.gguf")


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="mamba"):
        GgufSource(tmp_path / "m.gguf")


@pytest.mark.parametrize("change", ["drop", "extra", "shape"])
def test_tensors_that_do_not_fit_the_configuration_are_refused(tmp_path: Path, change: str) -> None:
    def changed(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
        arrays = file_tensors(model, arch)
        if change == "drop":
            del arrays["blk.1.ffn_up.weight"]
        elif change == "extra":
            arrays["blk.0.attn_q.bias"] = np.zeros(64, np.float32)
        else:
            arrays["blk.0.ffn_up.weight"] = arrays["blk.0.ffn_up.weight"].T.copy()
        return arrays

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.gguf_files.file_tensors", changed)
        path = write_model(tmp_path / "m.gguf", tiny_model("llama"), "llama")
    with pytest.raises(UnsupportedError, match="does not fit"):
        GgufSource(path)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot open"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="cannot open"):
        read_header(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(UnsupportedError, match="0 bytes"):
        read_header(tmp_path / "empty.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(UnsupportedError, match="not a GGUF file"):
        read_header(tmp_path / "zip.gguf")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 62), "claims"),
        (16, struct.pack("<Q", 1 << 40), "claims"),
        (24, struct.pack("<Q", 1 << 63), "truncated"),
    ],
)
def test_lying_counts_are_refused_at_once(llama_file: Path, tmp_path: Path, at: int, value: bytes, reason: str) -> None:
    blob = bytearray(llama_file.read_bytes())
    blob[at : at + len(value)] = value
    (tmp_path / "bad.gguf").write_bytes(blob)
    with pytest.raises(UnsupportedError, match=reason):
        read_header(tmp_path / "bad.gguf")


def with_row(llama_file: Path, out: Path, name: str, field: int, value: int, width: int) -> Path:
    """Write a copy of the file whose tensor row `name` (a matrix) has one field, counted in bytes after it, changed."""
    blob = bytearray(llama_file.read_bytes())
    at = blob.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + field
    blob[at : at + width] = value.to_bytes(width, "little")
    out.write_bytes(blob)
    return out


@pytest.mark.parametrize(
    ("field", "value", "width", "reason"),
    [
        (0, 9, 4, "9 dims"),
        (4, 0, 8, "empty"),
        (4, 1 << 60, 8, "truncated"),
        (20, 4242, 4, "4242"),
        (20, int(Kind.I32), 4, "I32"),
        (24, 1 << 50, 8, "truncated"),
        (24, 4, 8, "multiple of 32"),
        (24, 0, 8, "overlap"),
    ],
)
def test_lying_tensor_rows_are_refused(
    llama_file: Path, tmp_path: Path, field: int, value: int, width: int, reason: str
) -> None:
    path = with_row(llama_file, tmp_path / "bad.gguf", "blk.1.ffn_up.weight", field, value, width)
    with pytest.raises(UnsupportedError, match=reason):
        read_header(path)


def test_every_truncation_is_found(llama_file: Path, tmp_path: Path) -> None:
    blob = llama_file.read_bytes()
    for size in [*range(0, 1200, 37), *range(1200, len(blob) - 32, 4999)]:
        (tmp_path / "cut.gguf").write_bytes(blob[:size])
        with pytest.raises(UnsupportedError):
            read_header(tmp_path / "cut.gguf")


@given(at=st.integers(4, 3000), value=st.integers(0, 255))
def test_no_changed_byte_of_the_header_ends_in_a_traceback(
    llama_file: Path, tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    blob = bytearray(llama_file.read_bytes())
    blob[at] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(blob)
    try:
        GgufSource(path)
    except UnsupportedError as error:
        assert error.what
        assert error.why


@pytest.mark.real
def test_smollm2_has_every_name_and_shape_of_its_model() -> None:
    from transformers import LlamaForCausalLM

    from frontend.tokenizer import load_tokenizer
    from frontend.zoo import fetch

    path = fetch("smollm2-135m")
    source = GgufSource(path)
    with torch.device("meta"):
        state = LlamaForCausalLM(gguf_config(path)).state_dict()
    assert len(source.names()) == 272
    assert set(source.names()) | set(source.ties()) == set(state)
    assert {name: source.type_of(name).dims for name in source.names()} == {
        name: tuple(state[name].shape) for name in source.names()
    }
    # The 16-level grids of 32 that Q4_1 leaves, with q's rows back in half-split order.
    groups = source.load("model.layers.3.self_attn.q_proj.weight").view(-1, 32)
    assert max(len(group.unique()) for group in groups) <= 16
    tokenizer = load_tokenizer(path)
    text = "In 1984, naïve  Ölfässer\tcost £3.50 — 漢字 🙂\n\n  don't"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 dogs").input_ids) == ["1", "2", "Ġdogs"]
