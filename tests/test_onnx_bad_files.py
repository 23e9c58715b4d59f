"""Damaged and hostile ONNX files end in one clear message and exit code 3, never in a traceback."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from frontend.open import open_model
from ir.errors import NomulError
from tools.compile import main
from tools.entry import run

pytestmark = pytest.mark.usefixtures("own_cache")


def model(**changes: object) -> onnx.ModelProto:
    """A model of two products with a norm between; changes: of its nodes and initializers, by what tests need."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((16, 16), dtype=np.float32), n) for n in ("a", "b")]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"], name="first"),
        helper.make_node("Softmax", ["y"], ["z"], name="middle", axis=-1),
        helper.make_node("MatMul", ["z", "b"], ["out"], name="last"),
    ]
    graph = helper.make_graph(
        changes.get("nodes", nodes),  # type: ignore[arg-type]
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, changes.get("dims", ["n", 16]))],  # type: ignore[arg-type]
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        changes.get("weights", weights),  # type: ignore[arg-type]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def written(folder: Path, found: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(found.SerializeToString())
    return path


def outside(location: str, length: int = 1024) -> onnx.ModelProto:
    """The model with its first weight in another file."""
    found = model()
    tensor = found.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return found


def cut(folder: Path) -> Path:
    path = written(folder, model())
    path.write_bytes(path.read_bytes()[:700])
    return path


def garbage(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(b"\x00\xffnot a protobuf" * 50)
    return path


def absurd(folder: Path) -> Path:
    found = model()
    found.graph.initializer[0].dims[0] = 1 << 40
    return written(folder, found)


def huge_input(folder: Path) -> Path:
    return written(folder, model(dims=[1 << 40, 16]))


def huge_fill(folder: Path) -> Path:
    shape = numpy_helper.from_array(np.array([1 << 30, 1 << 10], dtype=np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["f"], name="fill"),
        helper.make_node("Add", ["f", "x"], ["out"], name="sum"),
    ]
    return written(folder, model(nodes=nodes, weights=[shape]))


def short_data(folder: Path) -> Path:
    found = model()
    found.graph.initializer[0].raw_data = b"1234"
    return written(folder, found)


def missing(folder: Path) -> Path:
    return written(folder, outside("weights.bin"))


def escaping(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(1024))
    (folder / "inside").mkdir()
    return written(folder / "inside", outside("../weights.bin"))


def linked(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(1024))
    (folder / "inside").mkdir()
    (folder / "inside/w.bin").symlink_to(folder / "weights.bin")
    return written(folder / "inside", outside("w.bin"))


def absolute(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(1024))
    return written(folder, outside(str(folder / "weights.bin")))


def cut_data(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(100))
    return written(folder, outside("weights.bin"))


def cyclic(folder: Path) -> Path:
    nodes = [helper.make_node("Add", ["x", "q"], ["p"], name="one"), helper.make_node("Neg", ["p"], ["q"], name="two")]
    nodes.append(helper.make_node("Identity", ["q"], ["out"], name="three"))
    return written(folder, model(nodes=nodes))


def unknown(folder: Path) -> Path:
    return written(folder, model(nodes=[helper.make_node("Mystery", ["x"], ["out"], name="odd", domain="some.where")]))


def mismatched(folder: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((5, 7), dtype=np.float32), "a")
    return written(folder, model(nodes=[helper.make_node("MatMul", ["x", "a"], ["out"], name="odd")], weights=[weight]))


def wrong_type(folder: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((16, 16), dtype=np.int32), "a")
    return written(folder, model(nodes=[helper.make_node("MatMul", ["x", "a"], ["out"], name="odd")], weights=[weight]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (cut, "no ONNX model"),
        (garbage, "no ONNX model"),
        (absurd, "no tensor has"),
        (huge_input, "no tensor has"),
        (huge_fill, ""),
        (short_data, ""),
        (missing, "missing"),
        (escaping, "outside"),
        (linked, "outside"),
        (absolute, "outside"),
        (cut_data, "cut off"),
        (cyclic, "never computed"),
        (unknown, "odd"),
        (mismatched, "odd"),
        (wrong_type, "odd"),
    ],
)
def test_damage_is_named(
    make: Callable[[Path], Path], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    code = run(main, [str(path), "--passes", "rtn{group=16}", "--out", str(tmp_path / "out"), "--calib", "self"])
    told = capsys.readouterr().err
    assert code == 3 and "Traceback" not in told and said in told, told
    assert not (tmp_path / "out").exists()


def test_a_sound_model_opens(tmp_path: Path) -> None:
    assert open_model(str(written(tmp_path, model()))).kind == "onnx"
    (tmp_path / "weights.bin").write_bytes(bytes(1024))
    assert open_model(str(written(tmp_path, outside("weights.bin")))).kind == "onnx"


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """Bytes changed, cut or repeated at random: whatever comes of it, it is a program or one of our errors."""
    draw, whole, outcomes = random.Random(0), model().SerializeToString(), list[str]()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(data))
            if draw.random() < 0.7:
                # Mostly what describes the graph, which lies before and between the weights.
                at = draw.choice([at, draw.randrange(220), len(data) - 1 - draw.randrange(120)])
                data[at] = draw.randrange(256)
            elif draw.random() < 0.5:
                del data[at : at + draw.randint(1, 8)]
            else:
                data[at:at] = data[at : at + draw.randint(1, 16)]
        path = tmp_path / "model.onnx"
        path.write_bytes(bytes(data))
        try:
            open_model(str(path))
            outcomes.append("opened")
        except NomulError:
            outcomes.append("refused")
    assert {"opened", "refused"} == set(outcomes)
