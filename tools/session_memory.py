"""The memory that a model takes in ONNX Runtime alone, in a process of its own: without torch and without nomul.

Run as `python -m tools.session_memory MODEL LIBRARY THREADS PROMPT NEW`; prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.peak import peak_bytes

_SECONDS = 900


def measured(model: Path, library: Path | None, threads: int, prompt: int, new: int) -> dict[str, Any]:
    """Return `peak_bytes` and `before_bytes` (with the packages loaded) of a fresh process that decodes `new` tokens.

    Raises subprocess.CalledProcessError when that process fails.
    """
    command = [sys.executable, "-m", "tools.session_memory", str(model), str(library or ""), str(threads)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [*command, str(prompt), str(new)], check=True, capture_output=True, text=True, cwd=root, timeout=_SECONDS
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(argv: Sequence[str]) -> int:
    """Run a prompt and some steps, and print what memory that took."""
    import numpy as np
    import onnxruntime

    model, library, threads, prompt, new = argv[0], argv[1], int(argv[2]), int(argv[3]), int(argv[4])
    before = peak_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    past: dict[str, Any] = {}
    for length in (prompt, *[1] * new):
        ids = np.ones((1, length), np.int64)
        found = session.run(None, {i.name: _feed(i, ids, past) for i in session.get_inputs()})
        past = dict(zip(names, found, strict=True))
    print(json.dumps({"before_bytes": before, "peak_bytes": peak_bytes()}))
    return 0


def _feed(put: Any, ids: Any, past: dict[str, Any]) -> Any:
    """Return what an input gets: token ids, a mask of ones over all tokens, or the cache of the step before."""
    import numpy as np

    if put.name == "input_ids":
        return ids
    cached = past.get(put.name.replace("past_key_values", "present"))
    if put.name.startswith("past"):
        dims = [{"batch": 1, "past": 0}.get(d, d) for d in put.shape]
        return np.zeros(dims, np.float32) if cached is None else cached
    length = next((p.shape[2] for name, p in past.items() if name.startswith("present")), 0)
    return np.ones((1, length + ids.shape[1]), np.int64)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
