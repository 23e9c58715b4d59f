"""Opening a MODEL argument: whatever is on disk becomes a canonical Program with its weights left where they are."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontend.cache import cached_program, traced_program
from frontend.hf import fingerprint
from frontend.hf_encoder import bare_class, is_encoder, named_classes
from frontend.weights import bind_through_transformers, bind_weights, missing_weights, open_checkpoint
from frontend.zoo import resolve
from ir.analysis import blocks
from ir.artifact import MANIFEST_FILE, PROGRAM_FILE, read_program
from ir.errors import UnsupportedError, UsageError
from ir.params import Source
from ir.program import Program

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    return


@dataclass(frozen=True)
class Model:
    """An opened model.

    program: canonical, or as stored for an artifact; path: the file or folder it came from; kind: `hf`, `gguf`, `onnx`
    or `artifact`; config: the transformers configuration, None for the last two; fingerprint: sha256 that identifies
    configuration and weight headers.
    """

    program: Program
    path: Path
    kind: str
    config: Any
    fingerprint: str


def open_model(model: str, progress: Progress = _silent) -> Model:
    """Return the model behind a path, hub id or zoo name.

    Raises UsageError for a name that is nothing, UnsupportedError for a damaged or unsupported model, ResourceError
    when it has to be fetched and cannot be.
    """
    place = resolve(model, progress)
    path = place if isinstance(place, Path) else _from_hub(place, progress)
    if path.is_dir() and (path / PROGRAM_FILE).is_file():
        return Model(read_program(path), path, "artifact", None, _artifact_fingerprint(path))
    if path.is_dir():
        return _open_folder(path, progress)
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path, progress)
    if path.suffix.lower() == ".onnx":
        return _open_onnx(path, progress)
    raise _not_a_model(path)


@dataclass(frozen=True)
class Outline:
    """A program known from configuration and headers: weights unbound, perhaps with fewer layers than the model.

    layers: how many the model has; remark: how the outline was made.
    """

    program: Program
    layers: int
    remark: str


def open_outline(model: str, progress: Progress = _silent) -> Outline:
    """Return what a model will look like to passes without reading weights or tracing more than two layers.

    Raises what `open_model` raises for names, configurations and headers.
    """
    place = resolve(model, progress)
    path = place if isinstance(place, Path) else _from_hub(place, progress)
    if path.is_dir() and (path / PROGRAM_FILE).is_file():
        program = read_program(path)
        return Outline(program, len(blocks(program)), "from the artifact's own text")
    if path.suffix.lower() == ".onnx":
        program = _open_onnx(path, progress).program
        return Outline(program, len(blocks(program)), "from the file's own graph")
    config, source, name = _headers(path)
    program = cached_program(config, name)
    if program is None:
        layers = int(config.num_hidden_layers)
        program = traced_program(short_config(config, min(2, layers)), name, progress)
        remark = f"from a trace of {min(2, layers)} of {layers} layers"
    else:
        layers, remark = len(blocks(program)), "from the traced graph"
    missing = [n for n in bind_weights(program, source, _prefixes(config)) if n in program.params]
    suffix = f"; {len(missing)} weights need a conversion on load" if missing else ""
    return Outline(program, layers, remark + suffix)


def short_config(config: Any, layers: int) -> Any:
    """Return a configuration with fewer layers."""
    short = copy.deepcopy(config)
    kinds = getattr(short, "layer_types", None)
    short.num_hidden_layers = layers
    if kinds:
        short.layer_types = kinds[:layers]
    return short


def _headers(path: Path) -> tuple[Any, Source, str]:
    if path.is_dir():
        return read_config(path), open_checkpoint(path), path.name
    if path.suffix.lower() == ".gguf":
        from frontend.gguf import GgufSource, gguf_config

        return gguf_config(path), GgufSource(path), path.stem
    raise _not_a_model(path)


def read_config(folder: Path) -> Any:
    """Return the transformers configuration of a model directory; raises UnsupportedError for none it knows."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedError(
            "this directory is not a model", where=str(folder), why="it holds neither config.json nor program.ir"
        )
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        # A field of the wrong type is named on the first line, and what is wrong with it said on the next.
        shown = 2 if isinstance(error, StrictDataclassError) else 1
        why = " ".join(line.strip() for line in str(error).splitlines()[:shown])
        raise UnsupportedError(
            "the model's configuration cannot be read",
            where=str(path),
            why=why,
            fix="nomul runs no code that comes with a model; use an architecture that transformers knows",
        ) from None


def _not_a_model(path: Path) -> UnsupportedError:
    return UnsupportedError(
        "this kind of file is not a model nomul can open",
        where=str(path),
        why=f"its name ends in {path.suffix or 'nothing'}",
        fix="give a Hugging Face directory, a .gguf or .onnx file, or a nomul artifact",
    )


def _from_hub(repo: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    progress(f"fetching {repo} from the hub")
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    # The hub client raises its own, requests' and OS errors for what is one thing to a user: it did not arrive.
    except Exception as error:
        raise UsageError(
            f"the model {repo} could not be fetched",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="check the name and the network, or give a local path",
        ) from error


def _open_folder(folder: Path, progress: Progress) -> Model:
    config = read_config(folder)
    source = open_checkpoint(folder)
    program = traced_program(config, folder.name, progress)
    if is_encoder(config) and bare_class(config).__name__ not in named_classes(config):
        progress(f"only the encoder is taken; the head of {', '.join(named_classes(config))} is left out")
    if bind_weights(program, source, _prefixes(config)):
        progress("the checkpoint's names need transformers' conversion; loading it whole")
        bind_through_transformers(program, folder, config)
    return Model(program, folder, "hf", config, _fingerprint(config, source))


def _open_gguf(path: Path, progress: Progress) -> Model:
    from frontend.gguf import GgufSource, gguf_config

    config, source = gguf_config(path), GgufSource(path)
    program = traced_program(config, path.stem, progress)
    missing = bind_weights(program, source)
    if missing:
        raise missing_weights(path, missing)
    return Model(program, path, "gguf", config, _fingerprint(config, source))


def _open_onnx(path: Path, progress: Progress) -> Model:
    from frontend.onnx.opened import open_program

    program, digest = open_program(path, progress)
    return Model(program, path, "onnx", None, digest)


def _prefixes(config: Any) -> tuple[str, ...]:
    """Return the module prefix that tells a model with a head from its bare backbone in this architecture."""
    from transformers import AutoModelForCausalLM

    kinds = AutoModelForCausalLM._model_mapping
    if is_encoder(config):
        prefix = bare_class(config).base_model_prefix
    else:
        prefix = getattr(kinds[type(config)], "base_model_prefix", "") if type(config) in kinds else ""
    return (f"{prefix}.",) if prefix else ()


def _fingerprint(config: Any, source: Source) -> str:
    """Hash what identifies a model without reading its weights: configuration, names, types and a few bytes of each."""
    digest = hashlib.sha256(fingerprint(config).encode())
    for name in sorted(source.names()):
        digest.update(f"{name} {source.type_of(name)} {source.stored_bytes(name)}".encode())
    smallest = sorted(source.names(), key=lambda n: (source.stored_bytes(n), n))[:8]
    for name in smallest:
        digest.update(source.load(name).float().numpy().tobytes())
    return digest.hexdigest()


def _artifact_fingerprint(folder: Path) -> str:
    manifest = folder / MANIFEST_FILE
    text = manifest.read_text(encoding="utf-8") if manifest.is_file() else (folder / PROGRAM_FILE).read_text()
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()
