"""The bench command: what it reports and what it refuses; how fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import main
from tools.entry import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    """The figures of one quick run on a tiny layer, by the command line; stdout must be one JSON object."""
    command = [sys.executable, "-m", "tools.bench", "solver", "--shapes", "24x64", "--bits", "2", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "solve 24x64" in done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_a_layer_is_held_against_its_float_work(found: dict[str, object]) -> None:
    (layer,) = found["layers"]  # type: ignore[misc]
    assert (layer["shape"], layer["rows"], layer["columns"]) == ("24x64", 24, 64)
    assert layer["layer_bytes"] == 4 * (24 * 64 + 64 * 64) and layer["peak_bytes_beyond_layer"] >= 0
    assert layer["seconds_per_million_weights"] == pytest.approx(layer["seconds"] / (24 * 64 / 1e6))
    assert layer["ratio_to_matmul"] == pytest.approx(layer["seconds"] / layer["matmul_seconds"])
    assert layer["ratio_to_gram"] == pytest.approx(layer["seconds"] / layer["gram_seconds"])


def test_the_scaling_of_float_work_is_said(found: dict[str, object]) -> None:
    assert found["tokens"] == 65536 and found["tokens_measured"] == 1024
    assert found["threads"] and found["cores"] and found["bits"] == 2 and "load_before" in found


def test_growth_varies_one_thing_at_a_time(found: dict[str, object]) -> None:
    rows = found["growth"]
    assert isinstance(rows, list)
    base = {"shape": "24x64", "bits": 2, "rounds": 10}
    shown = [(r["varied"], r["value"], {k: r[k] for k in base if r[k] != base[k]}) for r in rows]
    assert shown == [
        ("rows", 24, {}),
        ("rows", 48, {"shape": "48x64"}),
        ("columns", 64, {}),
        ("columns", 128, {"shape": "24x128"}),
        ("bits", 2, {}),
        ("bits", 3, {"bits": 3}),
        ("rounds", 10, {}),
        ("rounds", 20, {"rounds": 20}),
    ]
    assert [r["ratio_to_first"] for r in rows[::2]] == [1.0] * 4


def test_the_figures_are_readable_too(found: dict[str, object]) -> None:
    from tools.solver_bench import as_text

    text = as_text(found)
    assert "24x64" in text and "scaled to 65536" in text and "beyond the layer" in text and "columns" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["out/smol"],
        ["solver", "--shapes", "4096"],
        ["solver", "--shapes", "0x8"],
        ["kernels", "--shapes", "64x"],
        ["kernels", "--tokens", "0"],
        ["kernels", "--threads", "-1"],
        ["kernels", "--bits", "9"],
        ["kernels", "--modes", "7bit"],
        ["kernels", "--where", "warm"],
        ["decode", "out/smol", "--head", "none"],
        ["decode", "out/smol", "--rounds", "0"],
        ["training", "--tokens", "0"],
        ["training", "--rounds", "0"],
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    what, *rest = arguments
    assert run(main, [what, "--quick", *rest] if rest else arguments) == 2
    text = capsys.readouterr()
    assert not text.out and arguments[-1] in text.err


@pytest.mark.parametrize("what", ["solver", "kernels", "decode", "training"])
def test_help_imports_no_torch(what: str) -> None:
    code = (
        "import sys, tools.bench as t\n"
        f"try: t.main(['{what}', '--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert "--json" in done.stdout and f"nomul bench {what}" in done.stdout


def test_training_is_held_against_float_passes(tiny_hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["training", "--model", str(tiny_hf), "--tokens", "8", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, *others = found["steps"]
    assert first["trained"] == "float weights" and first["ratio"] == 1
    names = ["clipping", "clipping", "clipping", "scales", "all blocks: LoRA", "all blocks: L4Q, 3 bits"]
    assert [row["trained"] if "all" in row["trained"] else row["trained"].split()[0] for row in others] == names
    seconds = {row["trained"]: row["seconds"] for row in found["steps"]}
    for row in found["steps"]:
        assert row["tokens"] == 8 and row["peak_bytes"] >= 0
        assert row["against"] == ("all blocks: LoRA" if "all" in row["trained"] else "float weights")
        assert row["ratio"] == pytest.approx(row["seconds"] / seconds[row["against"]])
    from tools.training_bench import as_text

    assert "of" in as_text(found) and "4-bit activations" in as_text(found) and "LoRA" in as_text(found)
