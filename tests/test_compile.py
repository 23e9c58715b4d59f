"""The compile command from arguments to artifact: order, determinism, interruption, dry runs, gates and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

import ir.artifact
import passes.solved
import tools.build
from frontend.open import open_model
from passes import pass_names
from tests.gguf_files import tiny_model, write_model
from tests.hf_folder import change_weights, some_text, weights_of, write_folder
from tools.compile import main
from tools.entry import run
from tools.storage import storage

pytestmark = pytest.mark.usefixtures("own_cache", "quick_builtin")

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--samples", "4", "--seqlen", "32")
SHIFT = "shiftadd{bits=2 group=16 rounds=1}"
# These hold times and sizes of memory, which no two runs share.
TIMED = ("report.json", "report.html")


RTN = "rtn{bits=4 group=16}"


def command(model: Path, out: Path, passes: str, *more: str) -> list[str]:
    return [str(model), "--passes", passes, "--out", str(out), *SMALL, *more]


def compile_(model: Path, out: Path, passes: str = RTN, *more: str) -> int:
    """Run the command in this process and return its exit code; the text is the built-in one unless `more` says."""
    return run(main, command(model, out, passes, *more))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the timed ones, by path."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name not in TIMED}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def report(folder: Path) -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    text = (folder / "report.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tiny_hf: Path, cache_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a compilation by SHIFT that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        patch.setattr("tools.text._builtin", some_text)
        assert compile_(tiny_hf, out, SHIFT) == 0
    return files(out)


def test_an_artifact_is_whole(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "er" / "out"
    assert compile_(tiny_hf, out, SHIFT, "--dump-ir", "each") == 0
    assert left_behind(out.parent) == ["out"]
    names = set(files(out)) | set(TIMED)
    assert {"program.ir", "manifest.json", "config.json", "tokenizer.json", "weights-00001.safetensors"} <= names
    assert {"ir/00-before.ir", "ir/01-shiftadd.ir"} <= names and set(TIMED) <= {p.name for p in out.iterdir()}
    facts = manifest(out)
    assert set(facts["files"]) == names - {"manifest.json", *TIMED}
    for name, digest in facts["files"].items():
        assert ir.artifact.file_hash(out / name) == digest
    assert facts["pipeline"] == SHIFT and facts["history"] == [SHIFT] and facts["gate"] == "passed"
    assert (out / "config.json").read_bytes() == (tiny_hf / "config.json").read_bytes()
    found = report(out)
    assert len(found["pipeline"][0]["sites"]) == 14 and found["pipeline"][0]["left_alone"][0]["site"] == "lm_head"
    assert found["quality"]["passed"] and found["quality"]["kl"] > 0
    text = capsys.readouterr()
    assert "14 sites" in text.out and "gate      passed" in text.out and "time      " in text.out
    assert "tracing" not in text.out and "shiftadd 2/2" in text.err


def test_what_is_stored_is_what_the_artifact_holds(tmp_path: Path) -> None:
    # Eight-bit weights of a checkpoint are float32 in the artifact, where no pass made codes of them.
    kinds = {"weight": GGMLQuantizationType.Q8_0}
    model = write_model(tmp_path / "m.gguf", tiny_model("llama"), "llama", kinds)
    assert compile_(model, tmp_path / "out", RTN, "--no-gate") == 0
    opened = open_model(str(tmp_path / "out")).program
    assert report(tmp_path / "out")["totals"].items() >= storage(opened).as_json().items()
    assert storage(open_model(str(model)).program).total_bytes < opened.params.total_bytes()


def test_the_work_of_a_token_is_told_before_and_after_each_pass(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compile_(tiny_hf, out, f"canon,{SHIFT}") == 0
    found = report(out)
    steps = found["cost"]["steps"]
    assert [step["after"] for step in steps] == ["input", "canon", SHIFT] and not any(s["unknown"] for s in steps)
    before, after = steps[0], steps[2]
    # Per block: four projections around 32 channels with half of them for keys and values, and three of the MLP.
    coded = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert before["multiplies"] - after["multiplies"] == coded
    assert before["shifts"] == before["lookups"] == 0 < min(after["shifts"], after["lookups"])
    assert after["bytes"] < before["bytes"]
    shiftadd = found["pipeline"][1]
    assert shiftadd["cost_after"]["multiplies"] == after["multiplies"]
    assert shiftadd["cost_before"] == found["pipeline"][0]["cost_after"]
    text, page = capsys.readouterr().out, (out / "report.html").read_text(encoding="utf-8")
    for shown in (text, page.replace("&gt;", ">")):
        assert re.search(
            r"per token: multiplies [\d.]+ k -> [\d.]+ k, adds .*, shifts 0 -> .*, look-ups 0 -> .*, bytes ", shown
        )
        assert re.search(r"work a token, after +multiplies +adds", shown) and "MODEL" not in shown


def test_energy_is_told_when_asked_for(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert compile_(tiny_hf, out, RTN, "--energy") == 0
    text, energy = capsys.readouterr().out, report(out)["energy"]
    assert "energy MODEL" in text and "nothing was measured" in text and "MODEL" in (out / "report.html").read_text()
    steps, unit = report(out)["cost"]["steps"], energy["unit_pj"]["fp32"]
    for when, step in (("before", steps[0]), ("after", steps[-1])):
        assert energy["arithmetic_pj"][when]["fp32"] == pytest.approx(
            step["multiplies"] * unit["multiply"] + step["adds"] * unit["add"]
        )
        assert energy["memory_pj"][when] == step["bytes"] * energy["dram_pj_per_byte"]


def test_a_pipeline_is_put_in_order_with_one_note(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "fold" not in pass_names():
        pytest.skip("there is no pass fold yet")
    assert compile_(tiny_hf, tmp_path / "out", f"{SHIFT},fold") == 0
    text = capsys.readouterr()
    line = "order  fold -> shiftadd  (you wrote shiftadd,fold: fold must see float weights)"
    assert text.err.count(line) == 1 and "order" not in text.out
    assert manifest(tmp_path / "out")["pipeline"] == f"fold,{SHIFT}"
    assert line in report(tmp_path / "out")["notes"]


def test_keep_order_refuses_another_order(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "rtn{group=16},canon", "--keep-order") == 2
    text = capsys.readouterr()
    assert "cannot work in the order written" in text.err and "write canon,rtn{group=16}" in text.err
    assert not text.out and not left_behind(tmp_path)
    assert compile_(tiny_hf, tmp_path / "out", "canon,rtn{group=16}", "--keep-order") == 0


def test_the_same_command_gives_the_same_bytes(tiny_hf: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    assert compile_(tiny_hf, tmp_path / "again", SHIFT) == 0
    assert files(tmp_path / "again") == whole
    assert compile_(tiny_hf, tmp_path / "other", SHIFT, "--seed", "1") == 0
    assert files(tmp_path / "other")["weights-00001.safetensors"] != whole["weights-00001.safetensors"]


def test_no_passes_return_the_weights_bit_for_bit(tiny_hf: Path, tmp_path: Path) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "") == 0
    found = load_file(str(tmp_path / "out" / "weights-00001.safetensors"))
    for name, tensor in weights_of(tiny_hf).items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert report(tmp_path / "out")["quality"]["kl"] == 0.0
    assert manifest(tmp_path / "out")["history"] == [] and manifest(tmp_path / "out")["level"] == "model"


def test_an_artifact_is_a_model_too(tiny_hf: Path, tmp_path: Path) -> None:
    assert compile_(tiny_hf, tmp_path / "float", "") == 0
    assert compile_(tmp_path / "float", tmp_path / "coded") == 0
    assert compile_(tiny_hf, tmp_path / "direct") == 0
    coded, direct = files(tmp_path / "coded"), files(tmp_path / "direct")
    assert coded["weights-00001.safetensors"] == direct["weights-00001.safetensors"]


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv.pop(1)))
import passes.solved as target
import tools.text
from tests.hf_folder import some_text
from tools.compile import main
from tools.entry import run
save = target.save_block
def save_and_die(work, index, *rest):
    save(work, index, *rest)
    if index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
target.save_block = save_and_die
tools.text._builtin = some_text
sys.exit(run(main, sys.argv[1:]))
"""


def test_killed_and_resumed_gives_the_bytes_of_one_run(
    tiny_hf: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = command(tiny_hf, tmp_path / "out", SHIFT)
    program = [sys.executable, "-c", KILLED, str(torch.get_num_threads()), *argv]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left_behind(tmp_path) == [".out.work"]
    blocks: list[int] = []
    save = passes.solved.save_block
    monkeypatch.setattr(passes.solved, "save_block", lambda w, i, *rest: blocks.append(i) or save(w, i, *rest))
    assert run(main, [*argv, "--resume"]) == 0
    assert blocks == [1] and "resuming: 1 finished blocks found" in capsys.readouterr().err
    assert left_behind(tmp_path) == ["out"]
    assert files(tmp_path / "out") == whole


def fail_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: BaseException, index: int) -> None:
    """Make the call of `place.name` with this number raise instead."""
    real, calls = getattr(place, name), iter(range(10**6))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == index:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, failing)


def interrupted(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile, interrupted when the first block is through."""
    with monkeypatch.context() as patch:
        fail_at(patch, passes.solved, "save_block", KeyboardInterrupt(), 1)
        assert compile_(model, out, SHIFT) == 130


def test_interrupted_leaves_nothing_half_written_and_resumes(
    tiny_hf: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    interrupted(tiny_hf, out, monkeypatch)
    text = capsys.readouterr()
    assert "--resume" in text.err and "Traceback" not in text.err and not text.out
    assert left_behind(tmp_path) == [".out.work"]
    assert compile_(tiny_hf, out, SHIFT, "--resume") == 0
    assert left_behind(tmp_path) == ["out"]
    assert files(out) == whole


@pytest.mark.parametrize(("place", "name"), [(ir.artifact, "write_program"), (tools.build, "_write_manifest")])
def test_interrupted_while_writing(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, place, name, KeyboardInterrupt(), 0)
        assert compile_(tiny_hf, tmp_path / "out") == 130
    assert left_behind(tmp_path) == [".out.work"]
    assert compile_(tiny_hf, tmp_path / "out", "rtn{bits=4 group=16}", "--resume") == 0
    assert left_behind(tmp_path) == ["out"]


def test_work_of_another_compilation_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, work = write_folder(tmp_path / "tiny"), tmp_path / "out", tmp_path / ".out.work"
    interrupted(model, out, monkeypatch)
    before = files(work)

    def refused(passes: str = SHIFT, *more: str) -> None:
        capsys.readouterr()
        assert compile_(model, out, passes, "--resume", *more) == 2
        text = capsys.readouterr().err
        assert "of another compilation" in text and "without --resume" in text
        # It may still be wanted by the command it belongs to.
        assert files(work) == before and not out.exists()

    refused(SHIFT.replace("bits=2", "bits=3"))
    refused(SHIFT, "--seed", "1")
    refused(SHIFT, "--samples", "5")
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(model, **{name: weights_of(model)[name] + 1})
    refused()
    assert compile_(model, out, SHIFT) == 0
    assert left_behind(tmp_path) == ["out", "tiny"]


def test_resume_without_work_says_so(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "rtn{group=16}", "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().err


def coded_rows(predicted: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of sites that get codes; a rotation inserted before some of them has a row of its own."""
    return [s for s in predicted["sites"] if s["pass"] != "insert nomul.hadamard"]


@pytest.mark.parametrize("passes", ["", "rtn{bits=3 group=16 skip=down_proj},shiftadd{bits=2 group=32}", SHIFT])
def test_a_dry_run_predicts_and_writes_nothing(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], passes: str
) -> None:
    assert compile_(tiny_hf, tmp_path / "out", passes, "--dry-run", "--json") == 0
    text = capsys.readouterr().out
    predicted = json.loads(text)
    assert not left_behind(tmp_path)
    assert compile_(tiny_hf, tmp_path / "out", passes) == 0
    found = load_file(str(tmp_path / "out" / "weights-00001.safetensors"))
    actual = sum(t.numel() * t.element_size() for t in found.values())
    assert abs(predicted["artifact_bytes"] - actual) <= 0.01 * actual
    assert predicted["float_bytes"] >= actual and predicted["peak_bytes"] > actual
    sites = {s["site"]: s["bytes"] for s in coded_rows(predicted)}
    reports = [s for p in report(tmp_path / "out")["pipeline"] for s in p["sites"]]
    assert sites == {s["site"]: s["bytes"] for s in reports}


def test_a_dry_run_of_a_deeper_model_traces_two_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_folder(tmp_path / "tiny", num_hidden_layers=3)
    assert compile_(model, tmp_path / "out", SHIFT, "--dry-run", "--json") == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["remark"] == "from a trace of 2 of 3 layers" and len(coded_rows(predicted)) == 21
    assert compile_(model, tmp_path / "out", SHIFT) == 0
    found = load_file(str(tmp_path / "out" / "weights-00001.safetensors"))
    actual = sum(t.numel() * t.element_size() for t in found.values())
    assert abs(predicted["artifact_bytes"] - actual) <= 0.01 * actual
    reports = {s["site"]: s["bytes"] for s in report(tmp_path / "out")["pipeline"][0]["sites"]}
    assert {s["site"]: s["bytes"] for s in coded_rows(predicted)} == reports


def test_a_dry_run_for_a_person(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "rtn{group=16},canon", "--dry-run") == 0
    text = capsys.readouterr()
    assert "model.layers.1.mlp.down_proj" in text.out and "passes    canon,rtn{group=16}" in text.out
    assert "order" in text.err and "order" not in text.out and not left_behind(tmp_path)


def test_a_failed_gate_keeps_and_marks_the_artifact(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compile_(tiny_hf, out, "rtn{bits=2 group=32}", "--max-kl", "0.001") == 4
    text = capsys.readouterr()
    assert "gate      FAILED (KL at most 0.001)" in text.out
    assert text.err.count("quality gate") == 1 and "--no-gate" in text.err and "Traceback" not in text.err
    assert manifest(out)["gate"] == "failed" and not report(out)["quality"]["passed"]
    assert "FAILED" in (out / "report.html").read_text(encoding="utf-8") and left_behind(tmp_path) == ["out"]
    assert compile_(tiny_hf, tmp_path / "two", "rtn{bits=2 group=32}", "--max-kl", "0.001", "--no-gate") == 0
    assert manifest(tmp_path / "two")["gate"] == "passed" and report(tmp_path / "two")["quality"]["limit"] is None


def test_strict_ends_at_a_site_that_would_be_left_alone(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, passes.solved, "save_block", AssertionError("work before the error"), 0)
    assert compile_(tiny_hf, tmp_path / "out", SHIFT, "--strict") == 3
    text = capsys.readouterr().err
    assert "--strict forbids" in text and "lm_head" in text and "shared with another reader" in text
    assert not left_behind(tmp_path)


def test_strict_accepts_what_skip_names(tiny_hf: Path, tmp_path: Path) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "rtn{bits=4 group=32 skip=[lm_head]}", "--strict") == 0


def test_a_skip_pattern_that_names_nothing_is_refused(
    tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "rtn{bits=4 group=32 skip=[lm_haed]}") == 2
    assert "lm_haed matches none of the" in capsys.readouterr().err
    assert not left_behind(tmp_path)


def test_a_failure_of_the_compiler_leaves_a_reproducer(
    tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, passes.solved, "save_block", ZeroDivisionError("a bug"), 1)
    with pytest.raises(ZeroDivisionError):
        compile_(tiny_hf, tmp_path / "out", SHIFT)
    crash = tmp_path / ".out.work" / "crash"
    assert f"what reproduces this failure is in {crash}" in capsys.readouterr().err
    assert json.loads((crash / "reproduce.json").read_text(encoding="utf-8"))["passes"] == SHIFT
    monkeypatch.undo()


def test_json_is_all_there_is_on_stdout(tiny_hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "rtn{bits=2 group=32},canon", "--json", "--max-kl", "0.001") == 4
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and found["passes"] == "canon,rtn{bits=2 group=32}"
    assert found["totals"]["compressed_linears"] == 14 and not found["quality"]["passed"]


def test_exact_passes_are_proved_and_timed(tiny_hf: Path, tmp_path: Path) -> None:
    assert compile_(tiny_hf, tmp_path / "out", "canon,canon,rtn{group=16}") == 0
    found = report(tmp_path / "out")
    first = found["pipeline"][0]
    assert first["probe_relative_error"] == 0.0 and first["seconds"] >= 0 and first["peak_bytes"] > 50 << 20
    both = sum(p["seconds"] for p in found["pipeline"] if p["pass"] == "canon")
    assert found["seconds"]["canon"] == pytest.approx(both)


def test_recipes_say_the_same_as_text(tiny_hf: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("# first\ncanon\nrtn{bits=4 group=16}  # then\n", encoding="utf-8")
    argv = [str(tiny_hf), "--out", str(tmp_path / "a"), *SMALL, "--recipe", str(recipe)]
    assert run(main, argv) == 0
    assert compile_(tiny_hf, tmp_path / "b", "canon,rtn{bits=4 group=16}") == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_without_a_tokenizer_only_the_judgement_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_folder(tmp_path / "tiny", tokenizer=False)
    assert compile_(model, tmp_path / "out") == 0
    assert "no tokenizer" in capsys.readouterr().err
    assert manifest(tmp_path / "out")["gate"] == "not judged" and report(tmp_path / "out")["quality"] is None


def in_a_shell(argv: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.compile", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, check=False)


def test_the_command_in_a_shell(tiny_hf: Path, tmp_path: Path) -> None:
    argv = [str(tiny_hf), "--passes", "rtn{bits=4 group=16}", "--out", str(tmp_path / "out"), *SMALL]
    done = in_a_shell(argv, {"NO_COLOR": "1"})
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["pass", "did", "left", "alone", "same", "function", "time", "peak"]
    assert lines[-2].startswith("next      python -m tools.generate") and "Warning" not in done.stdout + done.stderr
    again = in_a_shell(argv, {})
    assert again.returncode == 2 and not again.stdout
    assert again.stderr == (
        "error: the output directory exists\n"
        f"  at: {tmp_path / 'out'}\n  try: choose another --out, or remove it\n"
    )  # fmt: skip


def test_work_within_work_is_shown_in_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    from passes.base import Log
    from tools.compile import _listener

    with _listener() as listen:
        log = Log(listener=listen)
        outer = log.progress(2, "blocks")
        inner = log.progress(2, "steps")
        inner()
        outer()
        inner()
        outer()
    assert [line.partition("  eta")[0] for line in capsys.readouterr().err.splitlines()] == ["steps 2/2"]
