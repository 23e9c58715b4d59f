"""ONNX's node tests through the importer: what passes must keep passing, and what fails must fail by name.

`tests/onnx_exclusions.txt` names the tests that are refused, with the reason. It can only shrink: a test in it that
passes is an error, as is one outside it that does not. `--update-golden` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import onnx
import onnxruntime
import pytest

from tests.onnx_backend import node_cases, outcome

EXCLUSIONS = Path(__file__).with_name("onnx_exclusions.txt")
_HEADING = (
    "# Node tests of ONNX that the importer refuses, and why. Written by pytest --update-golden; it can only shrink.\n"
)

pytestmark = pytest.mark.xdist_group("onnx_node_suite")


def newest_version() -> int:
    """The newest version of ONNX's operators that the installed runtime takes."""
    for version in range(onnx.defs.onnx_opset_version(), 1, -1):
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"])],
            "g",
            [value],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)], ir_version=10)
        with suppress(Exception):  # the runtime has no type of its own for a version that it does not take
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            return version
    raise AssertionError("the runtime takes no model at all")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What became of each node test of an operator set that the runtime takes: nothing, or how it failed."""
    newest = newest_version()
    names = [
        n for n, c in node_cases().items() if all(o.version <= newest for o in c.model.opset_import if not o.domain)
    ]
    return {name: outcome(name) for name in names}


def test_what_fails_fails_by_name(outcomes: dict[str, str]) -> None:
    assert {name: why for name, why in outcomes.items() if why and not why.startswith("refused")} == {}


def test_refusals_are_the_ones_known(outcomes: dict[str, str], request: pytest.FixtureRequest) -> None:
    failed = {name: why.removeprefix("refused: ") for name, why in outcomes.items() if why}
    if request.config.getoption("--update-golden"):
        EXCLUSIONS.write_text(
            _HEADING + "".join(f"{n}  {why}\n" for n, why in sorted(failed.items())), encoding="utf-8"
        )
        return
    known = dict(_known())
    assert sorted(failed.keys() - known.keys()) == [], "these passed before"
    assert sorted(known.keys() - failed.keys()) == [], "these pass now: take them out of the file"


def test_most_pass(outcomes: dict[str, str]) -> None:
    passed = sum(not why for why in outcomes.values())
    assert len(outcomes) > 1400 and passed >= 0.85 * len(outcomes)


def test_every_exclusion_has_a_reason() -> None:
    assert all(re.match(r"test_\w+$", name) and len(why) > 10 for name, why in _known())


def _known() -> Iterator[tuple[str, str]]:
    for line in EXCLUSIONS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, why = line.partition("  ")
            yield name, why
