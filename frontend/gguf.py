"""GGUF files: their tensors under Hugging Face names, dequantised on read, and their configuration."""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from frontend.gguf_header import GgufHeader, GgufTensor, count_field, damaged, open_map, read_header
from frontend.gguf_tokenizer import gguf_tokenizer, write_tokenizer
from ir.errors import UnsupportedError
from ir.types import TensorType

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["GgufSource", "gguf_config", "gguf_tokenizer", "write_tokenizer"]

# Only architectures whose logits the tests compare with transformers are read: a configuration that is nearly
# right gives a model that runs and is wrong.
_MODELS = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Keys read by name below, or that say nothing a configuration holds.
_READ_ELSEWHERE = {
    "vocab_size",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "feed_forward_length",
    "tensor_data_layout",
}
# Settings of transformers' map that are worked out below instead.
_REPLACED = ("rope_theta", "head_dim", "feed_forward_length")
# GPT-2's Conv1D keeps these transposed with respect to the file.
_CONV1D = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_CHUNK = 1 << 20


class GgufSource:
    """The tensors of a GGUF file as float32 under the Hugging Face names of its architecture.

    Names, types and sizes come from the header; `load` dequantises one tensor and undoes the converter's layout
    changes (the interleaved rotary order of llama's q and k, the transposes of GPT-2). Raises UnsupportedError for a
    damaged file, an architecture that is not supported, and tensors that do not fit the configuration exactly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        config = _config(header)
        model = _meta_model(header, config)
        self._rows, self._ties = _bind(header, model)
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._architecture = header.architecture
        self._heads = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
        self._map = open_map(path)

    def names(self) -> tuple[str, ...]:
        return tuple(self._rows)

    def ties(self) -> dict[str, str]:
        """Return tied name -> stored name, such as `lm_head.weight` -> `model.embed_tokens.weight`."""
        return dict(self._ties)

    def type_of(self, name: str) -> TensorType:
        return TensorType(torch.float32, self._shapes[name])

    def stored_bytes(self, name: str) -> int:
        return self._rows[name].nbytes

    def load(self, name: str) -> torch.Tensor:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        row = self._rows[name]
        values = _dequantise(self._map, row)
        # transformers' GPT-2 processor stores the head elsewhere instead of returning it.
        if row.name != "output.weight":
            processor = TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=self._heads)
            values = processor.process(weights=values, name=row.name).weights
        with warnings.catch_warnings():
            # A float32 tensor is handed out as a read-only view of the file; callers never write into it.
            warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
            return torch.from_numpy(np.ascontiguousarray(values)).view(self._shapes[name])


def gguf_config(path: Path) -> PreTrainedConfig:
    """Return the transformers configuration a GGUF file describes, from its header alone.

    Raises UnsupportedError for a damaged file, an architecture other than llama, qwen2, qwen3 and gpt2, and
    settings of these that transformers' model would not honour; UsageError when the file cannot be opened.
    """
    return _config(read_header(path))


def _dequantise(view: mmap.mmap, row: GgufTensor) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(row.kind)
    lines = math.prod(row.dims[:-1])
    raw = np.frombuffer(view, np.uint8, row.nbytes, row.start).reshape(lines, row.nbytes // lines)
    if kind == GGMLQuantizationType.F32:
        return raw.view(np.float32).reshape(row.dims)
    # In slices, because the package's dequantiser holds its whole result twice.
    out = np.empty((lines, row.dims[-1]), np.float32)
    step = max(1, _CHUNK // row.dims[-1])
    for start in range(0, lines, step):
        out[start : start + step] = dequantize(raw[start : start + step], kind)
    return out.reshape(row.dims)


def _config(header: GgufHeader) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    arch = header.architecture
    if arch not in _MODELS:
        raise UnsupportedError(
            f"GGUF architecture {arch!r} is not supported",
            where=str(header.path),
            why=f"only {', '.join(_MODELS)} are read",
            fix="give the Hugging Face directory of the model instead",
        )
    fields = _mapped_fields(header) | _shape_fields(header)
    fields |= _gpt2_fields(header) if arch == "gpt2" else _rope_fields(header, fields)
    try:
        return AutoConfig.for_model(arch, **fields)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError) as error:
        raise damaged(header.path, f"its metadata makes no {arch} configuration: {error}") from error


def _mapped_fields(header: GgufHeader) -> dict[str, Any]:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    arch = header.architecture
    mapping = GGUF_CONFIG_MAPPING[arch]
    fields: dict[str, Any] = {}
    for key, value in header.metadata.items():
        setting = key.removeprefix(f"{arch}.")
        if setting == key:
            continue
        if isinstance(value, np.ndarray | list):
            raise _refused(header, key, "it differs from block to block")
        if mapping.get(setting) is not None:
            fields[mapping[setting]] = value
        elif setting not in _READ_ELSEWHERE and value:
            raise _refused(header, key, f"it is {str(value)[:40]} and no setting of transformers' {arch} stands for it")
    # Absent settings would take transformers' defaults, which are those of some other model.
    for setting in ("context_length", "embedding_length", "attention.head_count"):
        count_field(header, f"{arch}.{setting}")
    epsilon = f"{arch}.attention.layer_norm_{'' if arch == 'gpt2' else 'rms_'}epsilon"
    if not isinstance(header.metadata.get(epsilon), float):
        raise damaged(header.path, f"its metadata has no number under {epsilon}")
    return {key: value for key, value in fields.items() if key not in _REPLACED}


def _refused(header: GgufHeader, key: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the GGUF setting {key!r} is not supported",
        where=str(header.path),
        why=f"{why}; ignoring it could give a model that runs and is wrong",
        fix="give the Hugging Face directory of the model instead",
    )


def _shape_fields(header: GgufHeader) -> dict[str, Any]:
    arch = header.architecture
    embedding = header.tensor("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2:
        raise damaged(header.path, "it has no matrix token_embd.weight")
    blocks = {int(row.name.split(".")[1]) for row in header.tensors if _in_block(row.name)}
    # Checked before the skeleton is built, which costs time and memory for every block it is told of.
    if count_field(header, f"{arch}.block_count") != len(blocks) or max(blocks) != len(blocks) - 1:
        raise damaged(header.path, f"it claims {header.metadata[f'{arch}.block_count']} blocks and holds {len(blocks)}")
    fields: dict[str, Any] = {
        "architectures": [_MODELS[arch]],
        "vocab_size": embedding.dims[0],
        "tie_word_embeddings": header.tensor("output.weight") is None,
        "dtype": "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        fields[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return fields


def _in_block(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 2 and parts[0] == "blk" and parts[1].isdecimal() and len(parts[1]) < 6


def _gpt2_fields(header: GgufHeader) -> dict[str, Any]:
    # transformers' map sets n_ctx alone, which its GPT-2 does not read.
    return {
        "n_positions": count_field(header, "gpt2.context_length"),
        "n_inner": count_field(header, "gpt2.feed_forward_length", 4 * count_field(header, "gpt2.embedding_length")),
    }


def _rope_fields(header: GgufHeader, fields: dict[str, Any]) -> dict[str, Any]:
    arch = header.architecture
    heads = count_field(header, f"{arch}.attention.head_count")
    head_dim = count_field(
        header, f"{arch}.attention.key_length", max(1, count_field(header, f"{arch}.embedding_length") // heads)
    )
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if count_field(header, key, head_dim) != head_dim:
            raise _refused(header, key, f"it is {header.metadata[key]} where a head has {head_dim} numbers")
    names = {row.name for row in header.tensors}
    more: dict[str, Any] = {"attention_bias": True} if "blk.0.attn_output.bias" in names else {}
    return more | {
        "head_dim": head_dim,
        "intermediate_size": count_field(header, f"{arch}.feed_forward_length"),
        "num_key_value_heads": count_field(header, f"{arch}.attention.head_count_kv", heads),
        "rope_parameters": _rope_parameters(header, head_dim),
    }


def _rope_parameters(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    arch = header.architecture
    theta = header.metadata.get(f"{arch}.rope.freq_base", 10000.0)
    if not isinstance(theta, float) or not 1.0 < theta < math.inf:
        raise damaged(header.path, f"{arch}.rope.freq_base is {str(theta)[:40]}")
    factors = header.tensor(_ROPE_FACTORS)
    if factors is not None:
        return _llama3_rope(header, factors, head_dim, theta)
    kind = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = header.metadata.get(f"{arch}.rope.scaling.factor")
    if kind != "linear" or not isinstance(factor, float) or not 0.0 < factor < math.inf:
        raise _refused(header, f"{arch}.rope.scaling.type", f"it is {str(kind)[:40]} with factor {str(factor)[:40]}")
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _llama3_rope(header: GgufHeader, row: GgufTensor, head_dim: int, theta: float) -> dict[str, Any]:
    """Return the `llama3` rotary parameters whose frequency divisors are those stored in the file.

    The file keeps the divisors and not the four numbers they came from, so Meta's numbers (low 1, high 4, original
    context 8192) are tried with the largest divisor as factor. Raises UnsupportedError when they give other divisors.
    """
    with open_map(header.path) as view:
        stored = np.array(_dequantise(view, row), np.float64).ravel()
    low, high, context = 1.0, 4.0, 8192
    factor = round(float(stored.max()), 4)
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth) if factor > 0 else np.zeros_like(smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise _refused(header, _ROPE_FACTORS, "its frequency divisors are not those of Llama 3.1")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _meta_model(header: GgufHeader, config: PreTrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise damaged(header.path, f"its configuration makes no {header.architecture} model: {error}") from error


def _bind(header: GgufHeader, model: PreTrainedModel) -> tuple[dict[str, GgufTensor], dict[str, str]]:
    """Return Hugging Face name -> row in file order, and tied name -> stored name; every tensor is accounted for."""
    wanted = _file_names(header, model.state_dict())
    rows: dict[str, GgufTensor] = {}
    for row in header.tensors:
        name = wanted.get(row.name)
        if name is not None:
            rows[name] = row
        elif row.name != _ROPE_FACTORS:
            raise _misfit(header, row.name, f"transformers' {header.architecture} model has no place for it")
    shared: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        first = shared.setdefault(id(value), name)
        if name not in rows and first in rows:
            ties[name] = first
        elif name not in rows:
            raise _misfit(header, name, "the model needs it and the file lacks it")
        else:
            _check_shape(header, rows[name], tuple(value.shape))
    return rows, ties


def _file_names(header: GgufHeader, names: Mapping[str, Any]) -> dict[str, str]:
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    arch = next(arch for arch, text in MODEL_ARCH_NAMES.items() if text == header.architecture)
    to_file = get_tensor_name_map(arch, count_field(header, f"{header.architecture}.block_count"))
    found: dict[str, str] = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        file_stem = to_file.get_name(stem)
        if file_stem is not None:
            found[f"{file_stem}.{suffix}"] = name
    return found


def _check_shape(header: GgufHeader, row: GgufTensor, shape: tuple[int, ...]) -> None:
    turned = header.architecture == "gpt2" and row.name.endswith(_CONV1D)
    expected = shape[::-1] if turned else shape
    if row.dims != expected:
        raise _misfit(header, row.name, f"it is {list(row.dims)} where the configuration asks for {list(expected)}")


def _misfit(header: GgufHeader, name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        "a tensor of the GGUF file does not fit the model its metadata describes",
        where=f"{header.path}: {name}",
        why=why,
        fix="give the Hugging Face directory of the model instead, or convert it again with a current llama.cpp",
    )
