"""Opening a model file in ONNX Runtime, with its errors turned into ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.native.build import built_library, require_whole
from backends.onnxruntime.lowering import DATA_FILE, MODEL_FILE
from backends.onnxruntime.packages import package
from backends.onnxruntime.twins import DOMAIN, KERNELS
from ir.errors import UnsupportedError, UsageError

_LEVELS = {"basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL", "none": "ORT_DISABLE_ALL"}


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs; raises UsageError for settings out of range.

    threads: of one operator, 0 for as many as there are cores; library: a custom-operator library to register first;
    optimise: the runtime's own graph rewriting: none, basic or all; profile: prefix of a trace file, or None.
    """

    threads: int = 0
    library: Path | None = None
    optimise: str = "all"
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UsageError(
                f"threads cannot be {self.threads}", where="threads", why="it must be 0 (all cores) or more"
            )
        if self.optimise not in _LEVELS:
            raise UsageError(f"optimise cannot be {self.optimise}", fix=f"use one of {', '.join(_LEVELS)}")


def library_for(folder: Path) -> Path | None:
    """Return the library with nomul's operators where the model file of a folder calls any that it has, else None.

    Raises UnsupportedError where the library can be neither found nor built.
    """
    from google.protobuf.message import DecodeError

    try:
        model = package("onnx").load(str(folder / MODEL_FILE), load_external_data=False)
    except (OSError, DecodeError):
        return None  # opening the session says what is wrong with the file
    called = any(node.domain == DOMAIN and node.op_type in KERNELS for node in model.graph.node)
    return built_library() if called else None


def open_session(folder: Path, options: SessionOptions) -> Any:
    """Return the `onnxruntime.InferenceSession` of a folder's model; raises UnsupportedError when it cannot be made."""
    ort = package("onnxruntime")
    path = folder / MODEL_FILE
    if not path.is_file():
        raise UnsupportedError(
            "this artifact was not compiled for onnxruntime",
            where=str(folder),
            why=f"it holds no {MODEL_FILE}",
            fix="compile it with --target onnxruntime, or run it with --target reference",
        )
    settings = _settings(ort, options)
    try:
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    # The runtime's exceptions have no common base of their own.
    except Exception as error:
        raise _unopened(path, error) from error


def _settings(ort: Any, options: SessionOptions) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[options.optimise])
    settings.log_severity_level = 4  # what goes wrong is raised; the log would tell it twice
    if options.profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, options.profile
    if options.library is not None:
        _register(settings, options.library)
    return settings


def _register(settings: Any, library: Path) -> None:
    require_whole(library)
    try:
        settings.register_custom_ops_library(str(library))
    except Exception as error:
        raise UnsupportedError(
            "the library of operators cannot be loaded",
            where=str(library),
            why=first_line(error),
            fix="build it again on this machine, or run with --target reference",
        ) from error


def _unopened(path: Path, error: Exception) -> UnsupportedError:
    data = path.with_name(DATA_FILE)
    where = str(path if data.is_file() else data)
    return UnsupportedError(
        "ONNX Runtime cannot open the model",
        where=where,
        why=first_line(error) if data.is_file() else "the file with the weights is not there",
        fix="compile it again, with the version of onnxruntime that is to run it installed",
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without terminal colours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400]
