"""Models that predict no tokens: encoders from text or arrays, anything else from arrays, through all of compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nomul
from backends.reference.runtime import ReferenceRuntime
from frontend.open import open_model
from ir.analysis import blocks, predicts_tokens
from ir.errors import UnsupportedError, UsageError
from ir.execute import batch_inputs, run_in_parts, split_batch
from ir.program import Program
from passes.base import Context
from passes.manager import Settings, run_pipeline
from passes.pipeline import parse
from tests.hf_folder import write_tokenizer
from tools import evaluate, generate
from tools.arrays import array_data, load_arrays
from tools.calibration import Windows, special_tokens
from tools.compile import main
from tools.entry import run

pytestmark = pytest.mark.usefixtures("quick_builtin")

VOCAB, WIDTH, LENGTH = 300, 32, 48
SHIFT = "shiftadd{bits=3 group=16 starts=1 rounds=2 iterations=0 polish=0 sweeps=0}"
GPTQ = "gptq{bits=4 group=16}"
OMNI = "omniquant{bits=4 group=16 epochs=1}"
Arrays = dict[str, np.ndarray[Any, Any]]


class Encoder(nn.Module):
    """BERT down to its hidden states, its inputs in a fixed order."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=LENGTH,
        )  # fmt: skip
        self.model = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        found = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        assert isinstance(found, Tensor)
        return found


class Stack(nn.Module):
    """Three equal residual layers."""

    def __init__(self) -> None:
        super().__init__()
        parts = (nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.layers = nn.ModuleList(
            nn.Sequential(*(type(p)(*_sizes(p)) if not isinstance(p, nn.GELU) else p for p in parts)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _sizes(part: nn.Module) -> tuple[int, ...]:
    return (part.in_features, part.out_features) if isinstance(part, nn.Linear) else (16,)


def export(
    model: nn.Module, example: tuple[Tensor, ...], path: Path, names: list[str], result: str, open_: Any
) -> Path:
    torch.manual_seed(3)
    for parameter in model.parameters():
        # Equal initial values would be stored once and shared.
        nn.init.normal_(parameter, 0.0, 0.2)
    torch.onnx.export(
        model.eval(), example, path, input_names=names, output_names=[result], dynamic_shapes=open_, dynamo=True,
        verbose=False,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of an encoder, its tokenizer and configuration beside it."""
    folder = tmp_path_factory.mktemp("encoder")
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    ids = torch.randint(VOCAB, (2, 5))
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    path = export(Encoder(), example, folder / "bert.onnx", names, "last_hidden_state", ({0: batch, 1: seq},) * 3)
    write_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ends = {"[CLS]": VOCAB - 2, "[SEP]": VOCAB - 1}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [_special("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, _special("[SEP]")],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in ends.items()},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return path


def _special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stack") / "stack.onnx"
    return export(Stack(), (torch.zeros(2, 16),), path, ["x"], "y", ({0: torch.export.Dim("batch")},))


def sentences(count: int = 40, length: int = 12) -> Arrays:
    """Inputs of the encoder, the ends of some rows padding."""
    draw = np.random.default_rng(0)
    mask = (np.arange(length) < draw.integers(length // 2, length + 1, (count, 1))).astype(np.int64)
    ids = draw.integers(0, VOCAB, (count, length))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": draw.integers(0, 2, ids.shape).astype(np.int32)}


def saved(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def compiled(model: Path, passes: str, calib: object, out: Path, *more: str) -> int:
    fixed = ["--samples", "16", "--seqlen", "24"]
    return run(main, [str(model), "--passes", passes, "--calib", str(calib), "--out", str(out), *fixed, *more])


def program_of(path: Path) -> Program:
    return open_model(str(path)).program


@pytest.mark.parametrize("passes", [f"fold,{SHIFT}", GPTQ, OMNI])
def test_encoders_from_arrays(encoder: Path, passes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = saved(tmp_path / "a.npz", sentences()), tmp_path / "out"
    assert compiled(encoder, passes, data, out) == 0
    found = json.loads((out / "report.json").read_text(encoding="utf-8"))
    quality, settings = found["quality"], found["settings"]
    assert found["totals"]["compressed_linears"] == 12
    assert quality["result"] == "last_hidden_state" and quality["passed"] and 0 < quality["error"] < 0.3
    assert 0.9 < quality["least"] <= quality["cosine"] < 1
    assert quality["vectors"] == int(sentences()["attention_mask"][36:].sum())
    assert settings["seqlen"] is None and len(settings["calibration_sha256"]) == 64
    assert all(p["probe_relative_error"] is None or p["probe_relative_error"] < 1e-6 for p in found["pipeline"])
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["gate"] == "passed"
    text = capsys.readouterr().out
    assert "quality   cosine " in text and f"on {quality['vectors']} vectors of last_hidden_state" in text
    assert "gate      passed (relative error at most 0.5)" in text
    assert "tools.inspect" in text and "tools.generate" not in text
    assert "cosine of last_hidden_state" in (out / "report.html").read_text(encoding="utf-8")


def test_encoders_from_text(encoder: Path, tmp_path: Path) -> None:
    assert compiled(encoder, GPTQ, "builtin", tmp_path / "out", "--samples", "8") == 0
    found = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert found["quality"]["vectors"] == 8 * 24 and found["quality"]["passed"]


def test_text_is_cut_between_special_tokens(encoder: Path) -> None:
    from frontend.tokenizer import load_tokenizer
    from tools.calibration import token_data

    tokenizer = load_tokenizer(encoder)
    before, after = special_tokens(tokenizer)
    assert (before, after) == ([VOCAB - 2], [VOCAB - 1])
    data = token_data(tokenizer, "builtin", 5, Windows(10, 8, before, after, 2), 0)
    assert [tuple(b.shape) for b in data.calibration] == [(2, 10), (2, 10), (1, 10)]
    for rows in (*data.calibration, data.held_out):
        assert bool((rows[:, 0] == VOCAB - 2).all()) and bool((rows[:, -1] == VOCAB - 1).all())
    with pytest.raises(UsageError, match="no room"):
        token_data(tokenizer, "builtin", 1, Windows(2, 2, before, after), 0)


@pytest.mark.parametrize(
    "passes", [f"smooth,fold,{SHIFT}", "awq{group=16},rtn{group=16}", "gptq{group=16},tune-scales"]
)
def test_models_of_floats(stack: Path, passes: str, tmp_path: Path) -> None:
    data = saved(tmp_path / "x.npz", {"x": np.random.default_rng(1).normal(size=(50, 16))})
    assert compiled(stack, passes, data, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert found["totals"]["compressed_linears"] == 6 and found["quality"]["vectors"] == 5
    assert 0 < found["quality"]["error"] < 0.3


def test_the_first_of_equal_layers_is_a_block_too(stack: Path) -> None:
    program = program_of(stack)
    assert not predicts_tokens(program) and len(blocks(program)) == 3
    assert blocks(program)[0].entry is program.inputs[0]


def test_a_gate_that_fails_names_its_option(stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = saved(tmp_path / "x.npz", {"x": np.random.default_rng(1).normal(size=(50, 16))})
    assert compiled(stack, "rtn{bits=2 group=16}", data, tmp_path / "a", "--max-error", "0.001") == 4
    assert "relative error" in (text := capsys.readouterr()).err and "--max-error" in text.err
    assert "gate      FAILED" in text.out
    assert compiled(stack, "rtn{bits=2 group=16}", data, tmp_path / "b", "--max-error", "0.001", "--no-gate") == 0


@pytest.mark.parametrize(
    ("passes", "name"),
    [
        ("l4q{group=16}", "l4q"),
        ("sparse,ast", "ast"),
        ("bits,rtn{group=16}", "bits"),
        ("rabit", "rabit"),
        ("onebit", "onebit"),
        ("fold,roste{group=16}", "roste"),
        ("fold,rotate{learn=1},rtn{group=16},act", "rotate"),
        ("rtn{group=16},tune-scales{loss=kl}", "tune-scales"),
        ("shiftadd{bpw=4}", "shiftadd"),
    ],
)
def test_what_learns_from_predictions_is_refused(
    encoder: Path, passes: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # From text as from arrays: it is the model that predicts none.
    calib = "builtin" if name in ("l4q", "bits") else saved(tmp_path / "a.npz", sentences())
    before = list(tmp_path.iterdir())
    assert compiled(encoder, passes, calib, tmp_path / "out") == 2
    text = capsys.readouterr().err
    assert f"error: pass {name} learns from predictions of tokens" in text and "  try: " in text
    assert list(tmp_path.iterdir()) == before


def test_arrays_for_a_language_model_teach_no_predictions(tiny_model: Program) -> None:
    data = [{"input_ids": torch.zeros(2, 4, dtype=torch.long)}]
    with pytest.raises(UsageError, match="learns from predictions"):
        run_pipeline(tiny_model.clone(), parse("l4q{group=16}"), Context(calibration=data), Settings())


def cut_short(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next fit of a second block end as if somebody had pressed Ctrl-C."""
    import passes.gptq

    real, calls = passes.gptq.save_solved, list[int]()

    def stop(*args: Any) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        real(*args)

    monkeypatch.setattr(passes.gptq, "save_solved", stop)


def test_resumed_runs_give_the_same_bytes(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = saved(tmp_path / "a.npz", sentences()), tmp_path / "out"
    assert compiled(encoder, GPTQ, data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        cut_short(out, patch)
        assert compiled(encoder, GPTQ, data, out) == 130
    other = saved(tmp_path / "b.npz", {**sentences(), "input_ids": sentences()["input_ids"][::-1]})
    assert compiled(encoder, GPTQ, other, out, "--resume") == 2
    assert compiled(encoder, GPTQ, data, out, "--resume") == 0
    for name in ("program.ir", "weights-00001.safetensors", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


BAD: list[tuple[str, Callable[[Arrays], Arrays], tuple[str, ...]]] = [
    (
        "missing",
        lambda a: {k: v for k, v in a.items() if k != "attention_mask"},
        ("no array for the input attention_",),
    ),
    ("more", lambda a: {**a, "labels": a["input_ids"]}, ("no input for the array labels",)),
    ("rows", lambda a: {**a, "attention_mask": a["attention_mask"][1:]}, ("different numbers of samples", "39")),
    ("few", lambda a: {k: v[:9] for k, v in a.items()}, ("too few samples", "nine tenths of its 9", "--samples 8")),
    ("one", lambda a: {k: v[:1] for k, v in a.items()}, ("too few samples",)),
    ("rank", lambda a: {**a, "input_ids": a["input_ids"][..., None]}, ("do not fit the input input_ids",)),
    ("floats", lambda a: {**a, "input_ids": a["input_ids"] * 1.0}, ("no whole numbers",)),
    ("vocabulary", lambda a: {**a, "input_ids": a["input_ids"] + VOCAB}, ("does not belong", f"0 to {VOCAB - 1}")),
    ("types", lambda a: {**a, "token_type_ids": a["token_type_ids"] - 1}, ("token_type_ids does not belong",)),
    ("objects", lambda a: {**a, "input_ids": np.array([None] * 40)}, ("cannot be read", "Object arrays")),
    ("words", lambda a: {**a, "input_ids": np.array(["a"] * 40)}, ("holds no numbers",)),
    ("number", lambda a: {**a, "input_ids": np.array(3)}, ("has no samples",)),
    ("none", lambda a: {}, ("holds no arrays",)),
]


@pytest.mark.parametrize(("change", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_unfit_arrays_are_refused(
    encoder: Path, change: Callable[[Arrays], Arrays], words: tuple[str, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = saved(tmp_path / "a.npz", change(sentences()))
    assert compiled(encoder, GPTQ, data, tmp_path / "out") == 2
    text = capsys.readouterr().err
    assert all(word in text for word in words) and "Traceback" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_damaged_files_are_refused(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = saved(tmp_path / "a.npz", sentences()).read_bytes()
    middle = len(whole) // 3
    flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 40]) + whole[middle + 40 :]
    np.save(tmp_path / "plain.npy", np.ones(3))
    parts = (whole[: len(whole) // 2], b"", b"no archive", flipped, (tmp_path / "plain.npy").read_bytes())
    for content in parts:
        (tmp_path / "bad.npz").write_bytes(content)
        assert compiled(encoder, GPTQ, tmp_path / "bad.npz", tmp_path / "out") == 2
        assert "the arrays cannot be read" in capsys.readouterr().err
    assert compiled(encoder, GPTQ, tmp_path / "gone.npz", tmp_path / "out") == 2
    assert "No such file" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not finite"):
        load_arrays(str(saved(tmp_path / "a.npz", {"x": np.array([[1.0], [np.nan]])})))


def test_what_text_cannot_calibrate_is_refused(
    encoder: Path, stack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        (encoder, "self", "24", 3, "the model writes no text"),
        (stack, "builtin", "24", 3, "--calib FILE.npz"),
        (stack, "self", "24", 3, "the model writes no text"),
        # Beyond the table of positions, which no file beside the model tells of.
        (encoder, "builtin", str(LENGTH + 4), 3, "cannot run on the calibration data"),
    ]
    for model, calib, length, code, words in wrong:
        assert compiled(model, GPTQ, calib, tmp_path / "out", "--seqlen", length) == code
        text = capsys.readouterr().err
        assert words in text and "Traceback" not in text
    (encoder.parent / "config.json").write_text(json.dumps({"max_position_embeddings": LENGTH}), encoding="utf-8")
    assert compiled(encoder, GPTQ, "builtin", tmp_path / "out", "--seqlen", str(LENGTH + 4)) == 2
    assert f"allows {LENGTH} positions" in capsys.readouterr().err
    (encoder.parent / "config.json").unlink()


def test_without_data_the_result_is_not_judged(stack: Path, tmp_path: Path) -> None:
    assert compiled(stack, "rtn{group=16}", "builtin", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))["quality"] is None


def test_batches_of_arrays(stack: Path) -> None:
    program, draw = program_of(stack), torch.Generator().manual_seed(0)
    x = torch.randn(700, 16, generator=draw)
    data = array_data(program, "x", {"x": x}, 300, 0)
    assert [len(b["x"]) for b in data.calibration] == [256, 44]  # type: ignore[call-overload]
    assert [len(b["x"]) for b in data.held_out] == [64]  # type: ignore[call-overload]
    drawn = torch.cat([b["x"] for b in data.calibration])  # type: ignore[call-overload]
    assert len(torch.unique(drawn, dim=0)) == 300 and not torch.equal(drawn, x[:300])
    assert torch.equal(data.held_out[0]["x"], x[630:694])  # type: ignore[call-overload]
    again, other = array_data(program, "x", {"x": x}, 300, 0), array_data(program, "x", {"x": x}, 300, 1)
    assert data.digest == again.digest != other.digest
    assert [len(b["x"]) for b in split_batch(data.calibration[1], 20)] == [20, 20, 4]  # type: ignore[call-overload]


def test_a_fixed_batch_is_kept_whole(tmp_path: Path) -> None:
    for rows in (1, 3):
        path = export(Stack(), (torch.zeros(rows, 16),), tmp_path / f"{rows}.onnx", ["x"], "y", None)
        program, x = program_of(path), torch.randn(40, 16)
        data = array_data(program, "x", {"x": x}, 7, 0)
        sizes = [len(b["x"]) for b in (*data.calibration, *data.held_out)]  # type: ignore[call-overload]
        assert set(sizes) == {rows}
        assert (
            compiled(path, f"fold,{GPTQ}", saved(tmp_path / f"{rows}.npz", {"x": x.numpy()}), tmp_path / str(rows)) == 0
        )


def test_masks_of_arrays_are_data(encoder: Path) -> None:
    """Each batch is run under its own mask, block by block as all at once."""
    from passes.stream import walk

    program = program_of(encoder)
    draws = [
        {k: torch.from_numpy(v) for k, v in sentences().items()},
        {k: torch.from_numpy(v[::-1].copy()) for k, v in sentences().items()},
    ]
    last = [step for step in walk(program, Context(calibration=draws), "float", "t") if step.block.index == 1]
    exits = last[0].float_exits()
    for index, batch in enumerate(draws):
        result = run_in_parts(program, batch_inputs(program, batch))[0]
        norm = program.outputs[0]
        ours = torch.nn.functional.layer_norm(
            exits[index],
            [WIDTH],
            *(program.value(a) for a in norm.args[2:4]),
            1e-12,  # type: ignore[arg-type]
        )
        torch.testing.assert_close(ours, result, rtol=1e-4, atol=1e-5)


def test_loaded_encoders_run_by_name(encoder: Path, tmp_path: Path) -> None:
    data = saved(tmp_path / "a.npz", sentences())
    assert compiled(encoder, GPTQ, data, tmp_path / "out") == 0
    runtime = nomul.load(tmp_path / "out")
    assert "input  input_ids: i64[batch,seq]" in str(runtime.signature)
    assert "result last_hidden_state: f32[batch,seq,32]" in str(runtime.signature)
    feeds = {name: torch.from_numpy(a[:3]).long() for name, a in sentences().items()}
    found = runtime.run(feeds)
    assert list(found) == ["last_hidden_state"] and found["last_hidden_state"].shape == (3, 12, WIDTH)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in feeds.items() if k != "input_ids"}, "no array for the input input_ids"),
        ({**feeds, "x": feeds["input_ids"]}, "no input for the array x"),
        ({**feeds, "input_ids": feeds["input_ids"].int()}, "input_ids does not fit"),
        ({**feeds, "input_ids": feeds["input_ids"][:, :4]}, "seq is 4 in another input"),
        ({**feeds, "input_ids": feeds["input_ids"][0]}, "do not fit the input input_ids"),
    ]
    for given, words in wrong:
        with pytest.raises(UsageError, match=words):
            runtime.run(given)
    for call in (lambda: runtime.forward(feeds["input_ids"]), lambda: runtime.generate("a")):
        with pytest.raises(UnsupportedError, match=r"no language model[\s\S]*call run"):
            call()


def test_commands_for_language_models_say_so(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled(encoder, "rtn{group=16}", "builtin", tmp_path / "out") == 0
    capsys.readouterr()
    assert run(generate.main, [str(tmp_path / "out"), "hello"]) == 3
    assert run(evaluate.main, [str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "error: the program is no language model" in said and "error: an encoder predicts no tokens" in said


@pytest.mark.parametrize("passes", ["fold", SHIFT])
def test_encoders_run_in_onnx_runtime(encoder: Path, passes: str, tmp_path: Path) -> None:
    data = saved(tmp_path / "a.npz", sentences())
    more = ("--target", "onnxruntime", "--kernel-mode", "exact")
    assert compiled(encoder, passes, data, tmp_path / "out", *more) == 0
    runtime = nomul.load(tmp_path / "out")
    feeds = {name: torch.from_numpy(a[:3]).long() for name, a in sentences().items()}
    wanted = ReferenceRuntime(open_model(str(tmp_path / "out")).program).run(feeds)
    found = runtime.run(feeds)
    assert [i.name for i in runtime.session.get_inputs()] == list(feeds)  # type: ignore[attr-defined]
    assert list(found) == list(wanted) == ["last_hidden_state"]
    torch.testing.assert_close(found["last_hidden_state"], wanted["last_hidden_state"], rtol=1e-3, atol=1e-3)
