"""Tiny models as the builder of ONNX Runtime GenAI writes them, and what ONNX Runtime computes with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from frontend.onnx.interface import cache_place
from tests.architectures import randomise, tiny
from tests.hf_folder import write_tokenizer


def built(name: str, folder: Path, precision: str = "fp32") -> Path:
    """Write a tiny model as a Hugging Face directory and run the builder on it; return its ONNX file."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = tiny(name)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, 1)
    model.save_pretrained(str(folder / "hf"))
    write_tokenizer(folder / "hf")
    return build(folder / "hf", folder / "onnx", precision)


def build(source: Path, out: Path, precision: str = "fp32") -> Path:
    """Run the builder on a Hugging Face directory; return the ONNX file that it wrote."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    done = subprocess.run(
        [*command, "-p", precision, "-e", "cpu", "-c", str(out), "--extra_options", "accuracy_level=1"],
        capture_output=True,
        check=False,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return out / "model.onnx"


def runtime_order(session: onnxruntime.InferenceSession) -> tuple[list[str], list[str]]:
    """Return the names of inputs and outputs in the order of programs: caches layer by layer, keys first."""

    def key(name: str) -> tuple[int, bool]:
        layer, kind = cache_place(name) or (-1, "")
        return layer, kind == "value"

    inputs, outputs = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    return sorted(inputs, key=key), sorted(outputs, key=key)


def computed(session: onnxruntime.InferenceSession, given: Sequence[Tensor]) -> list[Tensor]:
    """Return what ONNX Runtime gives for the inputs of a program, in its order."""
    inputs, outputs = runtime_order(session)
    feeds = dict(zip(inputs, (t.numpy() for t in given), strict=True))
    return [torch.from_numpy(t) for t in session.run(outputs, feeds)]
