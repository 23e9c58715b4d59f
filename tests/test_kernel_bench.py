"""Measuring kernels: who takes part and how, what is made of the times, and the targets; not how fast anything is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from backends.native.library import load
from tests.coded_weights import relative_error
from tools import bench_targets
from tools.bench import main
from tools.bench_models import Layers, block_of, float_op, nbits_op, random_codes, random_weight, tiled_op
from tools.bench_timing import Candidate, Plan, Timing, disturbances, interleaved
from tools.kernel_streams import name_of, streams_for
from tools.kernel_text import as_text

ARGUMENTS = ["kernels", "--shapes", "40x64", "--tokens", "2", "--bits", "3", "--modes", "14bit", "exact", "--quick"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The figures of one quick run on a tiny layer, as the command prints them."""
    with pytest.MonkeyPatch.context() as patch:
        printed: list[Any] = []
        patch.setattr("tools.console.print_json", printed.append)
        assert main([*ARGUMENTS, "--json"]) == 0
    report: dict[str, Any] = json.loads(json.dumps(printed[0]))
    return report


def test_every_candidate_runs_hot_and_cold(found: dict[str, Any]) -> None:
    theirs = {"float32", *(f"{bits}-bit acc{level}" for bits in (2, 4, 8) for level in (0, 4))}
    ours = {f"3 planes {mode}{by}" for mode in ("14bit", "exact") for by in ("", " direct")}
    assert not found["left_out"]
    for where, streams in (("hot", {"stream"}), ("cold", {"stream", "stream in order"})):
        rows = [row for row in found["rows"] if row["where"] == where]
        assert {row["name"] for row in rows} == theirs | ours | streams
        assert {(row["shape"], row["tokens"], row["threads"]) for row in rows} == {("40x64", 2, 1)}
        assert all(row["seconds"] > 0 and row["samples"] >= 3 and "marks" in row for row in rows)


def test_ratios_are_of_the_same_run(found: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in found["rows"] if row["where"] == "hot"}
    ours = rows["3 planes 14bit"]
    assert ours["to_float32"] == pytest.approx(rows["float32"]["seconds"] / ours["seconds"])
    assert ours["to_4bit"] == pytest.approx(rows["4-bit acc4"]["seconds"] / ours["seconds"])
    assert ours["gigabytes_per_second"] == pytest.approx(ours["bytes"] / ours["seconds"] / 1e9)
    assert ours["bytes"] == random_weight(40, 64, 3).data.numel() and ours["call_seconds"] > 0
    assert rows["float32"]["bytes"] == 40 * 64 * 4 and rows["3 planes 14bit direct"]["call_seconds"] == 0


def test_the_rest_is_measured_and_what_matters_is_recorded(found: dict[str, Any]) -> None:
    assert [r["mode"] for r in found["prepare"]] == ["14bit", "exact"] and all(
        r["seconds"] > 0 for r in found["prepare"]
    )
    errors = {(r["mode"], r["tokens"]): r["error"] for r in found["errors"]}
    assert errors["exact", 1] < 1e-6 < errors["14bit", 1] < 5e-4
    assert set(found["node"]["built_in_seconds"]) == {"Neg", "Relu", "Abs"}
    machine = found["machine"]
    assert machine["level"] == load().level and machine["processor"] and machine["onnxruntime"]
    assert {"cores", "usable_cores", "scheduling", "load_before"} <= machine.keys()


def test_the_figures_are_readable_too(found: dict[str, Any]) -> None:
    text = as_text(found)
    assert "40x64, 2 tokens, 1 threads, cold" in text and "stream in order" in text
    assert "3 planes 14bit direct" in text and "not measured" in text and "beyond the slowest built-in" in text


def test_our_operator_computes_the_random_weight() -> None:
    codes, x, out = random_codes(40, 64, 3), torch.randn(3, 64), torch.empty(3, 40)
    Layers(tiled_op(random_weight(40, 64, 3), "exact"), 1, 1).bound(x, out)(1)
    assert relative_error(out, x.double() @ codes.dequantize(torch.float64).T) < 1e-6


def test_rows_past_the_first_repeat_them() -> None:
    weight = random_weight(600, 64, 2)
    rows = load().decode(weight)
    assert torch.equal(rows[256:512], rows[:256]) and torch.equal(rows[512:], rows[:88])
    assert load().weight_bytes(weight.layout) == weight.data.numel()


@pytest.mark.parametrize("op", [float_op(32, 64), nbits_op(32, 64, 4, 4), tiled_op(random_weight(32, 64, 2), "14bit")])
def test_copies_of_a_layer_differ(op: Any) -> None:
    from onnx import load_from_string, numpy_helper

    from tools.bench_models import _model

    model = load_from_string(_model(op, 3))
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    first = [arrays[f"w{i}_0"] for i in range(3)]
    assert np.array_equal(first[0], op.constants[0])
    assert len({a.tobytes() for a in first}) == 3


def test_blocks_divide_the_width() -> None:
    assert [block_of(k) for k in (4096, 1536, 576, 11008, 48)] == [128, 128, 64, 128, 16]


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    first = Candidate("a", lambda n: calls.append("a" * n), layers=4)
    second = Candidate("b", lambda n: calls.append("b" * n), most=1)
    timings = interleaved([first, second], Plan(3, 0.0, warm=False, before=lambda: calls.append(".")))
    assert calls == ["a", "b", ".", "a", ".", "b", ".", "a", ".", "a"]
    assert len(timings["a"].samples) == 3 and len(timings["b"].samples) == 1


def test_what_disturbs_is_said() -> None:
    steady, shaken = Timing((1.0, 1.0, 1.1, 1.0, 9.0)), Timing((1.0, 1.5, 1.1, 2.0, 1.0))
    assert steady.seconds == 1.0 and steady.spread == pytest.approx(0.1)
    assert disturbances(0.0, [steady]) == []
    assert disturbances(0.0, [steady, shaken]) == ["stream read varied 45%"]
    (text,) = disturbances(1e6, [steady])
    assert "load 1000000.0" in text


def test_every_weight_has_a_read_about_as_large() -> None:
    sweep = torch.arange(5000, dtype=torch.uint8)
    streams = streams_for([100, 110, 400, 9000], sweep, 1, 1000)
    assert streams.sizes == (100, 400, 9000) and streams.memory.numel() == 9000
    names = [c.name for c in streams.candidates()]
    assert names == [name_of(size, in_order) for in_order in (False, True) for size in streams.sizes]
    assert [c.layers for c in streams.candidates()][:3] == [10, 2, 1]
    timings = {name: Timing((1.0,)) for name in names}
    assert streams.seconds(110, timings) == pytest.approx(1.1)


@pytest.mark.parametrize("size", [1, 63, 511, 4096 * 8, 4096 * 8 + 4096 + 7, 200_003])
def test_a_read_takes_every_byte_once(size: int) -> None:
    data = torch.zeros(size, dtype=torch.uint8)
    for place in {0, size // 2, size - 1}:
        data[place] = 1
    for threads in (1, 2, 3):
        for in_order in (False, True):
            # Bytes count for their place in a word of eight, those at the end for themselves.
            alone = load().stream(data, 1, threads, in_order)
            assert alone > 0 and load().stream(data, 3, threads, in_order) == 3 * alone % 2**64


def judged(rows: list[dict[str, Any]], level: str = "avx512") -> dict[tuple[str, str, int], tuple[Any, str]]:
    """Return (target, case, threads) -> what was measured and the verdict."""
    report = {
        "rows": rows,
        "machine": {"level": level},
        "errors": [{"mode": "14bit", "tokens": 1, "error": 1e-3}],
        "prepare": [{"mode": "14bit", "seconds": 5e-6}],
        "node": {"extra_seconds": 1e-7},
    }
    return {(t["target"], t["case"], t["threads"]): (t["measured"], t["verdict"]) for t in bench_targets.judged(report)}


def row(name: str, seconds: float, threads: int = 1, tokens: int = 1, where: str = "hot") -> dict[str, Any]:
    """Return a row of figures."""
    case = {"shape": "4096x4096", "tokens": tokens, "threads": threads, "where": where}
    return {**case, "name": name, "seconds": seconds, "to_stream": 0.5, "marks": []}


def test_targets_are_met_or_missed_or_not_measured() -> None:
    rows = [row("3 planes 14bit", 1.0), row("float32", 7.0), row("4-bit acc4", 0.9), row("3 planes 14bit", 1.0, 2)]
    case = "4096x4096, 1 token, hot"
    found = judged(rows)
    assert found["3 planes 14bit : float32", case, 1] == (7.0, "met")
    assert found["3 planes 14bit : 4-bit acc4", case, 1] == (0.9, "missed")
    assert found["3 planes 14bit : stream", case, 2] == (0.5, "missed")
    assert found["3 planes 14bit : float32", case, 2] == (None, "not measured")
    assert found["relative error, 14bit", "1 token", 1] == (1e-3, "missed")
    assert found["seconds of the table build, 14bit", "4096 inputs", 1] == (5e-6, "met")
    assert found["relative error, exact", "1 token", 1] == (None, "not measured")


def test_targets_of_a_level_are_for_that_level() -> None:
    rows = [row("3 planes 14bit", 1.0, tokens=128), row("float32", 2.0, tokens=128)]
    case = "4096x4096, 128 tokens, hot"
    with_amx, without = (f"3 planes 14bit : float32 ({word} amx)" for word in ("with", "without"))
    assert judged(rows)[with_amx, case, 1] == (None, "not measured")
    assert judged(rows)[without, case, 1] == (2.0, "met")
    assert judged(rows, "amx")[with_amx, case, 1] == (2.0, "missed")
    assert judged(rows, "amx")[without, case, 1] == (None, "not measured")
